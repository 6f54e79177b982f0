"""Quantized pruning."""

from kvjax.codecs.quantizers import Affine, Pair
from kvjax.policies.base import Policy
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method


@method(
    title="More Tokens, Lower Precision: Towards the Optimal Token-Precision Trade-off in KV Cache Compression",
    arxiv="2412.12706",
    tiny=dict(pruner=snapkv(window=4, kernel=3), group=4),
)
def quantized_pruning(
    pruner: Policy | None = None, budget: Budget = 0.5, bits: int = 4, group: int = 64, residual: int = 0
) -> Policy:
    """Prune tokens with `pruner` (snapkv when omitted), store the survivors at `bits` bits.

    At equal bytes this keeps 16 / (bits + 32 / group) times the tokens, which the paper finds better than fewer
    exact ones. `budget` counts tokens, as everywhere. Codes are asymmetric per token over `group` channels, so that
    every pruner composes, those that evict while decoding too; the authors use HQQ groups along the channel.
    """
    if not isinstance(pruner, Policy | None):
        raise ValueError(
            f"quantized_pruning: pruner must be a policy such as snapkv(window=32), got {pruner!r}"
        )
    chosen = snapkv() if pruner is None else pruner
    if chosen.scorer is None:
        raise ValueError(
            f"quantized_pruning: {chosen.name} removes no entries; choose a method with a budget"
        )
    part = Affine(bits, group)
    return Policy(
        scorer=chosen.scorer,
        allocator=chosen.allocator,
        selection=chosen.selection,
        reducer=chosen.reducer,
        budget=budget,
        sink=chosen.sink,
        recent=chosen.recent,
        evict_decode=chosen.evict_decode,
        codec=Pair(part, part, residual),
        explicit=frozenset({"scorer", "codec"}),
    )
