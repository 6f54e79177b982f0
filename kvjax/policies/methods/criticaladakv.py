"""CriticalAdaKV."""

from kvjax.policies.allocators.adaptive import HeadCompetition
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.wrappers import HeadPerturbation


@method(
    title="Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective (with Ada-KV)",
    arxiv="2502.03805",
    tiny=dict(scorer=snapkv(window=4, kernel=3)),
)
def criticaladakv(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    alpha: float = 0.2,
    share: float = 0.5,
    epsilon: float = 1e-4,
) -> Policy:
    """Heads compete for the layer's budget by score; inside each head CriticalKV's two stages choose the entries.

    b_h = Ada-KV's count (each head is sure of its best alpha share); the best int(share * b_h) stay by score, the rest
    by (s + epsilon) * mean_group ||v Wo[h]||_1. Any scorer of positive scores, snapkv by default. Unlike
    criticalkv(...) | adakv, the norms do not move entries from head to head. Sinks and recent entries are counted in
    b_h where the scorer ranks them first, as snapkv does its window. Decoding does not evict.
    """
    if not 0.0 <= alpha <= 1.0 or not 0.0 <= share <= 1.0:
        raise ValueError(f"criticaladakv: alpha and share must be in [0, 1], got {alpha} and {share}")
    inner = scoring("criticaladakv", scorer, snapkv())
    assert inner.scorer is not None
    two_stages = HeadPerturbation(inner.scorer, alpha, share, epsilon)
    return wrap(inner, True, budget, scorer=two_stages, allocator=HeadCompetition(alpha), evict_decode=False)
