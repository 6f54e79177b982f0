"""RotateKV."""

from kvjax.codecs.quantizers import Affine, Pair
from kvjax.codecs.wrappers import Rotated
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="RotateKV: Accurate and Robust 2-Bit KV Cache Quantization", arxiv="2501.16383", tiny=dict(group=8)
)
def rotatekv(
    bits: int = 2,
    group: int = 0,
    sink: int = 20,
    residual: int = 0,
    clip: float | None = None,
    pre_rope: bool = True,
) -> Policy:
    """Keys before RoPE and values are rotated by a Hadamard matrix per head, then rounded per token.

    Asymmetric codes over `group` channels (0: the head), float8 scale and integer zero, range shrunk by `clip`
    (0.8 at 2 bits); the first `sink` tokens, where massive activations sit, stay exact. The authors rotate four
    KV heads at once, reorder channels by calibration, and find sinks by the size of hidden states; one head is
    rotated here, so that every head may keep its own tokens, and channels keep their order, which costs at 2 bits.
    """
    clip = (0.8 if bits == 2 else 1.0) if clip is None else clip
    if not 0 < clip <= 1:
        raise ValueError(f"rotatekv: clip must be in (0, 1], got {clip}")
    part = Affine(bits, group, clip=clip, scale="float8_e4m3fn", zero="int8")
    return Policy(
        codec=Pair(Rotated(part), Rotated(part, seed=1), residual, sink, pre_rope),
        explicit=frozenset({"codec"}),
    )
