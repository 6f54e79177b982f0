"""The top-k oracle."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.pages import ExactTopK


@method(title="Exact top-k (oracle)", arxiv="", tiny=dict(read=12))
def exact_topk(
    read: int | float = 0.05, skip_layers: int = 0, sink: int = 0, recent: int = 1, over: str = "softmax_max"
) -> Policy:
    """The entries of largest attention logits, found by scoring every key: the bound on what selection can do.

    Reads all keys to choose, so it saves no bandwidth; a group of query heads shares one choice by the largest
    softmax probability (over='softmax_max'), or see `over_group`.
    """
    selector = ExactTopK(read=read, sink=sink, recent=recent, skip_layers=skip_layers, over=over)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
