"""PyramidKV."""

from kvjax.policies.allocators.pyramid import Pyramid
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method


@method(
    title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arxiv="2406.02069",
    tiny=dict(scorer=snapkv(window=4, kernel=3), beta=4),
)
def pyramidkv(
    scorer: Policy | str | None = None, budget: Budget | None = None, beta: int = 20, variant: str = "paper"
) -> Policy:
    """SnapKV's entries, more of them in lower layers: budgets fall linearly with depth, heads of a layer alike.

    With w protected entries, b = budget - w and n prompt tokens: lo = b // beta, hi = 2b - lo, hi at most n - w,
    b_l linear from hi to lo. Their sum is the budget exactly; the authors' floored step overspends by up to
    L (L-1) / 2. variant='kvpress': kvpress' arithmetic (window not subtracted, float steps).
    """
    if beta < 1:
        raise ValueError(f"pyramidkv: beta must be at least 1, got {beta}")
    if variant not in ("paper", "kvpress"):
        raise ValueError(f"pyramidkv: variant must be paper or kvpress, got {variant!r}")
    inner = scoring("pyramidkv", scorer, snapkv())
    return wrap(inner, scorer is not None, budget, allocator=Pyramid(beta, variant))
