"""QAQ."""

from kvjax.codecs.quantizers import Affine, Pair
from kvjax.codecs.wrappers import Outliers, Tiers
from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.scorers.saliency import PeakAttention


@method(
    title="QAQ: Quality Adaptive Quantization for LLM KV Cache",
    arxiv="2403.04643",
    tiny=dict(segment=8, residual=8, window=4, shares=(0.25, 0.25, 0.5)),
)
def qaq(
    bits: tuple = (4, 3, 2),
    shares: tuple = (0.25, 0.25, 0.5),
    outliers: int = 1,
    window: int = 5,
    segment: int = 64,
    residual: int = 64,
    sink: int = 0,
) -> Policy:
    """Bits per token follow the attention it may receive: the error allowed in a value is inverse to it.

    The paper's rule n_bits = ceil(log2(range / (2 e) + 1)), e = sqrt(12 / T) eps / a_t, makes a ranking by a_t, the
    largest attention of the last `window` queries. Storage is static here: of every `segment` tokens, `shares[i]`
    get `bits[i]`, the most attended first, and eps follows from the shares; keys, whose bits the paper sets by their range
    alone, follow the same order. Each token keeps its `outliers` largest and smallest channels exactly. Codes span
    the range of the rest, where the authors' are centred on the mean and clip skewed tails.
    """
    if len(bits) != len(shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"qaq: shares {shares} must add up to 1, one for each of bits {bits}")
    counts = [round(s * segment) for s in shares[:-1]]
    counts.append(segment - sum(counts))
    tiers = Tiers(tuple((n, Outliers(Affine(b), outliers)) for n, b in zip(counts, bits)), segment)
    codec = Pair(tiers, tiers, residual, sink, scorer=PeakAttention(window))
    return Policy(codec=codec, explicit=frozenset({"codec"}))
