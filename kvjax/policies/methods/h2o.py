"""H2O."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import AccumulatedAttention


@method(
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs",
    arxiv="2306.14048",
    tiny=dict(recent=4),
)
def h2o(
    budget: Budget = 0.5,
    recent: int = 32,
    evict_decode: bool = True,
    interval: int = 1,
    per_query: bool = False,
) -> Policy:
    """Heavy hitters (largest attention accumulated over all queries) plus the `recent` newest entries.

    score[h, j] = sum_i A[h, i, j] over every prompt query and every decode step, mean over the query group (the
    paper's code assumes one query head per KV head). interval: decode steps from one eviction to the next.
    per_query divides by the queries that saw the entry: with recent=0 it is kvpress' ObservedAttention.
    """
    return Policy(
        scorer=AccumulatedAttention(per_query),
        budget=budget,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer"}),
    )
