"""SimLayerKV."""

from kvjax.policies.allocators.threshold import Threshold
from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.windows import LazyLayer


@method(
    title="SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction",
    arxiv="2410.13846",
    tiny=dict(threshold=0.4, recent=10, initial=2),
)
def simlayerkv(
    threshold: float = 0.9, last: int = 1, recent: int = 1024, initial: int = 4, cap: Budget = 1.0
) -> Policy:
    """Layers whose newest queries look only at the sinks and the recent tokens keep only those; others keep all.

    lazy = attention of the last `last` queries (mean over heads) on the first `initial` and the `recent` tokens
    > threshold, decided per row (kvpress: per batch); lazy layers keep `initial` + `recent` - `last` tokens.
    threshold 1.0 never compresses; the paper suggests 0.9 (Llama 3), 0.8 (Mistral). cap bounds a layer's
    entries, and the memory that is allocated.
    """
    if recent <= last:
        raise ValueError(f"simlayerkv: recent must exceed last, got {recent} and {last}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"simlayerkv: threshold must be in [0, 1], got {threshold}")
    return Policy(
        scorer=LazyLayer(threshold, last, recent, initial),
        allocator=Threshold(0.0),
        budget=cap,
        explicit=frozenset({"scorer", "allocator"}),
    )
