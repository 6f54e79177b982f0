"""RoCo."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.statistics import MeanAndDeviation


@method(
    title="On the Efficacy of Eviction Policy for Key-Value Constrained Generative LM Inference",
    arxiv="2402.06262",
    tiny=dict(recent=4, sink=2),
)
def roco(
    budget: Budget = 0.5,
    sink: int = 4,
    recent: int = 10,
    prefill_share: float = 0.1,
    decode_share: float = 0.3,
    evict_decode: bool = True,
    interval: int = 1,
) -> Policy:
    """Entries with the lowest mean attention leave, but those whose attention varies most are spared.

    mu = S1 / c, sigma = sqrt(S2 / c - mu^2) over the c queries that saw the entry (mean over the group first). The
    int(share * budget) entries of largest sigma are protected; the rest is ranked by mu. In the paper's code the newest
    tokens, always kept there too, take up part of that number. It evicts only generated tokens while decoding; here
    every entry competes.
    """
    if not (0.0 <= prefill_share <= 1.0 and 0.0 <= decode_share <= 1.0):
        raise ValueError(f"roco: shares must be in [0, 1], got {prefill_share} and {decode_share}")
    return Policy(
        scorer=MeanAndDeviation(prefill_share, decode_share),
        budget=budget,
        sink=sink,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer"}),
    )
