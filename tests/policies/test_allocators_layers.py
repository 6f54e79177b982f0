"""Layers that compete: each card's own property, on scores made by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import parse
from kvjax.policies.allocators import layers
from kvjax.policies.base import PROTECTED
from tests.policies.allocator_cases import (
    LENGTHS,
    B,
    H,
    L,
    attention,
    counts_of_layers,
    measure,
    model_counts,
    observation,
    scores_of,
)

COMPETING = [
    layers.Uncertainty(),
    layers.Preference(window=4),
    layers.GlobalTop(),
    layers.GlobalPrefix(),
    layers.Density(),
    layers.LayerErrors((0.25,) * L, floor=2),
]


@pytest.mark.parametrize("allocator", COMPETING, ids=lambda a: type(a).__name__)
def test_equal_layers_get_equal_budgets(allocator):
    stats = [measure(allocator, observation(0), jnp.asarray(scores_of(0)[0])) for _ in range(L)]
    keep = 12
    got = model_counts(allocator, keep, stats if stats[0] is not None else None, same=True)
    np.testing.assert_array_equal(got, np.full((B, L, H), keep))


@pytest.mark.parametrize("keep", [6, 20, 36, 47])
@pytest.mark.parametrize("allocator", COMPETING, ids=lambda a: type(a).__name__)
def test_the_layers_together_keep_the_budget(allocator, keep):
    """Exactly where something competes, whatever the layers look like; the window is in every layer."""
    stats = [measure(allocator, observation(i), jnp.asarray(scores_of(i)[0])) for i in range(L)]
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
    got = measure(layers.Uncertainty(0.9), observation(), jnp.asarray(scores))
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
    got = measure(layers.Preference(window=4, tau1=1.6, tau2=0.5), obs, jnp.asarray(scores_of(0)[0]))
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
    got = np.asarray(counts_of_layers(allocator, scores, valid, *args, [None] * L))
    free = [np.where(v & (s < PROTECTED), s, -np.inf)[0] for s, v in boosted]
    wanted = L * H * (keep - 4)
    level = np.sort(np.concatenate([f.ravel() for f in free]))[::-1][wanted - 1]
    won = np.array([(f >= level).sum() for f in free])
    assert won.sum() == wanted
    np.testing.assert_allclose(got[0, :, 0] - 4, won / H, atol=1)
    tight = np.asarray(counts_of_layers(layers.GlobalTop(rho=1), scores, valid, *args, [None] * L))
    assert tight.sum() == got.sum()


def test_prefix_keeps_one_level_of_mass():
    stats = [measure(layers.GlobalPrefix(), observation(i), jnp.asarray(scores_of(i)[0])) for i in range(L)]
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
    got = measure(layers.Density(), obs, jnp.asarray(scores_of(0)[0]))
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
