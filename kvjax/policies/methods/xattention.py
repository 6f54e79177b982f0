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
    spread: bool = False,
    min_tokens: int = 0,
) -> Policy:
    """Every query block reads the fewest key blocks that hold `threshold` of its estimated attention.

    The logit of a tile of `stride` x `stride` is the mean over its antidiagonal, one product of concatenated tokens:
    1 / stride of the work of all logits. Softmax over the tiles, summed per block; the first and the diagonal block are
    always read. Thresholds per head, which the authors calibrate, are not included. min_recall: heads that recall less
    read everything, see `PrefillPattern`; measured on the last `last` queries, or with `spread` on as many from the whole
    prompt. Blocks that hold 0.9 of the estimate recall about 0.9, so that half of the heads miss min_recall=0.9:
    threshold=0.97, min_recall=0.85, spread=True reads fewer blocks and recalls more.
    """
    pattern = XAttention(
        stride=stride,
        threshold=threshold,
        sample=last,
        block=block,
        min_recall=min_recall,
        spread=spread,
        min_tokens=min_tokens,
    )
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
