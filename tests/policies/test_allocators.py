"""Allocators: each card's own property, exact totals, and kvpress' arithmetic.

Counts are computed on scores made by hand; nothing here runs a model but the last tests, which check that pools
hold what allocators promise.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies import Observation, parse
from kvjax.policies.allocators import heads, layers, pyramid, shares, tables
from kvjax.policies.base import PROTECTED
from kvjax.policies.registry import build
from kvjax.types import ModelShape
from tests.toy import Toy, ragged, steps

FIXTURE = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "kvpress" / "allocators.npz")
B, H, S, D, L = 2, 2, 48, 8, 4
LENGTHS = np.array([48, 37])


def scores_of(layer, window=4, seed=0, same=False):
    """(protected scores, valid) [batch, kv_heads, slots]: positive scores, the last `window` entries protected."""
    rng = np.random.default_rng([seed, 0 if same else layer])
    valid = np.arange(S) < LENGTHS[:, None, None]
    s = rng.random((B, 1 if same else H, S)) * np.ones((1, H, 1))
    s = np.where(np.arange(S) >= LENGTHS[:, None, None] - window, PROTECTED * 2, s)
    return np.where(valid, s, -np.inf).astype(np.float32), np.broadcast_to(valid, s.shape)


def observation(layer=0, seed=0, q=None, k=None, v=None):
    rng = np.random.default_rng([seed, layer, 7])
    pos = np.where(np.arange(S) < LENGTHS[:, None], np.arange(S), -1).astype(np.int32)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return Observation(
        q=jnp.asarray(draw(B, 2 * H, S, D) * 2 if q is None else q),
        q_pos=jnp.asarray(pos),
        k=jnp.asarray(draw(B, H, S, D) if k is None else k),
        v=jnp.asarray(draw(B, H, S, D) if v is None else v),
        pos=jnp.asarray(np.broadcast_to(pos[:, None], (B, H, S))),
        length=jnp.asarray(LENGTHS, jnp.int32),
        layer=layer,
        layers=L,
        scale=D**-0.5,
    )


def attention(obs):
    """f64 [batch, q_heads, queries, slots] by loops over rows and heads."""
    q, k = np.asarray(obs.q, np.float64), np.asarray(obs.k, np.float64)
    out = np.zeros((B, 2 * H, S, S))
    for b in range(B):
        for h in range(2 * H):
            for i in range(LENGTHS[b]):
                x = k[b, h // 2, : i + 1] @ q[b, h, i] * D**-0.5
                e = np.exp(x - x.max())
                out[b, h, i, : i + 1] = e / e.sum()
    return out


@functools.partial(jax.jit, static_argnums=0)
def _model_counts(allocator, scores, valid, keep, length, stats):
    return jnp.stack(allocator.model_counts(scores, valid, keep, length, stats), axis=1)


def model_counts(allocator, keep, stats, n=L, window=4, **kwargs):
    """int [batch, layers, kv_heads]."""
    made = [scores_of(i, window, **kwargs) for i in range(n)]
    scores, valid = ([jnp.asarray(x[j]) for x in made] for j in (0, 1))
    stats = [jnp.asarray(s) for s in stats] if stats is not None else [None] * n
    keep = jnp.asarray(np.minimum(keep, LENGTHS), jnp.int32)
    return np.asarray(_model_counts(allocator, scores, valid, keep, jnp.asarray(LENGTHS, jnp.int32), stats))


# ---- shares


@pytest.mark.parametrize("seed", range(20))
def test_spread_is_exact_and_within_its_bounds(seed):
    rng = np.random.default_rng(seed)
    n, rows = int(rng.integers(1, 40)), 3
    weights = rng.random((rows, n)).astype(np.float32) ** rng.integers(1, 8)
    weights[0] = 0.0
    high = rng.integers(0, 50, (rows, n)).astype(np.int32)
    low = (high * rng.random((rows, n)) * 0.3).astype(np.int32)
    total = rng.integers(0, 60 * n, rows).astype(np.int32)
    got = np.asarray(jax.jit(shares.spread)(weights, total, low, high))
    np.testing.assert_array_equal(got.sum(1), np.minimum(total, high.sum(1)))
    assert (got >= 0).all() and (got <= high).all()
    roomy = low.sum(1) <= total
    assert (got[roomy] >= low[roomy]).all()


def test_spread_follows_the_weights():
    weights, free = np.array([[1.0, 2.0, 5.0]], np.float32), np.zeros((1, 3), np.int32)
    total, high = np.array([800]), np.full((1, 3), 10_000)
    np.testing.assert_array_equal(shares.spread(weights, total, free, high), [[100, 200, 500]])
    # The third is full at 300: the other 500 are divided 1 : 2.
    got = shares.spread(weights, total, free, np.array([[10_000, 10_000, 300]]))
    np.testing.assert_array_equal(got, [[167, 333, 300]])


# ---- pyramid


@pytest.mark.parametrize("keep, beta", [(12, 20), (13, 2), (16, 20), (9, 1), (4, 20), (3, 20), (40, 20)])
def test_pyramid_falls_with_depth_and_spends_the_budget(keep, beta):
    got = model_counts(pyramid.Pyramid(beta), keep, None, n=L)
    assert (got[:, :, 0] == got[:, :, 1]).all()
    for row, n in enumerate(LENGTHS):
        kept, b = got[row, :, 0], min(keep, n) - min(4, keep)
        assert (np.diff(kept) <= 0).all() and kept.sum() == L * min(keep, n)
        if n > keep and n >= 2 * b:
            lo = b // beta
            hi = min(2 * b - lo, n - 4) if keep >= 4 else 0
            assert kept[0] - min(4, keep) == hi
            assert kept[-1] - min(4, keep) == 2 * b - hi
            # The authors' floored step overspends by less than L (L - 1) / 2.
            step = (hi - (2 * b - hi)) // (L - 1)
            official = sum(hi - i * step for i in range(L))
            assert 0 <= official - L * b < L * (L - 1) / 2


def test_pyramid_of_one_layer_is_uniform():
    np.testing.assert_array_equal(model_counts(pyramid.Pyramid(20), 12, None, n=1), np.full((B, 1, H), 12))


def test_pyramid_matches_kvpress():
    """Entries per layer of kvpress' arithmetic, for prompts of several lengths, ratios and betas."""
    lengths, ratios, betas, n = (512, 640, 1024, 4096), (0.25, 0.5, 0.75), (5, 20), 12
    for li, length in enumerate(lengths):
        valid = jnp.ones((1, 1, length), bool)
        scores = jnp.where(jnp.arange(length) >= length - 32, PROTECTED, 1.0)[None, None]
        for ri, ratio in enumerate(ratios):
            for bi, beta in enumerate(betas):
                allocator = pyramid.Pyramid(beta, "kvpress")
                keep = jnp.asarray([int(length * (1 - ratio))], jnp.int32)
                got = allocator.model_counts(
                    [scores] * n, [valid] * n, keep, jnp.asarray([length]), [None] * n
                )
                np.testing.assert_array_equal([int(c[0, 0]) for c in got], FIXTURE["pyramid"][li, ri, bi])


