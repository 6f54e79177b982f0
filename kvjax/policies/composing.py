"""Building blocks of methods that take another method as their scorer."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, parse


def scoring(name: str, scorer: Policy | str | None, default: Policy) -> Policy:
    """The policy that scores for method `name`: `scorer`, parsed if it is a spec, or `default`.

    ValueError when it does not score.
    """
    inner = parse(scorer) if isinstance(scorer, str) else default if scorer is None else scorer
    if not isinstance(inner, Policy) or inner.scorer is None:
        shown = inner.name if isinstance(inner, Policy) else repr(inner)
        raise ValueError(f"{name}: {shown!r} does not score entries; give it a scorer such as snapkv")
    return inner


def wrap(inner: Policy, given: bool, budget: Budget | None, **parts: Any) -> Policy:
    """`inner` with some parts replaced; they become explicit, and so does the scorer when it was `given`."""
    explicit = set(parts) & {"scorer", "allocator", "selection", "reducer"}
    if given or "scorer" in parts:
        explicit.add("scorer")
    kept = inner.budget if budget is None else budget
    return dataclasses.replace(inner, **{"budget": kept, **parts}, explicit=frozenset(explicit))
