"""A-shape prefill."""

from kvjax.policies.base import Policy
from kvjax.policies.prefill_patterns.static import AShape
from kvjax.policies.registry import method


@method(
    title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (A-shape)",
    arxiv="2407.02490",
    tiny=dict(sink=2, window=9, block=8),
)
def a_shape(
    sink: int = 128, window: int = 3968, block: int = 128, min_recall: float = 0.0, min_tokens: int = 0
) -> Policy:
    """Every query of a prompt reads the first `sink` tokens and the `window` before it; nothing is evicted.

    Sizes are SCBench's (arXiv 2412.10319), rounded up to blocks. min_recall: heads whose last queries find less than
    this share of their attention in the pattern read everything. min_tokens: see `PrefillPattern`.
    """
    pattern = AShape(sink=sink, window=window, block=block, min_recall=min_recall, min_tokens=min_tokens)
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