# ---- layers that compete


COMPETING = [
    layers.Uncertainty(),
    layers.Preference(window=4),
    layers.GlobalTop(),
    layers.GlobalPrefix(),
    layers.Density(),
    layers.LayerErrors((0.25,) * L, floor=2),
]


@functools.partial(jax.jit, static_argnums=0)
def _measure(allocator, obs, scores):
    return allocator.measure(obs, scores)


@pytest.mark.parametrize("allocator", COMPETING, ids=lambda a: type(a).__name__)
def test_equal_layers_get_equal_budgets(allocator):
    stats = [_measure(allocator, observation(0), jnp.asarray(scores_of(0)[0])) for _ in range(L)]
    keep = 12
    got = model_counts(allocator, keep, stats if stats[0] is not None else None, same=True)
    np.testing.assert_array_equal(got, np.full((B, L, H), keep))


@pytest.mark.parametrize("keep", [6, 20, 36, 47])
@pytest.mark.parametrize("allocator", COMPETING, ids=lambda a: type(a).__name__)
def test_the_layers_together_keep_the_budget(allocator, keep):
    """Exactly where something competes, whatever the layers look like; the window is in every layer."""
    stats = [_measure(allocator, observation(i), jnp.asarray(scores_of(i)[0])) for i in range(L)]
    got = model_counts(allocator, keep, stats if stats[0] is not None else None)
    for row, n in enumerate(LENGTHS):
        assert got[row].sum() == L * H * min(keep, n)
        assert (got[row] >= min(4, keep)).all() and (got[row] <= n).all()


