"""MInference."""

from kvjax.policies.base import Policy
from kvjax.policies.prefill_patterns.vertical_slash import MInference
from kvjax.policies.registry import method


@method(
    title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    arxiv="2407.02490",
    tiny=dict(
        vertical=2, slash=4, first=1, nearest=2, sink=1, window=5, tokens=12, last=4, block=4, min_recall=0.5
    ),
)
def minference(
    vertical: int = 1000,
    slash: int = 6096,
    first: int = 30,
    nearest: int = 100,
    sink: int = 100,
    window: int = 800,
    tokens: int = 6400,
    last: int = 64,
    block: int = 128,
    min_recall: float = 0.9,
    min_tokens: int = 0,
) -> Policy:
    """Each head takes the cheapest of A-shape, vertical-slash and block-sparse that holds enough of its attention.

    A-shape: `sink` and `window`. Vertical-slash: see `vertical_slash`. Block-sparse: per query block the `tokens` /
    `block` key blocks whose mean key fits the mean query best. The paper fixes a head's pattern offline, by the
    attention it retains at equal cost on one example; here every prompt decides, by the share of the last `last`
    queries' attention: the fewest blocks that reach `min_recall`, and all blocks where no pattern does.
    """
    pattern = MInference(
        vertical=vertical, slash=slash, first=first, nearest=nearest, sink=sink, window=window, tokens=tokens,
        sample=last, block=block, min_recall=min_recall, min_tokens=min_tokens,
    )  # fmt: skip
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
