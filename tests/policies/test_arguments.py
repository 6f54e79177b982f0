"""Mistakes in arguments: one line that names the method and what is allowed, before anything is computed."""

from __future__ import annotations

import typing

import numpy as np
import pytest

import kvjax.policies as P
from kvjax.policies import registry
from kvjax.policies.arguments import fits


def error(name: str, **kwargs) -> str:
    with pytest.raises(ValueError) as found:
        registry.build(name, **kwargs)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("name", P.names())
def test_values_of_another_kind_are_told(name):
    """Every argument of every method, by its annotation."""
    hints = typing.get_type_hints(registry.lookup(name).build)
    for key in P.describe(name).arguments:
        hint = hints[key]
        for value in (3 + 4j, object(), float("nan")):
            text = error(name, **{key: value})
            assert text.startswith(f"{name}: argument {key!r} must be "), text
        if hint is int:
            assert "must be an int" in error(name, **{key: 2.5})
            assert "must be an int" in error(name, **{key: True})
            if key != "seed":
                assert f"{name}: {key} must be at least" in error(name, **{key: -1})
        if hint in (int, float):
            assert "must be an" in error(name, **{key: "x"}) or "must be a float" in error(name, **{key: "x"})


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("snapkv(budget=0)", "snapkv: budget must be at least 1 entry, got 0"),
        ("snapkv(budget=1.5)", r"snapkv: a float budget is a fraction in \(0, 1\], got 1.5"),
        ("snapkv(budget=16)", r"snapkv: budget=16 is below the 32 entries that are always kept"),
        ("streaming_llm(sink=-1)", "streaming_llm: sink must be at least 0, got -1"),
        ("quest(read=0)", "quest: PageBounds: read must be at least 1 entry"),
        ("quest(page=0)", "quest: PageBounds: .*the unit must be at least 1"),
        ("kivi(group=0)", "kivi: group must be at least 1, got 0"),
        ("kivi(bits=4.0)", "kivi: argument 'bits' must be an int, got 4.0"),
        ("mikv(segment=0)", "mikv: segment must be at least 1, got 0"),
        ("per_head(head_budgets=[])", "per_head: head_budgets is a list of layers"),
        ("adakv(scorer=3)", "adakv: argument 'scorer' must be a policy or a string or None, got 3"),
    ],
)
def test_the_message_names_the_method(spec, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        P.parse(spec)


def test_what_fits():
    assert fits(3, int) and fits(np.int32(3), int) and fits(3, float) and fits([1, 2], tuple[int, ...])
    assert fits(None, int | None) and fits(((0.5, 2),), tuple[tuple[int | float, ...], ...])
    assert not fits(True, int) and not fits([1, "a"], tuple[int, ...]) and not fits("ab", tuple[str, ...])
    assert not fits(True, float) and not fits(None, float) and not fits(1, str)
