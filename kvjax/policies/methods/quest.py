"""Quest."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.pages import PageBounds


@method(
    title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arxiv="2406.10774",
    tiny=dict(read=12, page=4, skip_layers=0),
)
def quest(
    read: int | float = 512, page: int = 16, skip_layers: int = 2, sink: int = 0, over: str = "max"
) -> Policy:
    """Pages whose upper bound of q.k is largest, and the newest page; the whole cache stays stored.

    bound(q, page) = sum_c max(q_c k_max_c, q_c k_min_c) with the element-wise extrema of the page's keys after RoPE, which
    cost 2/page of the keys' bytes. read: entries per step and KV head, the newest page included; the first `skip_layers`
    layers read everything. The paper chooses per query head; here a group of query heads shares one choice, by the
    largest (over='max') or mean ('mean') bound.
    """
    selector = PageBounds(read=read, sink=sink, skip_layers=skip_layers, page=page, over=over)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
