"""HashEvict."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.statistics import HashDistance


@method(
    title="HashEvict: A Pre-Attention KV Cache Eviction Strategy using Locality-Sensitive Hashing",
    arxiv="2412.16187",
    tiny=dict(sink=2, recent=4, window=4),
)
def hashevict(
    budget: Budget = 0.5,
    bits: int = 8,
    sink: int = 4,
    recent: int = 10,
    window: int = 8,
    seed: int = 0,
    evict_decode: bool = True,
) -> Policy:
    """The entry whose sign code differs most from the query's leaves; codes are `bits` random projections.

    score[h, j] = -sum_group popcount(code(q) xor code(k_j)), code(x) = [R'x >= 0] of post-RoPE vectors. After the
    prompt the last `window` queries vote (our reading: the paper starts from a full cache). Codes are stored per
    entry; ties leave the oldest first. Here the victim leaves after the step's attention, not before it.
    """
    if bits < 1 or window < 1:
        raise ValueError(f"hashevict: bits and window must be positive, got {bits} and {window}")
    return Policy(
        scorer=HashDistance(bits, window, seed),
        budget=budget,
        sink=sink,
        recent=recent,
        evict_decode=evict_decode,
        explicit=frozenset({"scorer"}),
    )
