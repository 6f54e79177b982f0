"""int4 storage."""

from kvjax.codecs.quantizers import Affine, Pair
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(title="int4 keys and values per token", arxiv="", tiny=dict(group=4))
def int4(group: int = 32, residual: int = 0, sink: int = 0) -> Policy:
    """Asymmetric 4-bit codes per token over `group` channels, float16 scale and zero.

    x' = code * s + min, |x - x'| <= s / 2 with s = (max - min) / 15. Without a window any method may evict single
    entries, while decoding too; for the fused kernel and keys per channel use kivi(bits=4). residual, sink: newest
    and first entries that stay in the model's dtype.
    """
    return Policy(
        codec=Pair(Affine(4, group), Affine(4, group), residual, sink), explicit=frozenset({"codec"})
    )
