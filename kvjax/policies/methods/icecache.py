"""IceCache."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.semantic import SemanticPages


@method(
    title="IceCache: Memory-efficient KV-cache Management for Long-Sequence LLMs",
    arxiv="2604.10539",
    tiny=dict(read=12, page=4, sink=2, recent=4, skip_layers=0),
)
def icecache(
    read: int | float = 256,
    page: int = 16,
    sink: int = 4,
    recent: int = 32,
    skip_layers: int = 2,
    over: str = "softmax_max",
) -> Policy:
    """Pages that hold similar tokens rather than neighbours, chosen by q.(mean key of the page).

    After the prompt each KV head's entries are stored in the order of a balanced tree over its keys, one leaf a page; generated
    entries follow in time order. The paper builds a randomised DCI tree on the host and searches it; here the tree splits at
    medians along main directions, and all leaves are scored. It reads the union of the pages that a group of query heads
    finds; here the group shares `read` entries by its largest softmax. page, sink and recent are this project's.
    """
    selector = SemanticPages(read, sink, recent, skip_layers, page=page, over=over)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
