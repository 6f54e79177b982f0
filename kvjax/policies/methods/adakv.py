"""Ada-KV."""

from __future__ import annotations

import dataclasses

from kvjax.policies.allocators.adaptive import HeadCompetition
from kvjax.policies.base import Policy
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method, parse


@method(
    title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation",
    arxiv="2407.11550",
    tiny=dict(scorer=snapkv(window=4, kernel=3)),
)
def adakv(scorer: Policy | str | None = None, budget: Budget | None = None, alpha: float = 0.2) -> Policy:
    """KV heads of a layer compete for the layer's budget, on top of any scorer; heads keep different numbers.

    scorer: a policy that scores, e.g. adakv(keydiff, budget=0.25); snapkv when it is omitted, or whatever it is
    composed with (keydiff(budget=0.25) | adakv). Each head is sure of its best alpha share of the mean budget.
    Entries live in the Ragged layout, so freed entries free bytes.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"adakv: alpha must be in [0, 1], got {alpha}")
    inner = parse(scorer) if isinstance(scorer, str) else scorer
    if inner is not None and inner.scorer is None:
        raise ValueError(f"adakv: {inner.name!r} does not score entries; give it a scorer such as snapkv")
    base = snapkv() if inner is None else inner
    explicit = {"allocator"} | (set() if inner is None else {"scorer"})
    return dataclasses.replace(
        base,
        allocator=HeadCompetition(alpha),
        budget=base.budget if budget is None else budget,
        explicit=frozenset(explicit),
    )
