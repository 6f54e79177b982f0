"""MiKV."""

from kvjax.codecs.quantizers import Affine, Cast, Pair, Quantizer
from kvjax.codecs.wrappers import ChannelScaled, Tiers
from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.scorers.saliency import NormalisedAttention


@method(
    title="No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
    arxiv="2402.18096",
    tiny=dict(segment=10, residual=10, group=4, probes=4),
)
def mikv(
    high: int = 8,
    low: int = 2,
    ratio: float = 0.2,
    group: int = 32,
    segment: int = 100,
    residual: int = 100,
    sink: int = 0,
    probes: int = 64,
) -> Policy:
    """Tokens that H2O would evict stay, at `low` bits; the `ratio` most important have `high` bits (16: exact).

    Both tiers are rounded per token over `group` channels. Importance is accumulated attention; a tier of every
    `segment` tokens is chosen once, when they leave the window, and never changed. Channel balancer: keys of the
    low tier are divided by a_c = sqrt(max_t |k_tc|) of their segment, the part of the paper's balancer that does
    not depend on queries.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"mikv: ratio must be in [0, 1], got {ratio}")
    count = round(ratio * segment)
    top: Quantizer = Cast("bfloat16") if high == 16 else Affine(high, group)
    rest = Affine(low, group)
    tiers = Tiers(((count, top), (segment - count, rest)), segment)
    codec = Pair(ChannelScaled(tiers, segment), tiers, residual, sink, scorer=NormalisedAttention(probes))
    return Policy(codec=codec, explicit=frozenset({"codec"}))
