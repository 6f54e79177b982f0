"""ARKV."""

from kvjax.codecs.quantizers import Cast, Pair, Scaled
from kvjax.codecs.wrappers import Tiers
from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.saliency import MeanAndVariance


@method(
    title="ARKV: Adaptive and Resource-Efficient KV Cache Management",
    arxiv="",
    tiny=dict(window=4, segment=4, kernel=3),
)
def arkv(
    budget: Budget = 0.5,
    origin: float = 0.25,
    window: int = 32,
    gamma: float = 263.8,
    kernel: int = 5,
    segment: int = 32,
) -> Policy:
    """Three states per token and head: original (model dtype), quantized (fp8 e4m3), or evicted.

    score = pooled (mean + gamma variance) of the attention of the last `window` queries, mean over the group. The
    budget's best tokens stay; of every `segment` of them the `origin` share with the best score keeps the model's
    dtype, the others have 8 bits and a scale. The newest `segment` tokens are always original. The authors choose
    `origin` per layer from the entropy, variance and kurtosis of its attention; here it is one number.
    """
    if not 0 <= origin <= 1:
        raise ValueError(f"arkv: origin must be in [0, 1], got {origin}")
    count = round(origin * segment)
    tiers = Tiers(((count, Cast("bfloat16")), (segment - count, Scaled())), segment)
    scorer = MeanAndVariance(window, gamma, kernel)
    return Policy(
        scorer=scorer,
        budget=budget,
        recent=window,
        codec=Pair(tiers, tiers, segment, scorer=scorer),
        explicit=frozenset({"scorer", "codec"}),
    )
