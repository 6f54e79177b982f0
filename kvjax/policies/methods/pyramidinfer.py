"""PyramidInfer."""

from kvjax.policies.allocators.cosine import CosineDecay
from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.windows import RecentWeighted


@method(
    title="PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference",
    arxiv="2405.12532",
    tiny=dict(sink=2),
)
def pyramidinfer(
    budget: Budget = 0.5, share: float = 0.2, delta: float = 1.2, p: float = 0.9, sink: int = 4
) -> Policy:
    """Entries that the newest fifth of the prompt attends to, one set for all heads, fewer in deeper layers.

    score[j] = mean over heads and over the last 1 + share * n queries of A[i, j], weighted 1 (oldest) to `delta`
    (newest); those queries' own entries and the sinks always stay. Layer l keeps in proportion to
    prod_{m<=l} ((1-p)(cos(pi m / L) + 1)/2 + p), mean = budget.

    Not followed: in the paper a layer hands on only the hidden states of the tokens it kept, so that prefill shrinks and
    the sets of layers are nested. Here hidden states belong to the model, which runs projections and feed-forward layers
    over all tokens of a call and knows nothing of caches (`kvjax.types`); attention can leave out keys, but not rows of
    its output. Every layer therefore sees the whole prompt and chooses freely: the scorer and the layer schedule are the
    paper's, the saving in prefill is not. Generated tokens are appended; the paper thins out blocks of them.
    """
    if not 0.0 <= p <= 1.0 or not 0.0 <= share <= 1.0:
        raise ValueError(f"pyramidinfer: p and share must be in [0, 1], got {p} and {share}")
    return Policy(
        scorer=RecentWeighted(share, delta),
        allocator=CosineDecay(p),
        budget=budget,
        sink=sink,
        explicit=frozenset({"scorer", "allocator"}),
    )
