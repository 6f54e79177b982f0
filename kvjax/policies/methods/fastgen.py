"""FastGen."""

from kvjax.policies.allocators.heads import Structure
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.temporal import StructureOrder


@method(
    title="Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs",
    arxiv="2310.01801",
    tiny=dict(special=2, rows=8, threshold=0.8),
)
def fastgen(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    threshold: float = 0.95,
    frequent: float = 0.3,
    local: float = 0.3,
    special: int = 4,
    rows: int = 64,
) -> Policy:
    """Each head takes the cheapest structure that recovers its attention: special, frequent, local tokens, or all.

    rec = mean_i sum_{j in C_i} A[i, j] on the last `rows` prompt queries, mean over the query group; the first
    structure with rec >= threshold wins; see Structure. How much a head keeps is an outcome: budget is the ceiling
    of a layer, and what its heads do not ask for stays free. Special tokens are the first `special`; punctuation
    needs token ids, which attention does not see.
    """
    if not all(0.0 <= x <= 1.0 for x in (threshold, frequent, local)) or special < 0 or rows < 1:
        raise ValueError("fastgen: threshold, frequent and local must be in [0, 1], special >= 0, rows >= 1")
    profile = Structure(threshold, frequent, local, special, rows)
    own = Policy(scorer=StructureOrder(profile), budget=0.5, sink=special, recent=1)
    return wrap(scoring("fastgen", scorer, own), scorer is not None, budget, allocator=profile)
