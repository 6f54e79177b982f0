"""CriticalKV."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.wrappers import OutputPerturbation


@method(
    title="Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
    arxiv="2502.03805",
    tiny=dict(scorer=snapkv(window=4, kernel=3)),
)
def criticalkv(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    share: float = 0.5,
    epsilon: float = 1e-4,
) -> Policy:
    """Half of the budget by the scorer, the other half by its score times the size of the value in the output.

    Stage 1 takes the best int(share * budget) entries; stage 2 ranks the rest by (s + epsilon) * N with
    N = mean_group ||v Wo[h]||_1. Any scorer (snapkv by default); scores should be positive, because with negative
    ones (l2norm, keydiff) a larger norm lowers the rank. criticalkv(...) | adakv lets heads compete as well.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"criticalkv: share must be in [0, 1], got {share}")
    inner = scoring("criticalkv", scorer, snapkv())
    return wrap(inner, True, budget, scorer=OutputPerturbation(inner.scorer, share, epsilon))
