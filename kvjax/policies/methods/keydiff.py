"""KeyDiff."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.keys import KeyDiff


@method(title="KeyDiff: Key Similarity-Based KV Cache Eviction", arxiv="2504.15364")
def keydiff(budget: Budget = 0.5, sink: int = 0, recent: int = 0) -> Policy:
    """Keys that differ most from the average key direction are kept; needs no attention weights.

    score[h, j] = -cos(k[h, j], mean_t k[h, t] / ||k[h, t]||). With chunked prefill this is the paper's
    block-wise form.
    """
    return Policy(scorer=KeyDiff(), budget=budget, sink=sink, recent=recent, explicit=frozenset({"scorer"}))
