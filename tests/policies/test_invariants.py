"""What every policy must satisfy, run over the whole registry on a toy model. Nothing here knows a method."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax import arrays, sharding
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.cache.read import stored_positions
from kvjax.codecs.base import PerToken, Plain
from kvjax.generation import engine, staging
from kvjax.policies.base import Policy
from kvjax.policies.registry import build, lookup
from tests.toy import Toy, ragged, steps

LM = Toy()
LENGTHS, PROMPT, RESERVE = (40, 29, 17), 40, 8
NEXT = np.random.default_rng(7).integers(0, 64, (3, 5))
NAMES = P.names()
BUDGETED = [n for n in NAMES if "budget" in lookup(n).arguments]
# Checks that compile more programs run for one method of each kind in the quick run, for all in `make test-all`.
CORE = {
    "adakv",
    "cake",
    "fp8",
    "full",
    "h2o",
    "int8",
    "keydiff",
    "kivi",
    "l2norm",
    "quest",
    "snapkv",
    "streaming_llm",
    "tova",
}


def every(names, thorough=False, reads=False):
    """One parameter a method; tests of a method stay on one worker, where they share compiled programs.

    thorough: slow but for CORE. reads: slow also for methods that change what is read and keep every entry.
    """

    def slow(name):
        built = build(name, **lookup(name).tiny)
        whole = built.scorer is None and (built.selector, built.prefill, built.placement) != (
            None,
            None,
            None,
        )
        return name not in CORE and (thorough or (reads and whole))

    marks = lambda n: [pytest.mark.xdist_group(n)] + [pytest.mark.slow] * slow(n)  # noqa: E731
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in names])


@functools.cache
def params():
    return LM.init()


def policy(name, **kwargs):
    return build(name, **{**lookup(name).tiny, **kwargs})


def plan_of(p, batch=3):
    return Plan(p, LM.shape, batch, PROMPT, RESERVE, page_size=4)


@functools.cache
def run(p, left=False):
    """Prefill three ragged rows and decode five tokens: (prefill logits, cache after it, decode logits)."""
    plan = plan_of(p)
    tokens, positions = ragged(LENGTHS, PROMPT, left=left)
    logits, cache = engine.prefill(LM, plan, params(), tokens, positions)
    after, _ = steps(LM, plan, params(), cache, NEXT)
    return np.asarray(logits), cache, np.asarray(after)


def kept(p, cache, layer):
    """{(row, head): sorted positions stored} of one layer."""
    plan = plan_of(p, cache.length.shape[0])
    plan = dataclasses.replace(plan, shape=Toy(layers=len(cache.layers)).shape)
    pos = np.asarray(stored_positions(plan, cache, layer))
    return {(b, h): sorted(x[x >= 0].tolist()) for b, rows in enumerate(pos) for h, x in enumerate(rows)}


@every(BUDGETED, thorough=True)
def test_a_budget_that_covers_everything_is_the_full_cache(name):
    p = policy(name, budget=PROMPT + RESERVE)
    want, _, want_after = run(P.parse("full"))
    got, _, got_after = run(p)
    np.testing.assert_array_equal(got, want)
    if p.codec == P.parse("full").codec:
        np.testing.assert_array_equal(got_after, want_after)


@every(NAMES)
def test_padding_changes_nothing(name):
    p = policy(name)
    logits, cache, after = run(p)
    left_logits, left_cache, left_after = run(p, left=True)
    for layer in range(LM.layers):
        assert kept(p, cache, layer) == kept(p, left_cache, layer)
    np.testing.assert_allclose(left_logits, logits, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(left_after, after, rtol=2e-4, atol=2e-4)


@every(NAMES, reads=True)
def test_a_row_does_not_depend_on_its_neighbours(name):
    p = policy(name)
    plan = plan_of(p)
    _, cache, after = run(p)
    tokens, positions = ragged(LENGTHS, PROMPT)
    others, other_positions = ragged((5, 29, 38), PROMPT, seed=9)
    tokens, positions = (
        np.stack([y[0], x[1], y[2]]) for x, y in ((tokens, others), (positions, other_positions))
    )
    _, changed = engine.prefill(LM, plan, params(), tokens, positions)
    for layer in range(LM.layers):
        for h in range(LM.kv_heads):
            assert kept(p, changed, layer)[1, h] == kept(p, cache, layer)[1, h]
    logits, _ = steps(LM, plan, params(), changed, NEXT)
    np.testing.assert_allclose(np.asarray(logits)[:, 1], after[:, 1], rtol=2e-4, atol=2e-4)


@every(NAMES, reads=True)
def test_slots_may_be_permuted(name):
    p = policy(name)
    plan = plan_of(p)
    if any(lp.ragged for lp in plan.layers) or p.codec.deferred:
        pytest.skip("slots of pages and of deferred codecs have a fixed order")
    if p.selector is not None:
        pytest.skip("an index describes slots")
    _, cache, after = run(p)
    rng = np.random.default_rng(0)
    pools = []
    for i, (layer, pool) in enumerate(zip(cache.layers, cache.pools)):
        fill, slots = np.asarray(layer.fill), pool.pos.shape[2]
        assert (fill == fill[:, :1]).all()  # one permutation a row: some scores average over the heads' slots
        order = np.stack([np.r_[rng.permutation(n), np.arange(n, slots)] for n in fill[:, 0]])
        order = np.repeat(order[:, None], LM.kv_heads, axis=1)
        pools.append(jax.tree.map(lambda x, o=order: ops.take_slots(x, jnp.asarray(o)), pool))
        assert plan.layers[i].capacity == slots
    logits, _ = steps(LM, plan, params(), cache.replace(pools=tuple(pools)), NEXT)
    np.testing.assert_allclose(np.asarray(logits), after, rtol=2e-4, atol=2e-4)


@every(NAMES, reads=True)
def test_decode_after_eviction_is_masked_full_attention(name):
    """The oracle keeps every key and value of the prompt in float64 and masks what the policy removed.

    A selector reads everything here: what it leaves out is `test_selectors.py`'s.
    """
    p = policy(name, **({"read": 1.0} if "read" in lookup(name).arguments else {}))
    if p.selector is not None and (p.selector.biased or p.selector.estimates):
        pytest.skip("logits of sampled or summarised entries differ by design")
    if p.reducer.merges:
        pytest.skip("survivors are not the original entries")
    _, cache, after = run(p)
    whole = Policy(prefill=p.prefill)  # what a sparse prefill computes, it computes
    full_plan = plan_of(whole)
    _, full_cache, _ = run(whole)
    want = []
    for row in range(3):
        keep = [kept(p, cache, layer) for layer in range(LM.layers)]
        want.append(_oracle_step(full_plan, full_cache, keep, row))
    want = np.stack(want)
    if isinstance(p.codec, Plain):
        np.testing.assert_allclose(after[0], want, rtol=2e-4, atol=2e-4)
    else:
        # Eight bits are nearly exact; below that this only says that the right entries are attended to.
        bound = 0.09 if isinstance(p.codec, PerToken) else 1.5
        assert np.linalg.norm(after[0] - want) / np.linalg.norm(want) < bound


def _oracle_step(plan, full_cache, keep, row):
    """Logits of the first decoded token, a float64 numpy loop over layers and heads."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params())
    x = w["embed"][NEXT[row, 0]]
    position = LENGTHS[row]
    inv_freq = 10000.0 ** (-np.arange(4) / 4)
    cos, sin = np.cos(position * inv_freq), np.sin(position * inv_freq)
    turn = lambda y: np.r_[y[:4] * cos - y[4:] * sin, y[4:] * cos + y[:4] * sin]  # noqa: E731
    for i, layer in enumerate(w["layers"]):
        h = x / np.sqrt(np.mean(x * x) + 1e-6)
        seen = ops.view(plan, full_cache, i)
        out = np.zeros_like(x)
        for head in range(LM.q_heads):
            kv = head // (LM.q_heads // LM.kv_heads)
            rows = keep[i][row, kv]
            keys = np.asarray(seen.store["k"], np.float64)[row, kv, rows]
            values = np.asarray(seen.store["v"], np.float64)[row, kv, rows]
            new_k = turn(np.einsum("e,ed->d", h, layer["k"][:, kv]))
            new_v = np.einsum("e,ed->d", h, layer["v"][:, kv])
            keys, values = np.vstack([keys, new_k]), np.vstack([values, new_v])
            s = keys @ turn(np.einsum("e,ed->d", h, layer["q"][:, head])) * LM.head_dim**-0.5
            e = np.exp(s - s.max())
            out += np.einsum("d,de->e", (e / e.sum()) @ values, layer["o"][head])
        x = x + out
    return x @ w["embed"].T


