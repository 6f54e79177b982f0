"""KIVI."""

from kvjax.codecs.kivi import SCALE_DTYPES, Kivi
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arxiv="2402.02750",
    tiny=dict(group=8),
)
def kivi(
    bits: int = 4,
    group: int = 32,
    residual: int = 128,
    sink: int = 0,
    hadamard: bool = False,
    scale_dtype: str = "auto",
) -> Policy:
    """Keys after RoPE per channel over `group` tokens, values per token over `group` channels, newest entries exact.

    code = round((x - zero) / scale), zero = min, scale = (max - min) / (2^bits - 1), both in `scale_dtype`:
    "float16", "bfloat16", or "auto" for bfloat16 on a TPU, which loads no float16, and float16 elsewhere. The oldest
    tokens of a full window are encoded together, a pack block (64 slots at 4 bits, 128 at 2) at a time; values
    leave the window with their keys, where the authors' code encodes values one by one. sink: first entries
    that stay in full precision. hadamard: rotate the channels before rounding.
    """
    if bits not in (2, 4):
        raise ValueError(f"kivi: bits must be 2 or 4, got {bits}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"kivi: scale_dtype={scale_dtype!r}; choose one of {list(SCALE_DTYPES)}")
    codec = Kivi(bits, group, residual, sink, hadamard, scale_dtype)
    if codec.group > residual:
        raise ValueError(
            f"kivi: {codec.group} tokens are encoded at once (group={group}, {bits} bits), "
            f"more than residual={residual}"
        )
    return Policy(codec=codec, explicit=frozenset({"codec"}))
