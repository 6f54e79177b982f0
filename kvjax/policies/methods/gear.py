"""GEAR."""

from kvjax.codecs.quantizers import Affine, Pair
from kvjax.codecs.wrappers import LowRank, Outliers
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM",
    arxiv="2403.05527",
    tiny=dict(group=8, residual=8, rank=1, bits=4),
)
def gear(
    bits: int = 2, group: int = 64, rank: int = 2, outliers: int = 1, residual: int = 64, sink: int = 0
) -> Policy:
    """X ~ Quant(X - S) + S + A B^T: codes, sparse outliers, and a low-rank fit of the error that is left.

    Keys per channel over `group` tokens and values per token over `group` channels; S keeps the `outliers` largest and smallest of
    every such vector in float16; A B^T has rank `rank` per head and per `group` tokens, found by power iteration.
    `group` tokens are encoded together when the window of `residual` is full. outliers=0: GEAR-L.
    """
    if outliers < 0 or rank < 0:
        raise ValueError(f"gear: outliers and rank cannot be negative, got {outliers} and {rank}")
    k, v = Affine(bits, group, "channel"), Affine(bits, group)
    if outliers:
        k, v = Outliers(k, outliers, "channel", group), Outliers(v, outliers)
    if rank:
        k, v = LowRank(k, rank, group), LowRank(v, rank, group)
    return Policy(codec=Pair(k, v, residual, sink), explicit=frozenset({"codec"}))
