"""Random eviction."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.wrappers import Random


@method(title="Random eviction (baseline)", arxiv="")
def random(budget: Budget = 0.5, seed: int = 0, sink: int = 0, recent: int = 0) -> Policy:
    """Entries are kept at random: the baseline that every score must beat.

    score[h, j] ~ U(0, 1), a hash of seed, layer, head and position. Nothing is protected by default, as in kvpress;
    report random(sink=4, recent=32) beside it, because losing the sinks alone ruins the model.
    """
    return Policy(
        scorer=Random(seed), budget=budget, sink=sink, recent=recent, explicit=frozenset({"scorer"})
    )
