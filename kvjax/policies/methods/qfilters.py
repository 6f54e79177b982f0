"""Q-Filters."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.windows import QueryFilter


@method(
    title="Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression",
    arxiv="2503.02812",
    tiny=dict(recent=4),
)
def qfilters(
    budget: Budget = 0.5, recent: int = 64, file: str | None = None, evict_decode: bool | None = None
) -> Policy:
    """Keys that project far onto the main direction of the queries are kept; needs no attention weights.

    score[h, j] = <k_j, v_h>, v_h = mean over the group of the first right-singular vector of the (uncentred)
    post-RoPE queries, on the side of most of them. file: a calibration file with `filters` [layers, kv_heads, dim]
    = -v, as the paper measures offline; without it the prompt's own queries give the direction, and eviction while
    decoding (the default with a file) is not possible. kvpress protects nothing: recent=0.
    """
    if evict_decode and file is None:
        raise ValueError("qfilters: evict_decode needs file=..., a calibration file with the directions")
    return Policy(
        scorer=QueryFilter(file),
        budget=budget,
        recent=recent,
        evict_decode=file is not None if evict_decode is None else evict_decode,
        explicit=frozenset({"scorer"}),
    )