def test_uncertainty_counts_entries_for_the_mass():
    scores, valid = (x.copy() for x in scores_of(0))
    free = valid & (scores < PROTECTED)
    scores[0, 0] = np.where(free[0, 0], 0.0, scores[0, 0])
    scores[0, 0, 5] = 3.0  # one-hot: LMBA 1
    scores[0, 1] = np.where(free[0, 1], 1.0, scores[0, 1])  # 44 equal ones: 0.9 of them, rounded up
    got = _measure(layers.Uncertainty(0.9), observation(), jnp.asarray(scores))
    want = []
    for row in range(B):
        lmba = []
        for h in range(H):
            x = np.sort(scores[row, h][free[row, h]].astype(np.float64))[::-1]
            lmba.append(1 + np.searchsorted(np.cumsum(x), 0.9 * x.sum() * (1 - 1e-7)))
        want.append(np.mean(lmba))
    np.testing.assert_allclose(got, want)
    assert want[0] == (1 + 40) / 2


def test_uncertainty_budgets_are_linear_in_lmba():
    lmba = [np.full(B, x, np.float32) for x in (5.0, 10.0, 20.0, 5.0)]
    got = model_counts(layers.Uncertainty(0.9, 0.5), 20, lmba)
    np.testing.assert_array_equal(got[0, :, 0], [10 + 5, 10 + 10, 10 + 20, 10 + 5])


def test_preference_is_entropy_times_variance():
    obs = observation(1)
    got = _measure(layers.Preference(window=4, tau1=1.6, tau2=0.5), obs, jnp.asarray(scores_of(0)[0]))
    full = attention(obs)
    for row, n in enumerate(LENGTHS):
        a = full[row, :, n - 4 : n, : n - 4]
        entropy = -(a * np.log(a + 1e-10)).sum()
        variance = a.var(axis=1, ddof=1).sum()
        np.testing.assert_allclose(got[row], entropy ** (1 / 1.6) * variance ** (1 / 0.5), rtol=1e-4)


def test_cake_cascading_by_hand_keeps_the_same_entries():
    """Shrinking earlier layers after each layer, as the authors do, ends with the one-shot sets."""
    preference = np.array([3.0, 1.0, 0.5, 2.0])
    made = [scores_of(i) for i in range(L)]
    keep, window, n = 16, 4, LENGTHS[0]
    free = [np.where(s[0] < PROTECTED, s[0], -np.inf) for s, _ in made]
    kept = []
    for seen in range(
        1, L + 1
    ):  # layer `seen - 1` has just been scored; the budget of all layers is shared so far
        share = preference[:seen] / preference[:seen].sum() * (keep - window) * L
        sizes = np.minimum(share.astype(int), n - window)
        kept.append(np.argsort(-free[seen - 1], axis=-1)[:, : sizes[-1]])
        kept = [k[:, :size] for k, size in zip(kept, sizes)]
    got = (
        model_counts(layers.Preference(4), keep, [np.full(B, p, np.float32) for p in preference])[0] - window
    )
    for i in range(L):
        assert abs(got[i, 0] - kept[i].shape[1]) <= 2  # what truncation leaves is handed out in one shot
        for h in range(H):
            ours = set(np.argsort(-free[i][h])[: got[i, h]].tolist())
            theirs = set(kept[i][h].tolist())
            assert ours <= theirs or theirs <= ours


def test_cake_ceiling_bounds_the_candidates():
    allocator = layers.Preference(4, ceiling=2)
    assert (
        allocator.head_capacity(10, 4096, H) == 20 and layers.Preference(4).head_capacity(10, 4096, H) == 4096
    )
    assert parse("cake(ceiling=2)").allocator.ceiling == 2


