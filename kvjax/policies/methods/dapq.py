"""DapQ."""

from kvjax.policies.base import Policy
from kvjax.policies.probes import Fixed
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import WindowAttention


@method(
    title="Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware Pseudo Queries",
    arxiv="2603.11564",
    tiny=dict(count=4),
)
def dapq(budget: Budget = 0.5, count: int = 32, token: int = 0) -> Policy:
    """Pseudo queries at the first decode positions say which prompt entries decoding will look at.

    `count` pseudo tokens (id `token`; their content hardly matters) run at positions T .. T+count-1 after the
    prompt; score = their summed attention, mean over the group; they share the softmax and are forgotten. Decoding
    goes on from the prompt's own last logits.
    """
    if count < 1 or token < 0:
        raise ValueError(f"dapq: count must be positive and token a token id, got {count} and {token}")
    return Policy(
        scorer=WindowAttention(count, 1),
        probe=Fixed((token,) * count),
        budget=budget,
        explicit=frozenset({"scorer", "probe"}),
    )
