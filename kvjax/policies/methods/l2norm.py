"""L2-norm (Knorm)."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.keys import KeyNorm


@method(title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arxiv="2406.11430")
def l2norm(budget: Budget = 0.5, sink: int = 0, recent: int = 0) -> Policy:
    """Keys of small norm are kept: they tend to draw high attention.

    score[h, j] = -||k[h, j]||_2, per KV head, nothing protected by default.
    """
    return Policy(scorer=KeyNorm(), budget=budget, sink=sink, recent=recent, explicit=frozenset({"scorer"}))
