"""Squeezed Attention."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.squeezed import CentroidThreshold


@method(
    title="Squeezed Attention: Accelerating Long Context Length LLM Inference",
    arxiv="2411.09688",
    tiny=dict(read=12, per=4, coarse_per=8, window=4, percentile=0.5, coarse_percentile=0.2),
)
def squeezed(
    read: int | float = 0.2,
    percentile: float = 0.9,
    coarse_percentile: float = 0.5,
    per: int = 20,
    coarse_per: int = 100,
    window: int = 100,
    skip_layers: int = 0,
    rounds: int = 20,
) -> Policy:
    """Entries whose cluster's share of the softmax over clusters is above a threshold set by the prompt itself.

    S_c = exp(q.mu_c) / sum_j N_j exp(q.mu_j); a token of cluster c is read when S_c is at least the `percentile` quantile
    that the prompt's last `window` queries gave, so that heads read different numbers; `read` caps them. Clusters have
    `per` entries, and clusters of clusters `coarse_per`, which are looked up first. One threshold serves a layer (the
    paper: the model). The paper has no grouped queries; here a group shares the mean of S. read=1.0 reads everything.
    """
    selector = CentroidThreshold(
        read,
        0,
        window,
        skip_layers,
        per=per,
        coarse_per=coarse_per,
        percentile=percentile,
        coarse_percentile=coarse_percentile,
        window=window,
        rounds=rounds,
    )
    return Policy(selector=selector, explicit=frozenset({"selector"}))
