"""Block-wise eviction."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.keydiff import keydiff
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.wrappers import Blockwise


@method(
    title="KeyDiff: Key Similarity-Based KV Cache Eviction (block prompt processing)",
    arxiv="2504.15364",
    tiny=dict(block=8),
)
def block(scorer: Policy | str | None = None, budget: Budget | None = None, block: int = 128) -> Policy:
    """Any scorer, applied as if the prompt arrived in blocks under a fixed budget; keydiff by default.

    Survivors start as the first K entries; for every further block the scorer ranks survivors and block, and the
    best K stay. Prefill itself sees the whole prompt (kvpress' simulation); with chunked prefill (--chunk) any
    method does this for real.
    """
    if block < 1:
        raise ValueError(f"block: block must be at least 1 token, got {block}")
    inner = scoring("block", scorer, keydiff())
    return wrap(inner, True, budget, scorer=Blockwise(inner.scorer, block), evict_decode=False)
