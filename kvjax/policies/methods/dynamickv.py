"""DynamicKV."""

from kvjax.policies.allocators.layers import GlobalTop
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method


@method(
    title="DynamicKV: Task-Aware Adaptive KV Cache Compression for Long Context LLMs",
    arxiv="2412.14838",
    tiny=dict(scorer=snapkv(window=4, kernel=3)),
)
def dynamickv(scorer: Policy | str | None = None, budget: Budget | None = None, rho: int = 10) -> Policy:
    """Scores of all layers compete in one global top-k; a layer's budget is its share of the winners.

    k = the budget of all layers and heads without the window; B_l in proportion to layer l's winners, at most rho
    times the mean (the authors' buffer). Scorer: snapkv (window 8, kernel 7) unless another is given.
    """
    if rho < 1:
        raise ValueError(f"dynamickv: rho must be at least 1, got {rho}")
    inner = scoring("dynamickv", scorer, snapkv(window=8, kernel=7))
    return wrap(inner, scorer is not None, budget, allocator=GlobalTop(rho))