@every(NAMES, thorough=True)
def test_chunked_prefill(name):
    """Whatever the chunks, the budget holds and every kept entry is real; equal to whole prefill where exact."""
    p = policy(name)
    plan = plan_of(p)
    try:
        chunks = staging.staged(plan) or plan
    except ValueError:
        pytest.skip("ranks entries by the whole prompt's queries while it encodes them")
    tokens, positions = ragged(LENGTHS, PROMPT)
    cache = ops.empty(chunks).replace(expected=jnp.asarray(LENGTHS, jnp.int32))
    for at in range(0, PROMPT, 8):
        part = slice(at, at + 8)
        _, cache = engine.extend(
            LM, chunks, params(), cache, tokens[:, part], positions[:, part], compress=True
        )
    if chunks is not plan:
        cache = staging.settle(LM, chunks, plan, params(), cache)
    _, whole, _ = run(p)
    entries = lambda c: sum(len(x) for i in range(LM.layers) for x in kept(p, c, i).values())  # noqa: E731
    assert entries(cache) <= entries(whole) + LM.layers * LM.kv_heads * 3  # layers may share the budget
    for layer in range(LM.layers):
        got, want = kept(p, cache, layer), kept(p, whole, layer)
        for (b, _h), positions_kept in got.items():
            assert len(set(positions_kept)) == len(positions_kept) or p.reducer.resamples  # a draw may repeat
            assert set(positions_kept) <= set(range(LENGTHS[b]))
        if p.scorer is None or (p.scorer.chunk_exact and layer == 0):
            assert got == want


