"""Chelsea."""

from kvjax.policies.base import Policy
from kvjax.policies.reducers.compensation import Counted
from kvjax.policies.reducers.neighbours import ChunkClusters
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.temporal import Redundancy


@method(
    title="Efficient Long-Context LLM Inference via KV Cache Clustering",
    arxiv="2506.11418",
    tiny=dict(sink=2, recent=4, chunk=8),
)
def chelsea(
    budget: Budget = 0.5, chunk: int = 16, sink: int = 4, recent: int = 32, counted: bool = False
) -> Policy:
    """Similar tokens of a chunk are clustered by soft matching and replaced by their centroids.

    In chunks of `chunk`, even places are sources and odd ones targets; the sources most similar to a target go first,
    then the next round alternates among what is left; see Redundancy. A loser joins the most similar survivor of its
    chunk, which becomes the mean of its cluster; counted=True adds the log of its size to its logit, which the softmax of
    the cluster's tokens asks for (attention then runs in XLA). No code was published: chunk size and rounds are our
    reading, and whether the paper counts is not known. The prompt is clustered once; generated tokens are appended.
    """
    if chunk < 2 or chunk & (chunk - 1):
        raise ValueError(f"chelsea: chunk must be a power of two of at least 2, got {chunk}")
    return Policy(
        scorer=Counted(Redundancy(chunk)) if counted else Redundancy(chunk),
        reducer=ChunkClusters(chunk, counted),
        budget=budget,
        sink=sink,
        recent=recent,
        explicit=frozenset({"scorer", "reducer"}),
    )
