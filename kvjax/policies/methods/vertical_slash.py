"""Vertical-slash prefill."""

from kvjax.policies.base import Policy
from kvjax.policies.prefill_patterns.vertical_slash import VerticalSlash
from kvjax.policies.registry import method


@method(
    title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (vertical-slash)",
    arxiv="2407.02490",
    tiny=dict(vertical=2, slash=4, first=1, nearest=2, last=4, block=4, min_recall=0.3),
)
def vertical_slash(
    vertical: int = 1000,
    slash: int = 6096,
    first: int = 30,
    nearest: int = 100,
    last: int = 64,
    block: int = 128,
    min_recall: float = 0.9,
    min_tokens: int = 0,
) -> Policy:
    """Every head reads the columns and diagonals that its last queries attend to most.

    p = softmax(q k^T) of the last `last` queries over all keys; the `vertical` columns of largest sum (the first
    `first` positions always) and the `slash` distances of largest diagonal sum (the `nearest` always). A chosen column
    or diagonal brings the blocks that it crosses: the authors' kernel gathers single columns instead, so that widely
    scattered columns cost more here. min_recall, min_tokens: see `PrefillPattern`.
    """
    pattern = VerticalSlash(
        vertical=vertical, slash=slash, first=first, nearest=nearest, sample=last, block=block,
        min_recall=min_recall, min_tokens=min_tokens,
    )  # fmt: skip
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
