"""LServe."""

from kvjax.policies.allocators.heads import HeadRoles
from kvjax.policies.base import Policy
from kvjax.policies.head_scores import head_table
from kvjax.policies.registry import method
from kvjax.policies.scorers.recency import Recency
from kvjax.policies.selectors.pages import SubChunkBounds


@method(
    title="LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention",
    arxiv="2502.14866",
    tiny=dict(read=16, page=8, chunk=4, heads=None, interval=2),
)
def lserve(
    read: int | float = 4096,
    page: int = 64,
    chunk: int = 16,
    interval: int = 4,
    heads: str | tuple[tuple[float, ...], ...] | None = "kvref-22m",
    sparsity: float = 0.5,
    sink: int = 128,
    local: int = 256,
    skip_layers: int = 0,
    over: str = "max",
) -> Policy:
    """Streaming heads hold sinks and a window; the others read pages by the best Quest bound of their sub-chunks.

    bound(page) = max over its chunks of `chunk` slots of sum_c max(q_c k_max_c, q_c k_min_c); a choice serves `interval`
    steps. heads: DuoAttention's scores, as there (None: all heads keep everything), of which the lowest `sparsity`
    stream: their entries are evicted after the prompt. The paper chooses per query head; here a group shares one choice by the
    largest bound. Composes with a codec, as in the paper (`lserve | int8`). Heads with few entries read them all.
    """
    selector = SubChunkBounds(
        read,
        0,
        1,
        skip_layers,
        interval,
        page=page,
        chunk=chunk,
        over=over,
        least=sink + local if heads else 0,
    )
    if heads is None:
        return Policy(selector=selector, explicit=frozenset({"selector"}))
    table, file = head_table("lserve", heads, "duo")
    return Policy(
        scorer=Recency(),
        allocator=HeadRoles(table, sink + local, 1.0 - sparsity, file),
        budget=1.0,
        sink=sink,
        recent=local,
        selector=selector,
        explicit=frozenset({"allocator", "selector"}),
    )
