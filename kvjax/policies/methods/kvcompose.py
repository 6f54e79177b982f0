"""KVCompose."""

from kvjax.policies.allocators.everywhere import CompositeTokens, GlobalHeads
from kvjax.policies.base import Policy
from kvjax.policies.probes import Repeat
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.probed import Replay


@method(
    title="KVCompose: Efficient Structured KV Cache Compression with Composite Tokens",
    arxiv="2509.05165",
)
def kvcompose(budget: Budget = 0.5, structured: bool = True) -> Policy:
    """Each head keeps its own best entries, but heads of a layer equally many; layers compete for the budget.

    The prompt is read a second time over its own cache: score = max over replay queries of A, mean over the group,
    plus the mean over KV heads. The i-th best entries of a layer's heads form composite token i (mean score; in
    layer 0 the maximum over layers); the best layers * budget composite tokens stay. structured=False lets all
    heads compete one by one.
    """
    return Policy(
        scorer=Replay(),
        allocator=CompositeTokens() if structured else GlobalHeads(),
        probe=Repeat(chunk=1 << 30, overlap=0),
        budget=budget,
        explicit=frozenset({"scorer", "allocator", "probe"}),
    )
