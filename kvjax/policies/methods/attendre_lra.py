"""Attendre's LRA eviction."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.statistics import AttendedTopK


@method(
    title="Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based Transformers (LRA)",
    arxiv="2401.04881",
    tiny=dict(top=4, recent=2),
)
def attendre_lra(
    budget: Budget = 0.5, top: int = 32, recent: int = 16, evict_decode: bool = True, interval: int = 1
) -> Policy:
    """The least recently attended entry leaves; attended means among the `top` of a query of the group.

    score = minus the age of the last query that attended the entry; of equals the oldest leaves. The query
    memory that delays queries until later keys are there needs a bidirectional model and is left out.
    """
    if top < 1:
        raise ValueError(f"attendre_lra: top must be at least 1, got {top}")
    return Policy(
        scorer=AttendedTopK(top, recent=True),
        budget=budget,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer"}),
    )
