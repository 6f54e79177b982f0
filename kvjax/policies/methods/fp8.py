"""fp8 storage."""

from kvjax.codecs.base import PerToken
from kvjax.policies.base import Policy
from kvjax.policies.registry import method

FORMATS = ("e4m3", "e5m2")


@method(title="FP8 Formats for Deep Learning", arxiv="2209.05433")
def fp8(format: str = "e4m3") -> Policy:
    """8-bit floating point codes x / s with s = max|x| / (largest finite code) per token and KV head.

    format: e4m3 (3 mantissa bits, relative error 2^-4) or e5m2 (2 mantissa bits, 2^-3).
    """
    if format not in FORMATS:
        raise ValueError(f"fp8: format must be one of {', '.join(FORMATS)}, got {format!r}")
    return Policy(codec=PerToken(f"fp8_{format}"), explicit=frozenset({"codec"}))
