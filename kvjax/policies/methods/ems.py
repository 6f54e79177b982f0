"""EMS."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.reducers.similar import EvictThenMerge
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.temporal import GlobalLocal


@method(
    title="EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance",
    arxiv="2412.08521",
    tiny=dict(window=4, kernel=3, sink=2),
)
def ems(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    window: int = 32,
    kernel: int = 7,
    sink: int | None = None,
    threshold: float = 0.6,
    sources: float = 1.0,
) -> Policy:
    """The best entries are class centres; the next best merge into the most similar centre or into a zero class.

    score = max(local, global * sum local / sum global), see GlobalLocal; merging by cosine of post-RoPE keys with
    weights in proportion to the scores, see EvictThenMerge. threshold > 1 is pure eviction, -1 merges every candidate.
    No code was published; the combination follows the abstract and the formulas of the paper as far as known, except that
    candidates and threshold are the same for all heads. The prompt is merged once; generated tokens are appended.
    """
    if window < 1 or kernel < 1 or kernel % 2 == 0 or sources < 0:
        raise ValueError(
            f"ems: window must be positive, kernel odd, sources >= 0, got {window}, {kernel}, {sources}"
        )
    own = Policy(scorer=GlobalLocal(window, kernel), budget=0.5, sink=4, recent=window)
    inner = scoring("ems", scorer, own)
    fields = {} if sink is None else {"sink": sink}
    return wrap(inner, scorer is not None, budget, reducer=EvictThenMerge(threshold, sources), **fields)
