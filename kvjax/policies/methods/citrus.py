"""CItruS."""

from kvjax.policies.base import Policy
from kvjax.policies.probes import Fixed
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.windows import PromptGuided


@method(
    title="CItruS: Chunked Instruction-aware State Eviction for Long Sequence Modeling",
    arxiv="2406.12018",
    tiny=dict(instruction=(3, 5, 7), recent=4),
)
def citrus(
    budget: Budget = 0.5, instruction: tuple[int, ...] = (), window: int = 32, recent: int = 32
) -> Policy:
    """Entries that the instruction attends to are kept, chunk after chunk, one set for all heads of a layer.

    The instruction's token ids run against the cache after every chunk (chunked prefill) and are forgotten;
    score[j] = mean over heads and instruction tokens of A[i, j]. Without an instruction the last `window` tokens of
    the chunk ask instead (the paper's standard mode). The paper keeps the newest chunk on top of the budget; here
    `recent` entries within it. Keys keep their positions (the paper renumbers them).
    """
    return Policy(
        scorer=PromptGuided(len(instruction) or window, normalize=False, shared=True),
        probe=Fixed(tuple(instruction)) if instruction else None,
        budget=budget,
        recent=recent,
        explicit=frozenset({"scorer", "probe"}),
    )
