"""Arguments of methods against their annotations, so that a mistake in a spec is told before anything is computed."""

from __future__ import annotations

import math
import numbers
import os
import types
import typing
from collections.abc import Callable
from typing import Any

from kvjax.policies.base import Policy

_SIZES = ("group", "segment", "segments", "block", "parts", "fine_parts")  # of what something is divided into
_OFF = (("cur", "block"),)  # sizes of which 0 has a meaning of its own
_NAMES: dict[Any, str] = {
    int: "an int",
    float: "a float",
    bool: "True or False",
    str: "a string",
    type(None): "None",
    Policy: "a policy",
}


def check(name: str, build: Callable[..., Any], given: dict[str, Any]) -> None:
    """ValueError that names the method, the argument and what it may be, for a value of another type, NaN, a negative int
    (seeds may be) or a size of 0.

    name: of the method. build: its function; arguments without an annotation are not checked. given: argument -> value.
    """
    hints = typing.get_type_hints(build)
    for key, value in given.items():
        hint = hints.get(key)
        if hint is not None and not fits(value, hint):
            raise ValueError(f"{name}: argument {key!r} must be {_describe(hint)}, got {value!r}")
        least = 1 if key in _SIZES and (name, key) not in _OFF else 0
        if hint is int and key != "seed" and value < least:
            raise ValueError(f"{name}: {key} must be at least {least}, got {value}")


def fits(value: Any, hint: Any) -> bool:
    """True when a value is of an annotated type: an int is a float but no bool, NaN is neither, a list is a tuple."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if hint is tuple or origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__len__"):
            return False
        return not inner or all(fits(x, inner[0]) for x in value)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(one) for one in inner)
    if hint is tuple or origin is tuple:
        return "a list" if not inner else f"a list in which each item is {_describe(inner[0])}"
    return _NAMES[hint]
