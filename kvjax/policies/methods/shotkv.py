"""ShotKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.probed import Shots
from kvjax.policies.selections.chunks import Segments


@method(
    title="Can LLMs Maintain Fundamental Abilities under KV Cache Compression? (ShotKV)",
    arxiv="2502.01941",
    tiny=dict(window=4, length=4),
)
def shotkv(
    budget: Budget = 0.5, window: int = 32, separators: tuple[int, ...] = (), length: int = 32
) -> Policy:
    """Few-shot examples (or sentences) are kept whole or not at all, by the mean attention on their tokens.

    S_i = mean over the tokens of segment i of sum_h sum_{i in window} A[h, i, t], best segments first while they
    fit; one set for all heads, the last `window` tokens are kept. separators: ids of tokens that end a segment;
    without them segments have `length` tokens. The window as the source of attention is our reading. Generated
    tokens are not evicted; compose the paper's second phase with scope(shotkv(...)).
    """
    if window < 1 or length < 1:
        raise ValueError(f"shotkv: window and length must be positive, got {window} and {length}")
    return Policy(
        scorer=Shots(window, tuple(separators), length),
        selection=Segments(),
        budget=budget,
        recent=window,
        explicit=frozenset({"scorer", "selection"}),
    )