def test_cake_scores_mean_and_variance():
    obs = observation(2)
    policy = parse("cake(window=4, kernel=3, gamma=200.0)")
    got, _ = jax.jit(lambda o: policy.scorer.score(o, {}))(obs)
    full = attention(obs)
    for row, n in enumerate(LENGTHS):
        a = full[row, :, n - 4 : n, : n - 4]
        x = a.mean(1) + 200 * a.var(axis=1, ddof=1)
        padded = np.pad(x, ((0, 0), (1, 1)))
        want = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
        np.testing.assert_allclose(got[row, :, : n - 4], want.reshape(H, 2, -1).mean(1), rtol=2e-4, atol=1e-6)


def test_dynamic_budgets_follow_the_global_winners():
    made = [scores_of(i) for i in range(L)]
    boosted = [(np.where(s < PROTECTED, s + i, s), v) for i, (s, v) in enumerate(made)]
    keep, allocator = 15, layers.GlobalTop(rho=10)
    scores, valid = ([jnp.asarray(x[j]) for x in boosted] for j in (0, 1))
    args = jnp.asarray([keep, keep]), jnp.asarray(LENGTHS)
    got = np.asarray(_model_counts(allocator, scores, valid, *args, [None] * L))
    free = [np.where(v & (s < PROTECTED), s, -np.inf)[0] for s, v in boosted]
    wanted = L * H * (keep - 4)
    level = np.sort(np.concatenate([f.ravel() for f in free]))[::-1][wanted - 1]
    won = np.array([(f >= level).sum() for f in free])
    assert won.sum() == wanted
    np.testing.assert_allclose(got[0, :, 0] - 4, won / H, atol=1)
    tight = np.asarray(_model_counts(layers.GlobalTop(rho=1), scores, valid, *args, [None] * L))
    assert tight.sum() == got.sum()


def test_prefix_keeps_one_level_of_mass():
    stats = [_measure(layers.GlobalPrefix(), observation(i), jnp.asarray(scores_of(i)[0])) for i in range(L)]
    got = model_counts(layers.GlobalPrefix(), 20, stats)[0, :, 0] - 4
    cdf = np.array([np.asarray(s)[0] for s in stats])
    level = np.array([cdf[i, n - 1] for i, n in enumerate(got)])
    under = np.array([cdf[i, n - 2] for i, n in enumerate(got)])
    # One level p separates what is kept from what is not, but for the entries that rounding hands out.
    assert level.min() > under.max() - 0.05
    for i in range(L):
        s, v = (x[0] for x in scores_of(i))
        mean = np.where(v & (s < PROTECTED), s, 0).mean(0)
        np.testing.assert_allclose(cdf[i, -1], 1, rtol=1e-5)
        np.testing.assert_allclose(cdf[i, :5], np.cumsum(np.sort(mean)[::-1])[:5] / mean.sum(), rtol=1e-4)


def test_density_is_the_spread_of_column_sums():
    obs = observation(3)
    got = _measure(layers.Density(), obs, jnp.asarray(scores_of(0)[0]))
    full = attention(obs)
    for row, n in enumerate(LENGTHS):
        var = full[row].sum(1)[:, :n].var(axis=1, ddof=1)
        np.testing.assert_allclose(got[row], ((var - var.min()) / (var.max() - var.min())).mean(), rtol=1e-4)


def test_density_leaves_whole_layers_inside_the_budget():
    u = [np.full(B, x, np.float32) for x in (0.1, 0.5, 0.9, 0.3)]
    got = model_counts(layers.Density(first=1, last=1), 30, u)
    for row, n in enumerate(LENGTHS):
        assert (got[row, [0, 3]] == n).all() and got[row].sum() == L * H * 30
        assert got[row, 1, 0] > got[row, 2, 0]
    tight = model_counts(layers.Density(first=1, last=1), 10, u)
    assert (tight < LENGTHS[:, None, None]).all() and (tight.sum((1, 2)) == L * H * 10).all()


def test_layer_errors_share_the_budget_above_the_floor():
    errors = (0.1, 0.2, 0.3, 0.4)
    allocator = layers.LayerErrors(errors, floor=5)
    stats = [np.full(B, e, np.float32) for e in errors]
    got = model_counts(allocator, 10, stats)
    np.testing.assert_array_equal(got[0, :, 0], [5 + 2, 5 + 4, 5 + 6, 5 + 8])
    assert allocator.head_capacity(10, 100, H) == 30


