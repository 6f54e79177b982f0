"""RazorAttention."""

import dataclasses
import math

import numpy as np

from kvjax.policies import calibration
from kvjax.policies.allocators.heads import HeadRoles
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.head_scores import Table, head_table, locate
from kvjax.policies.reducers.compensation import Compensate, Counted
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.recency import Recency


def roles(heads: str, echo: float, induction: float) -> tuple[Table, str, float]:
    """(scores, file, share of retrieval heads): top `echo` of the echo scores and top `induction` of the others."""
    file = locate(heads)
    arrays = [calibration.array(file, name).astype(np.float64) for name in ("echo", "induction")]
    n = arrays[0].size
    chosen = np.zeros(n, bool)
    for scores, share in zip(arrays, (echo, induction)):
        chosen[np.argsort(-scores.reshape(-1), kind="stable")[: math.ceil(share * n)]] = True
    score = chosen.reshape(arrays[1].shape) + arrays[1] / max(arrays[1].max(), 1e-12) / 2
    return tuple(tuple(float(x) for x in row) for row in score), file, float(chosen.mean())


@method(
    title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    arxiv="2407.15891",
    tiny=dict(heads=((0.1, 0.9), (0.8, 0.2)), sink=2, recent=4, budget=0.5),
)
def razorattention(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    heads: str | tuple[tuple[float, ...], ...] = "kvref-22m",
    sink: int = 4,
    recent: int = 256,
    echo: float = 0.01,
    induction: float = 0.14,
    compensate: bool = True,
) -> Policy:
    """Retrieval heads keep everything; others keep sinks, a window, and one token that stands for what they dropped.

    heads: a calibration file with `echo` and `induction` [layers, kv_heads], measured on repeated random tokens: the
    top shares of either are retrieval heads (a KV head counts with the maximum of its query heads). With a budget, or
    an inline table, heads turn full from the best on as long as they fit, and what is left widens the windows.
    The compensation token is the mean of the N dropped keys and values (and of the entry whose slot it takes), and its
    exponential counts N times; compensate=False drops. The paper's window of max(4000, n / 5) is `recent` here.
    """
    if not (0.0 <= echo <= 1.0 and 0.0 <= induction <= 1.0) or min(sink, recent) < 0:
        raise ValueError(
            f"razorattention: echo and induction are shares in [0, 1], got {echo} and {induction}"
        )
    full = None
    if isinstance(heads, str):
        table, file, share = roles(heads, echo, induction)
        full = share if budget is None else None
    else:
        table, file = head_table("razorattention", heads, "induction")
    own = Policy(scorer=Recency(), sink=sink, recent=recent)
    inner = scoring("razorattention", scorer, own)
    inner = dataclasses.replace(inner, sink=sink, recent=recent)
    kept = budget if budget is not None else 1.0 if full is not None else 0.5
    parts: dict = {"allocator": HeadRoles(table, sink + recent + compensate, full, file)}
    if compensate:
        parts |= {"reducer": Compensate(), "scorer": Counted(inner.scorer)}
    return wrap(inner, scorer is not None, kept, **parts)
