"""Accurate block quantization."""

from kvjax.codecs.levels import BlockFloat
from kvjax.codecs.quantizers import Pair
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(title="Accurate Block Quantization in LLMs with Outliers", arxiv="2403.20137", tiny=dict(block=4))
def bfp(bits: int = 4, block: int = 32, residual: int = 0, sink: int = 0) -> Policy:
    """Block floating point: `bits`-bit signed mantissas, one 8-bit power of two per `block` channels of a token.

    s = 2^(floor(log2 max|x|) - bits + 2), x' = clip(round(x / s)) s. The paper sorts key channels by the norm of
    their weights so that outliers share blocks, an exact permutation that is folded into the weights; it encodes
    keys only, values are encoded alike here.
    """
    part = BlockFloat(bits, block)
    return Policy(codec=Pair(part, part, residual, sink), explicit=frozenset({"codec"}))
