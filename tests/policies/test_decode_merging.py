"""Merging while decoding (D2O, CaM): every step against a float64 loop over heads, and endless generation."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.arrays import nbytes
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies import parse
from kvjax.policies.ordering import hash_uniform
from kvjax.policies.reducers.neighbours import ValueCascade
from kvjax.policies.reducers.similar import MergeSimilar
from tests.policies.observations import attention, group_mean
from tests.policies.reducer_cases import B, H, S, cosines, observation
from tests.toy import Toy, ragged, steps

VICTIM = np.array([[5, 17], [-1, 3]], np.int32)  # the second row's first head is not full
D2O = "d2o(h2o(budget=16, recent=4), first=0, last=0)"
CAM = "cam(streaming_llm(budget=16, sink=2), m=4)"


def last_query(obs):
    """The observation of a decode step: one query a row, and the mass it gave."""
    last = jnp.asarray([39, 28])
    q = jax.vmap(lambda q, i: q[:, i][:, None])(obs.q, last)
    return obs.replace(q=q, q_pos=last[:, None], prefilling=False)


@functools.partial(jax.jit, static_argnums=0)
def absorb(reducer, obs, victim):
    return reducer.absorb(obs, victim)


@pytest.mark.parametrize("weights", ["cosine", "normalised"])
def test_d2o_step(weights):
    """The evicted entry joins its nearest neighbour when its cosine reaches 0.5 old + 0.5 mean of the heads'."""
    for seed, old in ((0, -2.0), (1, 0.1), (2, 0.9)):
        obs = observation(seed).replace(state={"level": jnp.full((B, H), old)})
        got = absorb(MergeSimilar(weights=weights), obs, jnp.asarray(VICTIM))
        for b in range(B):
            best = {}
            for h in np.flatnonzero(VICTIM[b] >= 0):
                e, n = VICTIM[b, h], [40, 29][b]
                row = cosines(obs.k[b, h], n)[e]
                row[e] = -np.inf
                best[h] = (row.max(), int(row.argmax()), e)
            mean = np.mean([u for u, _, _ in best.values()])
            level = mean if old < -1 else 0.5 * old + 0.5 * mean
            np.testing.assert_allclose(got.state["level"][b], level, atol=1e-5)
            for h in range(H):
                u, j, e = best.get(h, (-np.inf, 0, 0))
                if u < level:
                    assert got.slots[b, h] == -1
                    continue
                assert got.slots[b, h] == j
                share = 1 + (u if weights == "normalised" else 1)
                for new, x in ((got.k, obs.k), (got.v, obs.v)):
                    x = np.asarray(x, np.float64)[b, h]
                    np.testing.assert_allclose(new[b, h, 0], (x[j] + u * x[e]) / share, atol=1e-5)


def test_cam_step():
    """p from the query's attention; drawn heads add V / m to the next m values; keys and other heads stay."""
    obs = last_query(observation())
    mass, draws = group_mean(attention(obs).sum(2)), []
    for seed in range(3):
        reducer = ValueCascade(4, seed)
        got = absorb(reducer, obs, jnp.asarray(VICTIM))
        for b, h in np.ndindex(B, H):
            e, values = VICTIM[b, h], np.asarray(obs.v, np.float64)[b, h]
            window = list(range(e + 1, e + 5))
            p = np.clip(mass[b, h, e] / mass[b, h, window].mean(), 0, 1)
            if e >= 0:
                draws.append(float(hash_uniform(e, h, 0, seed)) < p)
            if e < 0 or not draws[-1]:
                assert (np.asarray(got.slots)[b, h] == -1).all()
                continue
            assert sorted(np.asarray(got.slots)[b, h]) == window
            for place, j in enumerate(np.asarray(got.slots)[b, h]):
                np.testing.assert_allclose(got.v[b, h, place], values[j] + values[e] / 4, atol=1e-5)
                np.testing.assert_array_equal(got.k[b, h, place], obs.k[b, h, j])
    assert 0 < sum(draws) < len(draws)


