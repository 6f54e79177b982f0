"""Allocators: exact totals, pyramids, tables and kvpress' arithmetic, on scores made by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.plan import Plan
from kvjax.policies import parse
from kvjax.policies.allocators import pyramid, shares, tables
from kvjax.policies.base import PROTECTED
from kvjax.policies.registry import build
from kvjax.types import ModelShape
from tests.policies.allocator_cases import (
    FIXTURE,
    LENGTHS,
    B,
    H,
    L,
    model_counts,
    scores_of,
)

SHAPE = ModelShape(4, 4, 2, 64, (None,) * 4)


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
