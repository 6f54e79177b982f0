"""LouisKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.triggered import Boundaries


@method(
    title="LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences",
    arxiv="2510.11292",
    tiny=dict(read=12, per=4, sink=2, recent=4, segments=4),
)
def louiskv(
    read: int | float = 2048,
    trigger: float = 0.7,
    per: int = 16,
    sink: int = 4,
    recent: int = 64,
    skip_layers: int = 0,
    segments: int = 16,
    rounds: int = 10,
) -> Policy:
    """Clusters of the prompt and segments of the output, chosen anew only when the query turns.

    r_t = mean over the query heads of cos(q_{t-1}, q_t); when r_t < trigger the entries since the last boundary become a
    segment and units are chosen again by q.(mean key); otherwise the last choice stays, with the newest `recent`. Each
    layer decides alone. A group of query heads shares one choice by its mean softmax over the units, as in the paper.
    sink, recent and skip_layers are this project's (the paper has sinks and a local buffer, of sizes it does not give).
    """
    selector = Boundaries(
        read, sink, recent, skip_layers, per=per, rounds=rounds, trigger=trigger, segments=segments
    )
    return Policy(selector=selector, explicit=frozenset({"selector"}))