# ---- heads


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
    stats = _measure(allocator, obs, scores)
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
    sizes = _measure(allocator, obs, jnp.asarray(scores_of(0)[0]))
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


# ---- tables


def test_layer_table_matches_kvpress_counts():
    ratios = FIXTURE["per_layer/ratios"]
    table = tables.LayerTable(tuple(float(1 - r) for r in ratios))
    assert [table.layer_keep(i, 3, None, 40) for i in range(3)] == FIXTURE["per_layer/kept"].tolist()
    np.testing.assert_array_equal(table.layer_keep(0, 3, None, jnp.asarray([40, 11])), [36, 9])


def test_head_table():
    table = tables.HeadTable(((0.25, 20), (100, 1.0)))
    scores, valid = (jnp.asarray(x) for x in scores_of(0))
    args = None, jnp.asarray(LENGTHS)
    got = [np.asarray(table.layer_counts(scores, valid, None, i, 2, args[1], None)) for i in range(2)]
    np.testing.assert_array_equal(got[0], [[12, 20], [9, 20]])
    np.testing.assert_array_equal(got[1], [[48, 48], [37, 37]])
    assert table.layer_keep(0, 2, None, 48) == 16 and table.head_capacity(16, 48, 2) == 48


# ---- the cache


SHAPE = ModelShape(4, 4, 2, 64, (None,) * 4)
INLINE = "heads=((0.1, 0.9), (0.8, 0.2), (0.3, 0.4), (0.5, 0.6))"


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 512])
@pytest.mark.parametrize(
    "spec",
    ["pyramidkv()", "zigzagkv()", "cake()", "dynamickv()", "prefixkv()", "d2o()", "fastgen()", "taskkv()"]
    + [f"{n}({INLINE})" for n in ("headkv", "headkv_r2", "duoattention")],
)
def test_bytes_stay_within_the_budget(spec, budget):
    """Allocated after prefill: the budget's share of the full cache x 1.03, and a page of slack per head."""
    name, _, rest = spec.partition("(")
    policy = parse(f"{name}(budget={budget}, {rest}")
    got = Plan(policy, SHAPE, 2, 4096, 0).nbytes()
    full = Plan(parse("full"), SHAPE, 2, 4096, 0).nbytes()
    share = budget if isinstance(budget, float) else budget / 4096
    page = 2 * SHAPE.layers * SHAPE.kv_heads * 16 * 2 * 64 * 4
    tables_ = 2 * SHAPE.layers * SHAPE.kv_heads * 4096 // 16 * 4
    state = 1.02 if policy.scorer.slot_state() else 1.0  # f32 per slot beside 2 x 64 f32
    pages = 1 + policy.evict_decode  # room for the token that comes before one leaves
    assert got <= share * full * 1.03 * state + pages * page + tables_


SPECS = ["keydiff(budget=0.4) | zigzagkv", f"keydiff(budget=13) | duoattention({INLINE}, sink=1, recent=2)"]
SPECS += ["snapkv(budget=0.3, window=4) | pyramidkv(beta=3)", "h2o(budget=12, recent=3) | dynamickv"]


@pytest.mark.parametrize("spec", SPECS)
def test_pools_never_overflow(spec):
    """Every promised entry has a page, in prefill and after as many steps as were reserved."""
    lm, lengths, reserve = Toy(layers=4), (40, 29, 7), 6
    policy = parse(spec)
    plan = Plan(policy, lm.shape, 3, 40, reserve, page_size=4)
    tokens, positions = ragged(lengths, 40)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    held = lambda c: np.stack([(np.asarray(ops.view(plan, c, i).pos) >= 0).sum(-1) for i in range(4)], 1)  # noqa: E731
    fill = np.stack([np.asarray(layer.fill) for layer in cache.layers], 1)
    np.testing.assert_array_equal(held(cache), fill)
    np.testing.assert_array_equal(fill.sum((1, 2)), [4 * 2 * policy.keep(n) for n in lengths])
    used = np.concatenate([np.asarray(layer.table).ravel() for layer in cache.layers])
    used = used[used >= 0]
    assert len(set(used.tolist())) == used.size <= cache.pools[0].pos.shape[0]
    before = held(cache)
    params = jax.tree.map(jnp.asarray, lm.init())
    _, cache = steps(lm, plan, params, cache, np.arange(3 * reserve).reshape(3, reserve))
    want = before + reserve
    if policy.evict_decode:
        want = np.stack([np.asarray(layer.limit) for layer in cache.layers], 1)
        want = np.minimum(before + reserve, want)
    np.testing.assert_array_equal(held(cache), want)