@every(NAMES)
def test_allocated_bytes_equal_the_spec(name):
    p = policy(name)
    plan = plan_of(p)
    _, cache, _ = run(p)
    specs = plan.specs()
    got = {
        jax.tree_util.keystr(k): (v.shape, v.dtype.name)
        for k, v in jax.tree_util.tree_leaves_with_path(cache)
    }
    flat = jax.tree_util.tree_leaves_with_path(specs, is_leaf=arrays.is_spec)
    assert got == {jax.tree_util.keystr(k): (s.shape, s.dtype) for k, s in flat}
    assert arrays.nbytes(cache) == plan.nbytes() == sum(x.nbytes for x in jax.tree.leaves(cache))


@every(BUDGETED)
def test_bytes_follow_the_budget(name):
    """A prompt compressed to a fraction costs that fraction of the full cache, page rounding aside."""
    shape = dataclasses.replace(LM.shape, head_dim=64)
    # As many entries per head as make one page of slack per head small.
    args = {"budget": 0.25}
    got = Plan(policy(name, **args), shape, 2, 4096, 0, page_size=16).nbytes()
    full = Plan(P.parse("full"), shape, 2, 4096, 0).nbytes()
    pages = 2 * shape.layers * shape.kv_heads * 16 * 2 * 64 * 4
    assert got <= 0.25 * 1.03 * full + pages + 2 * shape.layers * shape.kv_heads * 4096 // 16 * 4


@every(NAMES, reads=True)
def test_one_compilation_per_bucket(name):
    p = policy(name)
    plan = plan_of(p)
    tokens, positions = ragged(LENGTHS, PROMPT)
    engine.prefill(LM, plan, params(), tokens, positions)
    before = engine.prefill._cache_size()
    tokens, positions = ragged((11, 40, 3), PROMPT, seed=5)
    engine.prefill(LM, plan, params(), tokens, positions)
    assert engine.prefill._cache_size() == before


@every(NAMES, thorough=True)
def test_sharded_equals_unsharded(name):
    """batch, kv_heads and slots over an 8-device mesh: the same entries, the same logits."""
    p = policy(name)
    tables = {"heads", "errors", "head_budgets", "layer_budgets"}  # with a row a layer
    lm = Toy(layers=2 if tables & set(lookup(name).tiny) else 1)
    plan = Plan(p, lm.shape, 4, PROMPT, RESERVE, page_size=4)
    tokens, positions = ragged((*LENGTHS, 33), PROMPT)
    more = np.random.default_rng(3).integers(0, 64, (4, 3))

    def both():
        logits, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
        return logits, kept(p, cache, 0), steps(lm, plan, lm.init(), cache, more)[0]

    logits, entries, after = both()
    with jax.set_mesh(sharding.make_mesh({"data": 2, "sequence": 2, "tensor": 2}, jax.devices())):
        s_logits, s_entries, s_after = both()
    assert s_entries == entries
    np.testing.assert_allclose(np.asarray(s_logits), np.asarray(logits), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(s_after), np.asarray(after), rtol=1e-4, atol=1e-4)
