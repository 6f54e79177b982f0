"""Scissorhands."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.statistics import Persistence


@method(
    title="Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression",
    arxiv="2305.17118",
    tiny=dict(window=16, recent=4),
)
def scissorhands(
    budget: Budget = 0.5, window: int = 32, recent: int = 10, evict_decode: bool = True, interval: int = 1
) -> Policy:
    """Entries that were important to most of the last `window` queries stay: importance persists.

    score[j] = #{i in window: A[i, j] >= 1 / (entries visible to i)} / queries that saw j, mean attention over the
    group; one bit per query and entry is stored (the paper's window=400 would cost 52 bytes an entry). The paper drops
    half of the cache at once: set interval, the decode steps from one eviction to the next. Uniform over layers (the
    paper gives later layers more; compose with a layer allocator).
    """
    if window < 1:
        raise ValueError(f"scissorhands: window must be at least 1 query, got {window}")
    return Policy(
        scorer=Persistence(window),
        budget=budget,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer"}),
    )
