"""LagKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.lag import LagRelative


@method(
    title="LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
    arxiv="2504.04704",
    tiny=dict(sink=2, lag=4),
)
def lagkv(budget: Budget = 0.5, sink: int = 4, lag: int = 128, cross: bool = False) -> Policy:
    """Tokens that vary most over their channels, in units of the range of the `lag` tokens that follow, are kept.

    score = rank within the partition / lag of softmax(std((x - min_next) / (max_next - min_next))), mean of keys
    and values; the newest partition and the sinks get 1. One ranking over the whole prompt (kvpress' form; the
    paper takes the same share of every partition). cross: compare the softmax values across partitions.
    """
    if lag < 2:
        raise ValueError(f"lagkv: lag must be at least 2 tokens, got {lag}")
    return Policy(
        scorer=LagRelative(sink, lag, cross), budget=budget, sink=sink, explicit=frozenset({"scorer"})
    )
