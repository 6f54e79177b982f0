"""Budgets of heads by importance, role and structure, on scores made by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies.allocators import heads
from tests.policies.allocator_cases import (
    FIXTURE,
    LENGTHS,
    B,
    D,
    H,
    L,
    S,
    attention,
    measure,
    model_counts,
    observation,
    scores_of,
)


def test_headkv_shares_a_pool_by_importance():
    p = ((0.1, 0.2), (0.3, 0.1), (0.2, 0.05), (0.03, 0.02))
    allocator = heads.HeadImportance(p, beta=2.0)
    stats = [np.full((B, H), row, np.float32) for row in p]
    got = model_counts(allocator, 14, stats)
    b = 10
    want = 4 + (b - b // 2) + np.array(p) * (b // 2) * L * H
    np.testing.assert_allclose(got[0], want, atol=1)
    assert got[0].sum() == L * H * 14
    flat = model_counts(heads.HeadImportance(((1.0, 1.0),) * L), 14, [np.ones((B, H), np.float32)] * L)
    np.testing.assert_array_equal(flat, np.full((B, L, H), 14))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_roles_are_kvpress_roles(sparsity):
    table = tuple(tuple(float(x) for x in row) for row in FIXTURE["duo/scores"])
    allocator = heads.HeadRoles(table, streaming=12, full=1 - sparsity)
    streaming = allocator.rank >= allocator.full_heads
    np.testing.assert_array_equal(streaming, FIXTURE[f"duo/{sparsity}"])


def roles(full, keep, table=((0.1, 0.9), (0.8, 0.2), (0.3, 0.4), (0.5, 0.6))):
    allocator = heads.HeadRoles(table, streaming=4, full=full)
    stats = [np.broadcast_to(row, (B, H)) for row in allocator.rank]
    return model_counts(allocator, keep, stats)


def test_roles_by_sparsity():
    got = roles(0.25, 48)
    for row, n in enumerate(LENGTHS):
        want = np.full((L, H), 4)
        want[0, 1] = want[1, 0] = n
        np.testing.assert_array_equal(got[row], want)
    np.testing.assert_array_equal(roles(0.0, 48), np.full((B, L, H), 4))
    np.testing.assert_array_equal(roles(1.0, 48), np.broadcast_to(LENGTHS[:, None, None], (B, L, H)))


@pytest.mark.parametrize("keep", [4, 10, 16, 24, 40])
def test_roles_by_budget_fill_it(keep):
    got = roles(None, keep)
    for row, n in enumerate(LENGTHS):
        assert got[row].sum() == L * H * min(keep, n) and (got[row] >= 4).all()
        full = int(L * H * (min(keep, n) - 4) // (n - 4))
        assert (got[row] == n).sum() >= full
        if 0 < full < L * H:
            assert got[row, 0, 1] == n  # the best retrieval head is among them


def test_task_heads_far_from_the_centre_are_full():
    """One planted outlier head is heterogeneous; beta = 1 with room for all is the full cache."""
    rng = np.random.default_rng(0)
    v = np.repeat(rng.standard_normal((B, 1, S, D)), H, axis=1).astype(np.float32)
    v[:, 1] += 5.0
    four = lambda x: np.concatenate([x[:, :1], x[:, :1], x[:, :1], x[:, 1:]], axis=1)  # noqa: E731
    q = np.repeat(rng.standard_normal((B, 1, S, D)), 4, axis=1).astype(np.float32)
    k = np.repeat(rng.standard_normal((B, 1, S, D)), 4, axis=1).astype(np.float32)
    allocator = heads.SemanticHeads(beta=0.25, m=1, window=8, top=16)
    base = observation()
    obs = base.replace(
        q=jnp.asarray(q),
        k=jnp.asarray(k),
        v=jnp.asarray(four(v)),
        pos=jnp.broadcast_to(base.pos[:, :1], (B, 4, S)),
    )
    scores = jnp.concatenate([jnp.asarray(scores_of(0)[0])] * 2, axis=1)
    stats = measure(allocator, obs, scores)
    assert (np.asarray(stats).argmax(1) == 3).all()
    full = attention(dataclasses.replace(obs, q=jnp.asarray(q[:, :4]), k=jnp.asarray(k[:, :2])))
    c = full[0, 0, 40:48].mean(0)
    best = np.argsort(-c)[:16]
    vectors = np.array([(c[best, None] * four(v)[0, h][best]).sum(0) for h in range(4)])
    want = np.linalg.norm(vectors - vectors.mean(0), axis=1)
    np.testing.assert_allclose(stats[0], want, rtol=1e-3, atol=1e-4)

    valid = jnp.concatenate([jnp.asarray(scores_of(0)[1])] * 2, axis=1)
    length = jnp.asarray(LENGTHS)
    args = scores, valid, jnp.asarray([30, 30]), 0, L, length, stats
    got = np.asarray(allocator.layer_counts(*args))
    assert (got[:, 3] == LENGTHS).all() and (got.sum(1) == 4 * 30).all()
    assert (np.sort(got, axis=1)[:, -2] == LENGTHS).all()  # the closest head as well
    tight = np.asarray(allocator.layer_counts(scores, valid, jnp.asarray([8, 8]), 0, L, length, stats))
    assert (tight < LENGTHS[:, None]).all() and (tight.sum(1) == 32).all() and (tight >= 4).all()


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.8, 1.01])
def test_fastgen_takes_the_cheapest_structure_that_recovers(threshold):
    obs = observation(5)
    allocator = heads.Structure(threshold, frequent=0.3, local=0.2, special=2, rows=8)
    structure, *_ = jax.jit(lambda o: allocator.profile(o))(obs)
    sizes = measure(allocator, obs, jnp.asarray(scores_of(0)[0]))
    full = attention(obs).reshape(B, H, 2, S, S).mean(2)
    for row, n in enumerate(LENGTHS):
        for h in range(H):
            a = full[row, h]
            frequency = a.sum(0)[:n] / (n - np.arange(n))
            special = np.arange(n) < 2
            order = np.argsort(-np.where(special, -1, frequency))[: n * 300 // 1000]
            often = np.zeros(n, bool)
            often[order] = True
            near = np.arange(n)[None] > np.arange(n)[:, None] - n * 200 // 1000
            sets = [np.broadcast_to(special, (n, n)), np.broadcast_to(special | often, (n, n))]
            sets.append(sets[1] | near)
            rec = [(a[n - 8 : n, :n] * s[n - 8 :]).sum() / 8 for s in sets]
            want = next((i for i, r in enumerate(rec) if r >= threshold), 3)
            assert structure[row, h] == want
            held = [
                special,
                special | often,
                special | often | (np.arange(n) >= n - n * 200 // 1000),
                special | True,
            ]
            assert sizes[row, h] == held[want].sum()


def test_fastgen_budget_is_a_ceiling():
    allocator = heads.Structure()
    scores, valid = (jnp.asarray(x) for x in scores_of(0))
    want = jnp.asarray([[48, 20], [10, 5]])
    counts = functools.partial(allocator.layer_counts, scores, valid)
    got = np.asarray(counts(jnp.asarray([20, 20]), 0, L, jnp.asarray(LENGTHS), want))
    assert got[0].sum() == 40 and got[0, 0] > got[0, 1] >= 4
    np.testing.assert_array_equal(got[1], [10, 5])
    whole = np.asarray(counts(jnp.asarray([48, 37]), 0, L, jnp.asarray(LENGTHS), want))
    np.testing.assert_array_equal(whole, np.repeat(LENGTHS[:, None], 2, axis=1))
