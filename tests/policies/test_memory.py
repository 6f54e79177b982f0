"""What a prefill holds beside the cache: never the attention of all queries on all keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax import attend
from kvjax.arrays import nbytes
from kvjax.cache import cascade, ops
from kvjax.cache.plan import Plan
from kvjax.compress import finish
from kvjax.generation import engine
from kvjax.policies.registry import build, lookup
from tests.toy import Toy, ragged

LM = Toy(layers=3, q_heads=6, kv_heads=2, head_dim=64)
BATCH, TOKENS = 8, 2048
BLOCK = BATCH * LM.q_heads * 256 * TOKENS * 4  # f32 probabilities of 256 queries
ENTRIES = BATCH * LM.kv_heads * TOKENS * LM.head_dim * 4 * 2  # keys and values of one layer
TABLE = "((0.1, 0.2), (0.3, 0.4), (0.2, 0.1))"


@functools.cache
def peak(spec):
    """Bytes that XLA allocates for temporaries."""
    plan = Plan(P.parse(spec), LM.shape, BATCH, TOKENS, 64)
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    compiled = engine.prefill.lower(LM, plan, jax.eval_shape(LM.init), tokens, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("spec", "waiting"),
    [
        ("fastgen", 0),
        ("d2o", LM.layers),  # merging needs the entries of layers whose share is not known yet
        ("non_causal_attn", 0),
        ("taskkv", 0),
        ("block", 0),
        (f"headkv(heads={TABLE})", 0),
        (f"duoattention(heads={TABLE})", 0),
        ("pyramidkv", 0),
    ],
)
def test_peak_of_a_prefill(spec, waiting):
    assert peak(spec) <= peak("full") + BLOCK + ENTRIES + waiting * ENTRIES


@pytest.mark.parametrize(
    "name", ["headkv", "duoattention", "razorattention", "pyramidkv", "compresskv_layers"]
)
def test_layers_that_need_not_wait_keep_what_they_would_keep(name, monkeypatch):
    """Counts known ahead give the same cache, bit for bit, as counts after the last layer."""
    lm = Toy()
    plan = Plan(build(name, **lookup(name).tiny), lm.shape, 3, 40, 8, page_size=4)
    allocator = type(plan.policy.allocator)
    assert allocator.ahead
    tokens, positions = ragged((40, 29, 17), 40)
    run = lambda: engine.prefill.__wrapped__(lm, plan, lm.init(), tokens, positions)[1]  # noqa: E731
    early = jax.jit(lambda: run())()
    monkeypatch.setattr(allocator, "ahead", False)
    late = jax.jit(lambda: run())()
    assert jax.tree.structure(early) == jax.tree.structure(late)
    for x, y in zip(jax.tree.leaves(early), jax.tree.leaves(late)):
        np.testing.assert_array_equal(x, y)


def prefilled(lm, plan, lengths, chunk):
    """(logits, cache) of a prompt in chunks of `chunk`, compiled anew; each chunk is compressed as it comes."""
    tokens, positions = ragged(lengths, plan.prompt)
    if chunk is None:
        return jax.jit(lambda: engine.prefill.__wrapped__(lm, plan, lm.init(), tokens, positions))()
    params = jax.tree.map(jnp.asarray, lm.init())
    extend = functools.partial(engine.extend.__wrapped__, lm, plan, params, compress=True)
    run = jax.jit(lambda cache, tokens, positions: extend(cache, tokens, positions))
    cache = ops.empty(plan).replace(expected=jnp.asarray(lengths, jnp.int32))
    for at in range(0, plan.prompt, chunk):
        logits, cache = run(cache, tokens[:, at : at + chunk], positions[:, at : at + chunk])
    return logits, cache


@pytest.mark.parametrize(
    "spec, chunk",
    [
        ("cake(window=4, kernel=3)", None),
        ("cake(window=4, kernel=3, budget=0.6)", 20),
        pytest.param("cake(window=4, kernel=3, budget=20, ceiling=1)", None, marks=pytest.mark.slow),
        pytest.param("cake(window=4, kernel=3, budget=20, evict_decode=False)", None, marks=pytest.mark.slow),
        pytest.param("cake(window=4, kernel=3, budget=21) | int8", 20, marks=pytest.mark.slow),
    ],
)
def test_a_cascade_keeps_what_one_division_keeps(spec, chunk, monkeypatch):
    """Layer by layer and at once: the same counts and entries but for one of rounding a layer, in time order.

    In chunks, too, each of which is divided by what its own window says; the first, of 20, is within the budget, so that
    the second sees the same entries both ways.
    """
    lm = Toy(layers=4)
    plan = Plan(P.parse(spec), lm.shape, 3, 40, 8, page_size=4)
    assert cascade.applies(plan, 0)
    logits, early = prefilled(lm, plan, (40, 38, 17), chunk)
    assert early.cascade is None
    monkeypatch.setattr(type(plan.policy.allocator), "cascades", False)
    want, late = prefilled(lm, plan, (40, 38, 17), chunk)
    np.testing.assert_array_equal(logits[:2], want[:2])  # the third row may have no tokens in the last chunk
    taken = np.concatenate([np.asarray(x.table).ravel() for x in early.layers])
    taken = taken[taken >= 0]
    assert len(set(taken)) == len(taken) <= early.pools[0].pos.shape[0]
    sizes = []
    for i in range(4):
        a, b = ops.view(plan, early, i), ops.view(plan, late, i)
        for row, h in np.ndindex(3, 2):
            got, at = (np.asarray(x.pos)[row, h] for x in (a, b))
            got, at = got[got >= 0], at[at >= 0]
            assert (np.diff(got) > 0).all() and len(set(got) ^ set(at)) <= 1 and len(got) <= len(at)
            same = np.isin(at, got)
            for n in a.store:
                x, y = (np.asarray(z.store[n])[row, h] for z in (a, b))
                np.testing.assert_array_equal(x[: len(got)], y[: len(at)][same])
            sizes.append(len(got))
    sizes = np.array(sizes).reshape(4, 3, 2)
    assert (sizes[:, 0] != sizes[0, 0]).any() != ("ceiling" in spec)  # layers differ


def held(plan, lm, fresh=True):
    """Bytes of the cache, with what waits in it, as each layer of a prompt, or of a chunk of one, hands it on."""
    sizes, tokens = [], jax.ShapeDtypeStruct((plan.batch, plan.prompt if fresh else 64), jnp.int32)
    whole = attend.prefill(plan, fresh=fresh)

    def counted(x, cache):
        out, cache = whole(x, cache)
        sizes.append(nbytes(cache))
        return out, cache

    def run(params, tokens):
        _, cache = lm.hidden(params, tokens, tokens, ops.empty(plan), counted)
        return finish(plan, cache, tokens)

    jax.eval_shape(run, jax.eval_shape(lm.init), tokens)
    return sizes


def test_a_cascade_holds_the_budget_after_every_layer(monkeypatch):
    """Eight layers and a twentieth kept: never more than the final cache; with one division, every layer waits."""
    lm = Toy(layers=8, q_heads=6, kv_heads=2, head_dim=64)
    plan = Plan(P.parse("cake(budget=0.05)"), lm.shape, BATCH, TOKENS, 64)
    most = plan.nbytes() + 2**18  # counts and statistics of a layer
    assert max(held(plan, lm)) <= most < 0.6 * ENTRIES
    assert max(held(plan, lm, fresh=False)) <= 2 * most  # the pool that was, and the one that they move to
    monkeypatch.setattr(type(plan.policy.allocator), "cascades", False)
    assert held(plan, lm)[-1] > 8 * ENTRIES and held(plan, lm, fresh=False)[-1] > 8 * ENTRIES
