"""CAKE."""

from kvjax.policies.allocators.layers import Preference
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.temporal import MeanVariance


@method(
    title="CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
    arxiv="2503.12491",
    tiny=dict(window=4, kernel=3),
)
def cake(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    window: int = 32,
    kernel: int = 5,
    gamma: float = 200.0,
    tau1: float = 1.0,
    tau2: float = 1.0,
    ceiling: int | None = None,
    evict_decode: bool | None = None,
) -> Policy:
    """Layers share the budget by how dispersed and how changing their attention is; entries by mean and variance.

    P_l = H^(1/tau1) V^(1/tau2) of the window's attention (entropy, variance over queries); b_l in proportion.
    score = avgpool_kernel( mean_i A + gamma Var_i A ), mean over the group. A whole prompt cascades as the authors' does:
    the layers so far share the budget of all, and every new layer shrinks those before it, so that no more than the
    budget and one layer is ever held. So does a chunk of a prompt, which the paper does not treat: the layers share the
    budget anew by what the chunk's own window says, and twice the budget and one layer are held. Codecs of groups,
    selectors, merging and rerotate wait for the last layer instead, which keeps the same entries up to rounding. No layer
    keeps more than ceiling times the mean, which also bounds what waits. Decoding evicts by the new query's attention.
    """
    if window < 2 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"cake: window must be at least 2 and kernel odd, got window={window}, kernel={kernel}"
        )
    if min(tau1, tau2) <= 0 or gamma < 0:
        raise ValueError(
            f"cake: tau1 and tau2 must be positive and gamma not negative, got {tau1}, {tau2}, {gamma}"
        )
    if ceiling is not None and ceiling < 1:
        raise ValueError(f"cake: ceiling must be at least 1, got {ceiling}")
    own = Policy(scorer=MeanVariance(window, kernel, gamma), budget=0.5, recent=window, evict_decode=True)
    inner = scoring("cake", scorer, own)
    fields = {} if evict_decode is None else {"evict_decode": evict_decode}
    return wrap(
        inner, scorer is not None, budget, allocator=Preference(window, tau1, tau2, ceiling), **fields
    )
