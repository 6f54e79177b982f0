"""KVMerger."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.h2o import h2o
from kvjax.policies.reducers.compensation import Counted
from kvjax.policies.reducers.neighbours import GaussianSets
from kvjax.policies.registry import Budget, method


@method(
    title="Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks",
    arxiv="2407.08454",
    tiny=dict(scorer=h2o(recent=4)),
)
def kvmerger(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    threshold: float = 0.75,
    counted: bool = False,
) -> Policy:
    """Runs of adjacent tokens with similar keys are merged, with Gaussian weights, into their heavy hitters.

    A run grows while cos(k_i, k_(i+1)) >= threshold; survivors (h2o's by default) are the pivots, and a loser joins the
    nearest pivot of its run or vanishes; see GaussianSets. The paper lets the runs decide the number of entries; here
    the budget does. The paper multiplies a merged value by its run's size; counted=True adds the log of the size to the
    pivot's logit instead, False does neither. The prompt is merged once; generated tokens are appended.
    """
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"kvmerger: threshold is a cosine in [-1, 1], got {threshold}")
    inner = scoring("kvmerger", scorer, h2o(evict_decode=False))
    parts: dict = {"reducer": GaussianSets(threshold, counted)}
    if counted:
        parts["scorer"] = Counted(inner.scorer)
    return wrap(inner, scorer is not None, budget, **parts)