def test_cam_near_the_end_divides_by_what_follows():
    obs = last_query(observation())
    got = absorb(ValueCascade(4, 1), obs.replace(mass=jnp.ones((B, 2 * H, S))), jnp.asarray([[38, 37]] * 2))
    values = np.asarray(obs.v, np.float64)
    assert sorted(np.asarray(got.slots)[0, 1]) == [-1, -1, 38, 39]
    place = list(np.asarray(got.slots)[0, 0]).index(39)
    np.testing.assert_allclose(got.v[0, 0, place], values[0, 0, 39] + values[0, 0, 38], atol=1e-5)


def states(spec, n):
    """The plan, and the layer's view and what the reducer remembers before and after each of n steps."""
    lm = Toy(layers=1)
    plan = Plan(parse(spec), lm.shape, 2, 24, 8, page_size=4)
    tokens, positions = ragged((24, 15), 24)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    more = np.random.default_rng(3).integers(0, 64, (2, n))
    seen = [(ops.view(plan, cache, 0), cache.layers[0].state)]
    for t in range(n):
        _, cache = steps(lm, plan, lm.init(), cache, more[:, t : t + 1])
        seen.append((ops.view(plan, cache, 0), cache.layers[0].state))
    return plan, seen


@pytest.mark.parametrize("spec", [D2O, CAM])
def test_steps_in_the_cache(spec):
    """Through the whole loop: the budget holds, one position a head is lost, and only merged slots change."""
    _, seen = states(spec, 6)
    merged = 0
    for (old, _), (new, _) in itertools.pairwise(seen):
        for b, h in np.ndindex(2, 2):
            before, after = (
                {int(p): s for s, p in enumerate(np.asarray(x.pos)[b, h]) if p >= 0} for x in (old, new)
            )
            assert len(after) <= 16 and len(set(before) - set(after)) == (len(before) == 16)
            kept = sorted(set(before) & set(after))
            changed = [
                p
                for p in kept
                if any(
                    (
                        np.asarray(new.store[n])[b, h, after[p]] != np.asarray(old.store[n])[b, h, before[p]]
                    ).any()
                    for n in "kv"
                )
            ]
            lost = set(before) - set(after)
            assert len(changed) <= (1 if "d2o" in spec else 4)
            if "cam" in spec and changed:
                later = [p for p in kept if p > max(lost)][:4]
                assert set(changed) <= set(later)
            merged += len(changed)
    assert merged > 0
    if "d2o" in spec:
        level = np.array([np.asarray(state["level"]) for _, state in seen])
        assert (level[:, :, 0] == level[:, :, 1]).all() and level[
            0, 1, 0
        ] < -1  # the short row lost nothing yet
        assert (np.abs(level[-1]) <= 1).all() and (level[1:, 0] != level[:-1, 0]).all()


@pytest.mark.parametrize("spec", [D2O, CAM, "subgen(budget=16, sink=1, recent=4, interval=4)"])
def test_endless_generation_compiles_once_and_grows_nothing(spec):
    lm = Toy(layers=2)
    plan = Plan(parse(spec), lm.shape, 2, 24, 8, page_size=4)
    tokens, positions = ragged((24, 15), 24)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    size, more = nbytes(cache), np.random.default_rng(3).integers(0, 64, (2, 40))
    feed = functools.partial(engine.feed, lm, plan, lm.init())
    compiled = None
    for _ in range(3):
        logits, cache = feed(cache, more, np.ones((2, 40), bool))
        assert np.isfinite(np.asarray(logits)).all() and nbytes(cache) == size == plan.nbytes()
        compiled = engine.feed._cache_size() if compiled is None else compiled
        assert engine.feed._cache_size() == compiled
    np.testing.assert_array_equal(cache.length, [144, 135])
    held = [int((np.asarray(ops.view(plan, cache, i).pos) >= 0).sum()) for i in range(2)]
    assert sum(held) <= 2 * 2 * 2 * (16 + parse(spec).interval - 1)
