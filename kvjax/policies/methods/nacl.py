"""NACL."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import WindowAttention
from kvjax.policies.scorers.wrappers import Sampled


@method(
    title="NACL: A General and Effective KV Cache Eviction Framework for LLMs at Inference Time",
    arxiv="2408.03675",
    tiny=dict(proxy=4, sink=2),
)
def nacl(
    budget: Budget = 0.5,
    proxy: int = 32,
    sink: int = 4,
    share: float = 0.2,
    temperature: float = 1.0,
    seed: int = 0,
) -> Policy:
    """Most of the budget goes to entries that the proxy tokens attend to, a `share` of it to a random draw.

    s[j] = sum_{i in proxy} A[i, j], proxy = the last `proxy` prompt tokens, which are kept like the sinks; then
    R = share * (budget - protected) entries without replacement with probability softmax(s / temperature).
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"nacl: share must be in [0, 1], got {share}")
    if proxy < 1:
        raise ValueError(f"nacl: proxy must be at least 1 token, got {proxy}")
    if not temperature > 0.0:
        raise ValueError(f"nacl: temperature must be positive, got {temperature}")
    inner = WindowAttention(proxy, 1)
    scorer = Sampled(inner, share, temperature, recent=proxy, sink=sink, seed=seed)
    return Policy(scorer=scorer, budget=budget, sink=sink, recent=proxy, explicit=frozenset({"scorer"}))
