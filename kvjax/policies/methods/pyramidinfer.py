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
    (newest); layer l keeps in proportion to prod_{m<=l} ((1-p)(cos(pi m / L) + 1)/2 + p), mean = budget. The paper
    also drops the hidden states of evicted tokens inside prefill; here every layer sees the whole prompt, so this
    is its scorer and layer schedule.
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
