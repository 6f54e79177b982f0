"""Shrink to fit: what a data-dependent policy did not keep costs nothing, and decoding does not notice."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import kvjax.policies as P
from kvjax import arrays
from kvjax.cache.read import stored_positions
from kvjax.cache.shrink import rounded, shrink
from kvjax.generation import engine
from kvjax.generation.generator import Generator
from kvjax.policies.base import Policy
from kvjax.policies.registry import build, lookup
from tests.toy import Toy, ragged

LM = Toy()
PARAMS = LM.init()


def prompts(lengths, seed=0):
    tokens, _ = ragged(lengths, max(lengths), seed)
    return [tokens[i, :n].tolist() for i, n in enumerate(lengths)]


def generator(policy, **kwargs):
    policy = build(policy, **lookup(policy).tiny) if policy in P.names() else P.parse(policy)
    return Generator(LM, PARAMS, policy, page_size=4, **kwargs)


def test_sizes_are_few_and_close():
    """16 sizes an octave, at most 1/16 above what is needed."""
    for n in range(1, 3000):
        got = rounded(n, 4000)
        assert n <= got <= n + max(0, -(-n // 16))
    assert len({rounded(n, 10**9) for n in range(1024, 2048)}) <= 17
    assert rounded(900, 905) == 905 and rounded(0, 7) == 1


LAZY = "simlayerkv(threshold=0.0, recent=10, initial=2)"  # every layer is lazy: 11 entries a head, whatever the prompt


@pytest.mark.parametrize("spec", [LAZY, LAZY + " | int8", "dms(scorer=random, threshold=0.8, window=4)"])
def test_bytes_are_those_of_what_was_kept(spec):
    """Bytes before the second plan are those of the cap; after it, of the entries kept plus page rounding."""
    rows = prompts((250, 200))
    capped = generator(spec, fit=False).prefill(rows, 8)
    fitted = generator(spec).prefill(rows, 8)
    entries = 0
    for i in range(LM.layers):
        want = np.asarray(stored_positions(capped.plan, capped.cache, i))
        got = np.asarray(stored_positions(fitted.plan, fitted.cache, i))
        np.testing.assert_array_equal(got, want)
        entries += int((got >= 0).sum())
    share = entries / (2 * 2 * LM.layers * fitted.plan.prompt)
    heads = 2 * 2 * LM.layers
    full = capped.cache_bytes if "int8" in spec else fitted.full_cache_bytes
    slot = fitted._prompt_only().pool_specs[0]
    each = arrays.nbytes(slot) // fitted.prompt_pages[0]  # bytes of a page
    need = entries * each / 4
    tables = sum(4 * s.size for layer in fitted.cache.layers for s in (layer.table,))
    rows_of_state = 4 * (4 * 2 + 3 * heads)
    assert fitted.cache_bytes <= (need + heads * each) * 17 / 16 + tables + rows_of_state
    assert fitted.cache_bytes < 0.55 * full and share < 0.4
    assert capped.cache_bytes > 0.95 * full
    allocated = arrays.nbytes(fitted.cache)
    assert allocated == fitted.plan.nbytes() == sum(x.nbytes for x in jax.tree.leaves(fitted.cache))


@pytest.mark.parametrize(
    ("spec", "pools"),
    [
        ("corm", 1),  # evicts while decoding
        # Compacts one layer at a time: two pools.
        pytest.param("corm(window=6, recent=4, interval=3)", 2, marks=pytest.mark.slow),
        pytest.param("fastgen", 1, marks=pytest.mark.slow),
        (LAZY + " | kivi(group=8)", 1),
        ("keydiff(budget=0.5) | adakv", 1),
        # One pool from the start.
        pytest.param(
            "keydiff(budget=0.5) | headkv(heads=((0.1, 0.4), (0.2, 0.3)))", 1, marks=pytest.mark.slow
        ),
        ("keydiff(budget=0.5) | adakv | kvtuner(calibration='((8, 8), (4, 2))')", 2),
    ],
)
def test_generation_is_the_same(spec, pools):
    """Tokens after a question and a generation, in smaller pools."""
    if "kvtuner" in spec:
        from kvjax.codecs.precision import PerLayer

        codec = Policy(codec=PerLayer(((8, 8), (4, 2)), channels=8), explicit=frozenset({"codec"}))
        policy = P.parse("keydiff(budget=0.5) | adakv") | codec
        make = lambda **k: Generator(LM, PARAMS, policy, page_size=4, **k)  # noqa: E731
    else:
        make = lambda **k: generator(spec, **k)  # noqa: E731
    rows, out, sessions = prompts((60, 23, 41)), [], []
    for fit in (False, True):
        session = make(fit=fit).prefill(rows, 24)
        session.extend(prompts((5, 3, 7), seed=4))
        out.append([o.tokens for o in session.decode([12] * 3)])
        sessions.append(session)
    assert out[0] == out[1]
    assert sum(n > 0 for n in sessions[1].plan.pages) == pools
    assert sessions[1].cache_bytes <= sessions[0].cache_bytes


def test_requests_that_keep_about_as_much_share_programs():
    g = generator(LAZY)
    g.generate(prompts((250, 200)), 6)
    sizes = engine.decode._cache_size(), engine.begin._cache_size()
    g.generate(prompts((240, 215), seed=3), 6)
    assert (engine.decode._cache_size(), engine.begin._cache_size()) == sizes


def test_what_is_not_ragged_is_left_alone():
    session = generator("snapkv(budget=20, window=4)", fit=True).prefill(prompts((60, 23)), 8)
    assert session.plan.pages == () and session.prompt_pages == ()
    plan, cache, kept = shrink(session.plan, session.cache)
    assert plan is session.plan and cache is session.cache and kept == ()
    again = generator(LAZY).prefill(prompts((60, 23)), 8)
    assert dataclasses.replace(again.plan, pages=()) == generator(LAZY).plan(2, 60, 8)
