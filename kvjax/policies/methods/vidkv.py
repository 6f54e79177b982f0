"""VidKV."""

from kvjax.codecs.levels import Sign
from kvjax.codecs.mixed import Fourier, SplitChannels
from kvjax.codecs.quantizers import Affine, Pair
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models",
    arxiv="2503.16257",
    tiny=dict(group=8, residual=8),
)
def vidkv(
    k_bits: float = 1.5, v_bits: float = 1.58, group: int = 32, residual: int = 128, sink: int = 0
) -> Policy:
    """Keys: the channels of largest range at 2 bits, the others at 1 bit after a Fourier transform. Values: ternary.

    Groups of `group` tokens per channel. Of every group, the (k_bits - 1) head_dim channels with the largest range
    have asymmetric 2-bit codes; the others are transformed along the channels (real FFT, as many reals as channels)
    and stored as sign times mean magnitude. v_bits 1.58: {-1, 0, 1} times a scale; 2: asymmetric.
    """
    if not 1 <= k_bits <= 2:
        raise ValueError(f"vidkv: k_bits must be in [1, 2], got {k_bits}")
    if v_bits not in (1.58, 2):
        raise ValueError(f"vidkv: v_bits must be 1.58 or 2, got {v_bits}")
    k = SplitChannels(Affine(2, group, "channel"), Fourier(Sign(False, group)), k_bits - 1, group)
    v = Sign(True, group) if v_bits == 1.58 else Affine(2, group, "channel")
    return Policy(codec=Pair(k, v, residual, sink), explicit=frozenset({"codec"}))
