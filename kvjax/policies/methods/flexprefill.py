"""FlexPrefill."""

from kvjax.policies.base import Policy
from kvjax.policies.prefill_patterns.flexprefill import FlexPrefill
from kvjax.policies.registry import method


@method(
    title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    arxiv="2502.20766",
    tiny=dict(gamma=0.6, tau=0.3, min_budget=4, last=4, block=4, min_recall=0.3),
)
def flexprefill(
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 512,
    max_budget: int = 0,
    last: int = 128,
    block: int = 128,
    min_recall: float = 0.9,
    min_tokens: int = 0,
) -> Policy:
    """Each head reads as much as the share `gamma` of its attention asks for, in one of two patterns.

    With a = the last `last` queries' attention summed per key block and b = softmax(mean query . mean keys of the
    blocks), a head with sqrt(JSD(a, b)) < `tau` is query-aware: the pooled attention map of all rows is cut where its
    largest entries sum to gamma. Other heads are vertical-slash: n tokens hold gamma of the column (diagonal) mass, so
    the n // block + 1 best column (diagonal) blocks are read, at least `min_budget` and at most `max_budget` tokens
    (0: no limit). min_recall: see `PrefillPattern`.
    """
    pattern = FlexPrefill(
        gamma=gamma, tau=tau, min_budget=min_budget, max_budget=max_budget, sample=last, block=block,
        min_recall=min_recall, min_tokens=min_tokens,
    )  # fmt: skip
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
