"""LLSA."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.hierarchy import PooledLevels


@method(
    title="Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers",
    arxiv="2512.16615",
    tiny=dict(read=16, block=4),
)
def llsa(
    read: int | float = 128,
    block: int = 16,
    overlap: bool = False,
    skip_layers: int = 0,
    over: str = "softmax_max",
) -> Policy:
    """Coarse-to-fine top-k over mean keys, the coarse levels attended as weighted entries beside the fine blocks.

    Levels pool `block` and `block`**2 entries; the coarse blocks that are opened, and the fine blocks that are read inside them,
    are read / block of each (8 in the paper, which trains non-causal models with it). A pooled entry weighs as many as it
    stands for: logit + log(n). overlap: count what is read in the coarse levels as well, as published. A group of query heads
    shares one choice, by its largest softmax (the paper has no grouped queries).
    """
    selector = PooledLevels(read, 0, 1, skip_layers, block=block, overlap=overlap, over=over)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
