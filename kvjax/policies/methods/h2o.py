"""H2O."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import AccumulatedAttention


@method(
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs",
    arxiv="2306.14048",
    tiny=dict(recent=4),
)
def h2o(budget: Budget = 0.5, recent: int = 32, evict_decode: bool = True, interval: int = 1) -> Policy:
    """Heavy hitters (largest attention accumulated over all queries) plus the `recent` newest entries.

    score[h, j] = sum_i A[h, i, j] over every prompt query and every decode step, mean over the query group. The
    paper's code assumes one query head per KV head; the mean is our reading for grouped queries.
    """
    return Policy(
        scorer=AccumulatedAttention(),
        budget=budget,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer"}),
    )
