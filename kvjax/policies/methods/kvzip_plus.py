"""KVzip+."""

from kvjax.policies.base import Policy
from kvjax.policies.methods.kvzip import reconstruction
from kvjax.policies.registry import Budget, method


@method(
    title="KVzap: Fast, Adaptive, and Faithful KV Cache Pruning (KVzip+ scores)",
    arxiv="2601.07891",
    tiny=dict(chunk=16, overlap=2, sink=2),
)
def kvzip_plus(
    budget: Budget = 0.5,
    chunk: int = 2048,
    overlap: int = 8,
    prefix: tuple[int, ...] = (),
    sink: int = 4,
    layerwise: bool = False,
) -> Policy:
    """KVzip with attention weighed by how much the value changes the repeating token's residual stream.

    score = max over group and repeat queries of A[h, i, j] ||v_j Wo[h]||_2 / ||x_i||_2, x_i the attention input of
    the query. Otherwise as kvzip; sinks are protected here (in kvpress their preset 1.0 can be outscored).
    """
    return reconstruction("kvzip_plus", budget, chunk, overlap, prefix, sink, layerwise, plus=True)
