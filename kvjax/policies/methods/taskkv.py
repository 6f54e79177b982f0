"""Task-KV."""

from kvjax.policies.allocators.heads import SemanticHeads
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import WindowAttention


@method(
    title="Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
    arxiv="2501.15113",
    tiny=dict(window=4, top=8, sink=2, recent=4),
)
def taskkv(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    sink: int | None = None,
    recent: int | None = None,
    beta: float = 0.25,
    m: int = 1,
    window: int = 32,
    top: int = 256,
) -> Policy:
    """Heads far from the layer's semantic centre keep everything; others keep sinks, recents and middle activations.

    f(r) = beta H - (beta H - m) r / (R-1) farthest heads of layer r, and the closest one; see SemanticHeads. Middle
    activations: largest mean window attention, average-pooled over 7. 16 sinks and 256 recents, as in the paper;
    KV heads take the role of its heads. Where the budget cannot hold a full head, fewer are full.
    """
    if not 0.0 <= beta <= 1.0 or min(m, window, top) < 1:
        raise ValueError(
            f"taskkv: beta must be in [0, 1] and m, window, top positive, got {beta}, {m}, {window}, {top}"
        )
    own = Policy(scorer=WindowAttention(window, 7, "avg"), budget=0.5, sink=16, recent=256)
    inner = scoring("taskkv", scorer, own)
    fields = {k: v for k, v in (("sink", sink), ("recent", recent)) if v is not None}
    return wrap(inner, scorer is not None, budget, allocator=SemanticHeads(beta, m, window, top), **fields)
