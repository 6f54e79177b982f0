"""TreeKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.statistics import TreeSweep


@method(
    title="TreeKV: Smooth Key-Value Cache Compression with Tree Structures",
    arxiv="2501.04987",
    tiny=dict(sink=2, recent=4, block=2),
)
def treekv(
    budget: Budget = 0.5, sink: int = 4, recent: int = 64, block: int = 16, evict_decode: bool = True
) -> Policy:
    """Old regions are thinned most and recent ones least, like a tree, by a pointer that sweeps over the entries.

    When the cache is full, the two entries at the pointer compete by mean attention per observing query, the lower
    one leaves, and the pointer moves on, cyclically. It sweeps between the sinks and the `recent` newest entries
    (paper: 508 of 1024); in prefill over blocks of `block` tokens. Keys keep their positions (the paper re-assigns
    ranks).
    """
    if block < 1:
        raise ValueError(f"treekv: block must be at least 1 token, got {block}")
    return Policy(
        scorer=TreeSweep(sink, recent, block),
        budget=budget,
        sink=sink,
        recent=recent,
        evict_decode=evict_decode,
        explicit=frozenset({"scorer"}),
    )
