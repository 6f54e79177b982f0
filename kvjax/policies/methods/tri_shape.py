"""Tri-shape prefill."""

from kvjax.policies.base import Policy
from kvjax.policies.prefill_patterns.static import AShape
from kvjax.policies.registry import method


@method(
    title="SCBench: A KV Cache-Centric Analysis of Long-Context Methods (tri-shape)",
    arxiv="2412.10319",
    tiny=dict(sink=2, window=9, last=3, block=8),
)
def tri_shape(
    sink: int = 128,
    window: int = 3968,
    last: int = 100,
    block: int = 128,
    min_recall: float = 0.0,
    min_tokens: int = 0,
) -> Policy:
    """A-shape whose last `last` queries read the whole prompt.

    The block that holds one of them is dense as a whole. The other arguments: `a_shape`.
    """
    pattern = AShape(
        sink=sink, window=window, last=last, block=block, min_recall=min_recall, min_tokens=min_tokens
    )
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
