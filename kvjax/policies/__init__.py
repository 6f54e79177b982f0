"""Compression policies: `parse` a spec, list the `names`, `describe` one. Starts no backend.

    policy = kvjax.policies.parse("snapkv(budget=1024, window=32) | int8")

Every method is also a function here: `kvjax.policies.snapkv(budget=0.25)`.
"""

from __future__ import annotations

from typing import Any

from kvjax.policies import methods as _methods  # noqa: F401  (registers every method)
from kvjax.policies.base import Policy
from kvjax.policies.observation import Observation
from kvjax.policies.registry import build, describe, lookup, names, parse

__all__ = ["Observation", "Policy", "describe", "names", "parse"]


def __getattr__(name: str) -> Any:
    """`kvjax.policies.<method>(...)` builds that method."""
    if name.startswith("_") or name not in names():
        raise AttributeError(f"module 'kvjax.policies' has no attribute {name!r}")
    lookup(name)
    return lambda **kwargs: build(name, **kwargs)
