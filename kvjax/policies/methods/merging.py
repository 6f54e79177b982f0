"""Merging."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.keydiff import keydiff
from kvjax.policies.reducers.similar import MergeValues
from kvjax.policies.registry import Budget, method


@method(title="Merge-on-evict (after Token Merging: Your ViT But Faster)", arxiv="2210.09461")
def merging(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    threshold: float = 0.0,
    fraction: float = 1.0,
) -> Policy:
    """The values of evicted entries are folded into the survivors with the most similar keys; keys stay.

    w = max(cos, 0) [cos >= threshold] ||v_e|| / (||v_e|| + ||v_t||); v_t <- (v_t + sum w v_e) / (1 + sum w): kvpress'
    MergingPress, with the fraction gate as a quantile over the evicted. Any scorer, keydiff by default; eviction while
    decoding drops.
    """
    if not 0.0 <= threshold <= 1.0 or not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"merging: threshold must be in [0, 1], fraction in (0, 1], got {threshold}, {fraction}"
        )
    inner = scoring("merging", scorer, keydiff())
    return wrap(inner, scorer is not None, budget, reducer=MergeValues(threshold, fraction))
