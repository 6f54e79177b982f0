"""XAttention."""

from kvjax.policies.base import Policy
from kvjax.policies.prefill_patterns.xattention import XAttention
from kvjax.policies.registry import method


@method(
    title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
    arxiv="2503.16428",
    tiny=dict(stride=2, threshold=0.6, block=4, min_recall=0.5),
)
def xattention(
    stride: int = 16,
    threshold: float = 0.9,
    block: int = 128,
    last: int = 64,
    min_recall: float = 0.9,
    min_tokens: int = 0,
) -> Policy:
    """Every query block reads the fewest key blocks that hold `threshold` of its estimated attention.

    The logit of a tile of `stride` x `stride` is the mean over its antidiagonal, one product of concatenated tokens:
    1 / stride of the work of all logits. Softmax over the tiles, summed per block; the first and the diagonal block are
    always read. Thresholds per head, which the authors calibrate, are not included. min_recall is measured on the last
    `last` queries; see `PrefillPattern`.
    """
    pattern = XAttention(
        stride=stride,
        threshold=threshold,
        sample=last,
        block=block,
        min_recall=min_recall,
        min_tokens=min_tokens,
    )
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
