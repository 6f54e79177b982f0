"""InfLLM."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.blocks import Representatives


@method(
    title="InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
    arxiv="2402.04617",
    tiny=dict(read=16, block=4, best=2, local=8, sink=4),
)
def infllm(
    read: int | float = 6272,
    block: int = 128,
    best: int = 4,
    local: int = 4096,
    sink: int = 128,
    recent: int | None = None,
    skip_layers: int = 0,
) -> Policy:
    """Sinks, a local window, and the blocks whose representative key is nearest to the query; one set for all heads.

    A block's representative is the mean of its `best` tokens of largest attention from the `local` tokens after them, of
    keys before RoPE; queries meet it at distance `local`. All query heads add up to one choice of blocks. read: 16 blocks, sinks
    and window in the paper. recent: entries always read (None: `local`, or half of `read` where that is less; of a
    fraction, one block). Attention itself keeps true positions: the contexts here are within the model's own.
    """
    if recent is None:
        recent = min(local, read // 2) if isinstance(read, int) else block
    selector = Representatives(read, sink, max(1, recent), skip_layers, block=block, best=best, local=local)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
