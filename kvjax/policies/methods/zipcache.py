"""ZipCache."""

from kvjax.codecs.quantizers import Affine, Pair
from kvjax.codecs.wrappers import ChannelScaled, Tiers
from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.scorers.saliency import NormalisedAttention


@method(
    title="ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
    arxiv="2405.14256",
    tiny=dict(segment=10, residual=10, probes=4),
)
def zipcache(
    high: int = 4,
    low: int = 2,
    ratio: float = 0.6,
    segment: int = 100,
    residual: int = 100,
    sink: int = 0,
    probes: int = 64,
) -> Policy:
    """Salient tokens get `high` bits, the others `low`; keys per channel, values per token with scaled channels.

    Saliency: attention of probe queries on a token divided by the number of probes that see it. Of every `segment`
    tokens the `ratio` most salient are in the high class. Values are divided by a_c = sqrt(max_t |V_tc|), then
    rounded per token. The authors rank a whole prompt and encode again every 100 tokens; here each segment is
    ranked and encoded once, as tokens leave the window; while decoding, by the newest query's attention.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"zipcache: ratio must be in [0, 1], got {ratio}")
    count = round(ratio * segment)
    k, v = [], []
    for n, bits in ((count, high), (segment - count, low)):
        k.append((n, Affine(bits, max(n, 1), "channel")))
        v.append((n, Affine(bits)))
    codec = Pair(
        Tiers(tuple(k), segment),
        ChannelScaled(Tiers(tuple(v), segment), segment),
        residual,
        sink,
        scorer=NormalisedAttention(probes),
    )
    return Policy(codec=codec, explicit=frozenset({"codec"}))
