"""Entropy-gated ChunkKV."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method
from kvjax.policies.selections.chunks import EntropyGatedChunks


@method(
    title="ChunkKV with chunks gated by the entropy of their scores (kvpress)",
    arxiv="",
    tiny=dict(scorer=snapkv(window=4, kernel=3), chunk=4, reduced=2),
)
def entropy_gated_chunkkv(
    scorer: Policy | str | None = None, budget: Budget | None = None, chunk: int = 10, reduced: int = 4
) -> Policy:
    """ChunkKV, but a good chunk whose score sits in few tokens contributes only its best `reduced` tokens.

    Chunks are visited by falling mean score; one at or above the median score and below the median entropy
    H = -sum p log p / log(size) is reduced. The budget is met exactly; what is left goes to the best tokens.
    """
    if not 1 <= reduced < chunk:
        raise ValueError(f"entropy_gated_chunkkv: 1 <= reduced < chunk is needed, got {reduced} and {chunk}")
    inner = scoring("entropy_gated_chunkkv", scorer, snapkv())
    return wrap(inner, scorer is not None, budget, selection=EntropyGatedChunks(chunk, reduced))