def test_fixed_roles_through_the_cache():
    """sparsity=0.5: the two best heads hold every token, the others sinks and the window."""
    lm, lengths = Toy(), (40, 29, 3)
    policy = parse("duoattention(heads=((0.1, 0.9), (0.8, 0.2)), sink=2, recent=4, sparsity=0.5)")
    plan = Plan(policy, lm.shape, 3, 40, 4, page_size=4)
    tokens, positions = ragged(lengths, 40)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    for i, full_head in enumerate((1, 0)):
        pos = np.asarray(ops.view(plan, cache, i).pos)
        for row, n in enumerate(lengths):
            held = [sorted(x[x >= 0].tolist()) for x in pos[row]]
            assert held[full_head] == list(range(n))
            assert held[1 - full_head] == sorted({*range(min(2, n)), *range(max(n - 4, 0), n)})


def test_a_question_after_a_shared_pool_keeps_every_layer():
    """Extending without compression re-packs all layers that share a pool, not one over the others."""
    lm = Toy(layers=4)
    policy = parse("h2o(budget=12, recent=3) | zigzagkv")
    plan = Plan(policy, lm.shape, 2, 40, 8, page_size=4)
    tokens, positions = ragged((40, 29), 40)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    limits = np.stack([np.asarray(layer.limit) for layer in cache.layers])
    more, at = np.arange(6).reshape(2, 3), np.array([[40, 41, 42], [29, 30, -1]])
    _, cache = engine.extend(lm, plan, lm.init(), cache, more, at, compress=False)
    for i in range(4):
        pos = np.asarray(ops.view(plan, cache, i).pos)
        np.testing.assert_array_equal((pos >= 0).sum(-1), np.minimum(limits[i], 12 * 4))
        for row, newest in enumerate((42, 30)):
            assert (pos[row].max(-1) == newest).all()
            for h in range(2):
                x = pos[row, h][pos[row, h] >= 0]
                assert len(set(x.tolist())) == x.size


# ---- errors


@pytest.mark.parametrize(
    "spec, words",
    [
        ("pyramidkv(beta=0)", "beta"),
        ("zigzagkv(p=0.0)", "p must be"),
        ("cake(window=1)", "window"),
        ("cake(ceiling=0)", "ceiling"),
        ("dynamickv(rho=0)", "rho"),
        ("headkv(heads=((1, 2), (3,)))", "heads"),
        ("headkv(heads='nowhere.safetensors')", "nowhere.safetensors"),
        ("duoattention(sparsity=1.5)", "sparsity"),
        ("duoattention(sparsity=0.5, budget=0.5)", "exclude"),
        ("per_layer(layer_budgets=(0.5, 0))", "budget is"),
        ("per_head(head_budgets=((2.0, 1),))", "budget is"),
        ("fastgen(threshold=2.0)", "threshold"),
        ("taskkv(m=0)", "m"),
        ("keydiff(budget=0.5) | pyramidkv | zigzagkv", "exclude"),
    ],
)
def test_bad_arguments(spec, words):
    with pytest.raises(ValueError, match=words):
        parse(spec)


def test_tables_and_files_of_another_model_are_refused():
    for policy in (
        build("per_layer", layer_budgets=(0.5,) * 3),
        build("per_head", head_budgets=((0.5, 0.5),) * 3),
        build("headkv", heads=((1.0, 1.0),) * 3),
        build("duoattention", heads=((1.0,),) * 4),
    ):
        with pytest.raises(ValueError, match="the model has 4 layers"):
            Plan(policy, SHAPE, 1, 64, 0)
    with pytest.raises(ValueError, match="another model"):
        Plan(build("headkv"), SHAPE, 1, 64, 0)
