"""CurDKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.compactor import ValueGuided

KINDS = ("product", "key", "value", "mean")


@method(
    title="Value-Guided KV Compression for LLMs via Approximated CUR Decomposition",
    arxiv="2509.15038",
    tiny=dict(sink=2, block=4),
)
def cur(budget: Budget = 0.5, kind: str = "product", block: int = 16, sink: int = 4) -> Policy:
    """Entries with a large share of the squared key and value norms of their block are kept.

    score = (||k||^2 / sum_block ||k||^2) * (||v||^2 / sum_block ||v||^2); kind: product, key, value or mean of the
    two shares; block=0 leaves norms as they are. The first `sink` tokens are kept.
    """
    if kind not in KINDS:
        raise ValueError(f"cur: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return Policy(scorer=ValueGuided(kind, block), budget=budget, sink=sink, explicit=frozenset({"scorer"}))
