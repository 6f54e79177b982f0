"""DMS thresholds."""

from kvjax.policies.allocators.threshold import Threshold
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.lagkv import lagkv
from kvjax.policies.registry import Budget, method


@method(
    title="Inference-Time Hyper-Scaling with KV Cache Compression (thresholds, no trained evictor)",
    arxiv="2506.05345",
    tiny=dict(scorer=lagkv(lag=4, sink=2), window=4),
)
def dms(
    scorer: Policy | str | None = None, threshold: float = 0.5, window: int = 128, cap: Budget = 1.0
) -> Policy:
    """Entries that score below `threshold` are evicted once they leave the newest `window`; the rest stays.

    Compression is an outcome: heads keep what passes. The scorer must judge tokens one by one (lagkv by default,
    whose ranks lie in [0, 1]; kvpress uses the trained KVzap). cap bounds the entries of a layer, and the memory
    that is allocated: where more pass, the lowest go too.
    """
    inner = scoring("dms", scorer, lagkv())
    return wrap(
        inner, scorer is not None, cap, allocator=Threshold(threshold), recent=window, evict_decode=False
    )
