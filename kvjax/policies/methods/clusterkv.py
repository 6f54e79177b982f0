"""ClusterKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.clusters import Clusters


@method(
    title="ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression",
    arxiv="2412.03213",
    tiny=dict(read=12, per=4, sink=2, flush=4, into=2, skip_layers=0),
)
def clusterkv(
    read: int | float = 1024,
    per: int = 80,
    sink: int = 16,
    skip_layers: int = 2,
    flush: int = 320,
    into: int = 4,
    rounds: int = 20,
    over: str = "softmax_max",
) -> Policy:
    """Whole clusters of similar keys in order of q.centroid, the last one cut at the budget; nothing is evicted.

    The prompt's keys but the first `sink` are clustered by direction, `per` entries a cluster; a centroid is the mean
    key. Generated entries are read until `flush` of them are clustered alone, `into` clusters. The paper clusters per
    KV head and chooses per query head; here a group shares one choice, by the largest softmax over the centroids.
    """
    selector = Clusters(read, sink, 1, skip_layers, per=per, rounds=rounds, flush=flush, into=into, over=over)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
