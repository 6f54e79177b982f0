"""RetroInfer."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.clusters import ThreeZones


@method(
    title="RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference",
    arxiv="2505.02922",
    tiny=dict(read=12, per=4, sink=2, recent=4, flush=8, into=2),
)
def retroinfer(
    read: int | float = 0.035,
    estimated: float = 0.232,
    per: int = 16,
    sink: int = 4,
    recent: int = 64,
    skip_layers: int = 0,
    flush: int = 1024,
    into: int = 64,
    rounds: int = 10,
) -> Policy:
    """The best clusters exactly, the next `estimated` of them as one weighted entry each, the rest not at all.

    A cluster that is not read has the logit q.centroid + log(size) and its mean value. read: the static entries (`sink`,
    `recent`) and the clusters that are read, 1.8% of the entries in the paper. Clusters have `per` entries; keys less
    their mean are clustered by direction, all at once (the paper: in segments of 8k). A group of query heads shares one
    choice by its mean softmax over the centroids, as in the paper (their sum).
    """
    selector = ThreeZones(
        read, sink, recent, skip_layers, per=per, rounds=rounds, flush=flush, into=into, estimated=estimated
    )
    return Policy(selector=selector, explicit=frozenset({"selector"}))
