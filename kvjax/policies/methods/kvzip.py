"""KVzip."""

from kvjax.policies.allocators.adaptive import HeadCompetition
from kvjax.policies.allocators.everywhere import GlobalHeads
from kvjax.policies.base import Policy
from kvjax.policies.probes import Repeat
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.probed import Reconstruction


@method(
    title="KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
    arxiv="2505.23416",
    tiny=dict(chunk=16, overlap=2, sink=2),
)
def kvzip(
    budget: Budget = 0.5,
    chunk: int = 2048,
    overlap: int = 8,
    prefix: tuple[int, ...] = (),
    sink: int = 4,
    layerwise: bool = False,
) -> Policy:
    """Entries that the model needs to repeat the context are kept, whatever will be asked about it later.

    After prefill every chunk is run once more behind `prefix` (token ids of a repeat instruction) and the last
    `overlap` tokens before it, against [sinks | chunk | repeated input]; score = max attention over group and
    queries. All layers and heads compete for one budget; layerwise: the heads of each layer.
    """
    return reconstruction("kvzip", budget, chunk, overlap, prefix, sink, layerwise, plus=False)


def reconstruction(
    name: str,
    budget: Budget,
    chunk: int,
    overlap: int,
    prefix: tuple[int, ...],
    sink: int,
    layerwise: bool,
    plus: bool,
) -> Policy:
    """KVzip and KVzip+."""
    if chunk < 1 or overlap < 0:
        raise ValueError(
            f"{name}: chunk must be positive and overlap not negative, got {chunk} and {overlap}"
        )
    return Policy(
        scorer=Reconstruction(sink, plus),
        allocator=HeadCompetition(0.0) if layerwise else GlobalHeads(),
        probe=Repeat(chunk, overlap, tuple(prefix)),
        budget=budget,
        sink=sink,
        explicit=frozenset({"scorer", "allocator", "probe"}),
    )
