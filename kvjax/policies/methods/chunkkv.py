"""ChunkKV."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method
from kvjax.policies.selections.chunks import Chunks


@method(
    title="ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
    arxiv="2502.00299",
    tiny=dict(scorer=snapkv(window=4, kernel=3), chunk=4),
)
def chunkkv(scorer: Policy | str | None = None, budget: Budget | None = None, chunk: int = 10) -> Policy:
    """Whole chunks of `chunk` neighbouring tokens are kept, the same for all heads, so that phrases stay intact.

    Chunk score = mean over its tokens of the scorer's score (snapkv by default), summed over heads; the best
    chunks that fit the budget stay (paper: floor(budget / chunk) of them; kvpress counts
    max(1, int(chunks * ratio)) instead, which may exceed the budget by part of a chunk).
    """
    if chunk < 1:
        raise ValueError(f"chunkkv: chunk must be at least 1 token, got {chunk}")
    inner = scoring("chunkkv", scorer, snapkv())
    return wrap(inner, scorer is not None, budget, selection=Chunks(chunk))
