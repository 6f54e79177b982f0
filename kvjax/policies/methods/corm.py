"""CORM."""

from kvjax.policies.allocators.threshold import Threshold
from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.statistics import RecentMessage


@method(
    title="CORM: Cache Optimization with Recent Message for Large Language Model Inference",
    arxiv="2404.15949",
    tiny=dict(window=6, recent=4),
)
def corm(
    cap: Budget = 1.0, window: int = 256, recent: int = 256, evict_decode: bool = True, interval: int = 1
) -> Policy:
    """An entry leaves when it was unimportant to all of the last `window` queries; heads keep what remains.

    Important to query i: A[i, j] >= 1 / (entries visible to i), for any head of the group. The position of the last
    such query is stored per entry, which is the same as the paper's window x entries bit matrix. Compression is an
    outcome; cap bounds a layer's entries and the memory that is allocated, and the entries that have been
    unimportant longest go first. While decoding no head grows beyond the size the prompt left it: with interval=1 one entry
    leaves a step, the one that was unimportant longest; with more, every `interval` steps, all that have become unimportant.
    """
    if window < 1:
        raise ValueError(f"corm: window must be at least 1 query, got {window}")
    return Policy(
        scorer=RecentMessage(window),
        allocator=Threshold(1.0),
        budget=cap,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer", "allocator"}),
    )
