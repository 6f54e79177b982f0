"""CapKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.future import InformationCapacity


@method(
    title="Rethinking KV Cache Eviction via a Unified Information-Theoretic Objective",
    arxiv="2604.25975",
    tiny=dict(sink=2, future=16),
)
def cap(budget: Budget = 0.5, tau: float = 5.0, future: int = 512, sink: int = 4) -> Policy:
    """Entries that add most information capacity: leverage of the value, weighted by the key's relevance.

    score = w_t v_t' (I + sum_u w_u v_u v_u')^-1 v_t with w_t = exp(tau (cos(q, k_t) - max cos)); q is the mean
    prompt query turned to the next `future` positions. kvpress' form, whose normalisations the paper lacks.
    """
    if future < 1:
        raise ValueError(f"cap: future must be at least 1 position, got {future}")
    return Policy(
        scorer=InformationCapacity(tau, future, sink),
        budget=budget,
        sink=sink,
        explicit=frozenset({"scorer"}),
    )
