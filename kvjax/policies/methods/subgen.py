"""SubGen."""

from kvjax.policies.base import Policy
from kvjax.policies.reducers.compensation import Counted
from kvjax.policies.reducers.sketch import StreamingSketch
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.recency import Recency


@method(
    title="SubGen: Token Generation in Sublinear Time and Memory",
    arxiv="2402.06082",
    tiny=dict(sink=2, recent=4, interval=4),
)
def subgen(
    budget: Budget = 0.5,
    sink: int = 4,
    recent: int = 64,
    copies: int = 1,
    values: float = 0.5,
    radius: float = 0.0,
    interval: int = 16,
    seed: int = 0,
) -> Policy:
    """Outside an exact window, softmax is estimated from clustered keys and values sampled by their norm.

    tau = sum over clusters of n_i / copies * sum e^(q.k) over the cluster's samples, z = sum over value samples of
    mu / (s |v|^2) e^(q.k) v, output z / tau, window and sinks added exactly. Of the slots beside those, the share `values`
    are value samples (s); the others hold clusters of `copies` samples each; see StreamingSketch. The prompt and, every
    `interval` steps, what left the window are streamed in; memory stays at the budget however long the generation is.

    Our reading, as no code was published: the paper bounds the number of clusters by the radius, here the budget does, and
    beyond it a key joins the nearest cluster (radius > 0 opens fewer); keys are clustered after RoPE; what is dropped at
    once opens clusters by greedy k-centre, as in the paper's experiments. Sinks are ours, sink=0 is the paper. Scores
    other than age have no meaning for samples, so the scorer is fixed.
    """
    if copies < 1 or not 0.0 < values < 1.0:
        raise ValueError(f"subgen: copies must be at least 1 and values in (0, 1), got {copies} and {values}")
    reducer = StreamingSketch(copies, values, radius, seed)
    return Policy(
        scorer=Counted(Recency(), reducer),
        reducer=reducer,
        budget=budget,
        sink=sink,
        recent=recent,
        evict_decode=True,
        interval=interval,
        explicit=frozenset({"scorer", "reducer"}),
    )
