"""DuoAttention."""

from kvjax.policies.allocators.heads import HeadRoles
from kvjax.policies.base import Policy
from kvjax.policies.head_scores import head_table
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.recency import Recency


@method(
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    arxiv="2410.10819",
    tiny=dict(heads=((0.1, 0.9), (0.8, 0.2)), sink=2, recent=4),
)
def duoattention(
    budget: Budget | None = None,
    heads: str | tuple[tuple[float, ...], ...] = "kvref-22m",
    sink: int = 64,
    recent: int = 256,
    sparsity: float | None = None,
) -> Policy:
    """Retrieval heads keep everything, streaming heads sinks and a recent window; the roles are learned offline.

    heads: a calibration file with `duo` [layers, kv_heads] (the gates alpha that `launch.calibrate --method=
    duoattention` optimises on synthetic passkeys), the name of a shipped one, or the table itself. sparsity: the
    fraction of heads that stream, lowest alpha first; instead of it, budget=0.5 makes as many heads full as fit and
    widens the windows of the others by what is left. Generated tokens are appended to all heads. kvpress masks
    instead of freeing, with the same sets.
    """
    if sparsity is not None and not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"duoattention: sparsity must be in [0, 1], got {sparsity}")
    if sparsity is not None and budget is not None:
        raise ValueError("duoattention: sparsity and budget exclude each other; the roles decide the size")
    table, file = head_table("duoattention", heads, "duo")
    full = None if sparsity is None else 1.0 - sparsity
    return Policy(
        scorer=Recency(),
        allocator=HeadRoles(table, sink + recent, full, file),
        budget=1.0 if sparsity is not None else 0.5 if budget is None else budget,
        sink=sink,
        recent=recent,
        explicit=frozenset({"allocator"}),
    )
