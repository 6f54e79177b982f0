"""What prefill patterns estimate, against float64 loops: masses, recall, columns, diagonals, the choice of a pattern."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies.prefill_patterns.blocks import Blocks, covering, largest
from kvjax.policies.prefill_patterns.flexprefill import divergence
from kvjax.policies.prefill_patterns.static import AShape
from kvjax.policies.prefill_patterns.vertical_slash import VerticalSlash
from kvjax.policies.prefill_patterns.xattention import XAttention, antidiagonal_mass
from tests.policies.observations import Q_HEADS
from tests.policies.pattern_cases import BLOCK, LENGTHS, PATTERNS, SLOTS, case, causal, exact, mask_of


def test_xattention_with_stride_1_is_the_exact_mass_and_keeps_its_share():
    obs = case(6)
    x = Blocks(obs, BLOCK, 4, True)
    mass = np.asarray(antidiagonal_mass(x, 1))
    probs = exact(obs)[2]
    n = -(-SLOTS // BLOCK)
    pad = np.pad(probs, ((0, 0), (0, 0), (0, n * BLOCK - SLOTS), (0, n * BLOCK - SLOTS)))
    want = pad.reshape(2, Q_HEADS, n, BLOCK, n, BLOCK).sum((3, 5))
    np.testing.assert_allclose(mass, want, rtol=1e-4, atol=1e-5)
    for threshold in (0.5, 0.8, 0.95):
        keep = mask_of(XAttention(stride=1, threshold=threshold, block=BLOCK, min_recall=0), obs)
        assert ((want * keep).sum(-1) >= threshold * want.sum(-1) - 1e-5).all()
        # As few as possible: without its least block beside the forced ones, a row is short of the threshold.
        for at in np.ndindex(keep.shape[:3]):
            extra = [j for j in range(1, at[2]) if keep[(*at, j)]]
            if extra:
                less = (want[at] * keep[at]).sum() - min(want[(*at, j)] for j in extra)
                assert less < threshold * want[at].sum() + 1e-5


def test_xattention_strides_average_antidiagonals():
    obs = case(7, lengths=(30, 20)).replace(softcap=4.0)
    stride, n = 2, 30
    q, k = np.asarray(obs.q, np.float64)[0], np.asarray(obs.k, np.float64)[0]
    got = np.asarray(antidiagonal_mass(Blocks(obs, BLOCK, 4, True), stride))[0]
    tiles = n // stride
    for h in range(Q_HEADS):
        want = np.zeros((8, 8))
        for r in range(tiles):
            logit = np.asarray(
                [
                    sum(q[h, r * stride + stride - 1 - p] @ k[h // 2, c * stride + p] for p in range(stride))
                    for c in range(r + 1)
                ]
            )
            e = np.exp(4.0 * np.tanh(logit * obs.scale / stride / 4.0))
            for c in range(r + 1):
                want[r * stride // BLOCK, c * stride // BLOCK] += e[c] / e.sum()
        np.testing.assert_allclose(got[h], want, rtol=1e-4, atol=1e-5)


def test_recall_and_fallback_are_per_head():
    obs = case(8)
    pattern = PATTERNS["a_shape"]
    keep, probs = mask_of(pattern, obs), exact(obs)[2]
    want = np.zeros((2, Q_HEADS))
    for b, n in enumerate(LENGTHS):
        for h in range(Q_HEADS):
            seen = [keep[b, h, t // BLOCK, np.arange(SLOTS) // BLOCK] for t in range(n - 5, n)]
            want[b, h] = np.mean([probs[b, h, t] @ s for t, s in zip(range(n - 5, n), seen)])
    got = np.asarray(Blocks(obs, BLOCK, 5, True).recall(jnp.asarray(keep)))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    limit = float(np.median(want))
    mixed = mask_of(dataclasses.replace(pattern, sample=5, min_recall=limit), obs)
    for b, h in np.ndindex(2, Q_HEADS):
        expected = causal(obs)[b, 0] if want[b, h] < limit else keep[b, h]
        np.testing.assert_array_equal(mixed[b, h], expected)


def test_recall_of_spread_queries_speaks_for_the_whole_prompt():
    """Sampled at even distances, the last token included; in a row shorter than the sample some count twice."""
    obs, sample = case(13), 6
    keep, probs = mask_of(PATTERNS["a_shape"], obs), exact(obs)[2]
    want = np.zeros((2, Q_HEADS))
    for b, n in enumerate(LENGTHS):
        at = [(i + 1) * n // sample - 1 for i in range(sample)]
        assert at[-1] == n - 1
        for h in range(Q_HEADS):
            want[b, h] = np.mean(
                [probs[b, h, t] @ keep[b, h, t // BLOCK, np.arange(SLOTS) // BLOCK] for t in at]
            )
    got = np.asarray(Blocks(obs, BLOCK, sample, True).recall(jnp.asarray(keep), spread=True))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert np.abs(got - np.asarray(Blocks(obs, BLOCK, sample, True).recall(jnp.asarray(keep)))).max() > 0.01
    limit = float(np.median(want))
    pattern = dataclasses.replace(PATTERNS["a_shape"], sample=sample, min_recall=limit, spread=True)
    mixed = mask_of(pattern, obs)
    for b, h in np.ndindex(2, Q_HEADS):
        np.testing.assert_array_equal(mixed[b, h], causal(obs)[b, 0] if want[b, h] < limit else keep[b, h])
    every = Blocks(obs, BLOCK, SLOTS, True).recall(jnp.asarray(causal(obs)), spread=True)
    np.testing.assert_allclose(np.asarray(every), 1.0, rtol=1e-6)


def test_vertical_slash_takes_the_largest_sums():
    obs, sample = case(9), 5
    probs = exact(obs)[2]
    pattern = VerticalSlash(vertical=3, slash=3, first=1, nearest=1, block=BLOCK, sample=sample, min_recall=0)
    keep = mask_of(pattern, obs)
    for b, n in enumerate(LENGTHS):
        for h in range(Q_HEADS):
            last = probs[b, h, n - sample : n, :n]
            columns, apart = last.sum(0), np.zeros(n)
            for r in range(sample):
                for s in range(n - sample + r + 1):
                    apart[n - sample + r - s] += last[r, s]
            columns[0] = apart[0] = np.inf
            vertical, slash = np.argsort(-columns)[:3], np.argsort(-apart)[:3]
            want = np.zeros(keep.shape[2:], bool)
            for t in range(n):
                for s in [*vertical, *(t - slash), 0, t]:
                    if 0 <= s <= t:
                        want[t // BLOCK, s // BLOCK] = True
            for i in range(-(-n // BLOCK)):  # a column's block is read by every later query block
                want[i, [s // BLOCK for s in vertical if s // BLOCK <= i]] = True
            np.testing.assert_array_equal(keep[b, h], want)


def test_diagonal_sums_do_not_depend_on_how_they_are_found():
    obs = case(10)
    fast = np.asarray(Blocks(obs, BLOCK, 5, True).distance_mass)
    slow = np.asarray(Blocks(obs, BLOCK, 5, False).distance_mass)
    np.testing.assert_allclose(fast, slow, atol=1e-6)
    np.testing.assert_allclose(fast.sum(-1), 5.0, rtol=1e-5)


def test_minference_takes_the_cheapest_pattern_that_recalls_enough():
    obs, pattern = case(11, scale=6.0), PATTERNS["minference"]
    x = Blocks(obs, BLOCK, pattern.sample, True)
    keep = mask_of(pattern, obs)
    shape = AShape(sink=1, window=3, block=BLOCK)
    lines = VerticalSlash(vertical=2, slash=3, first=1, nearest=1, block=BLOCK, sample=5, min_recall=0)
    sparse = dataclasses.replace(pattern, vertical=0, slash=0, first=0, nearest=0, window=0, min_recall=0.999)
    options = [mask_of(shape, obs), mask_of(lines, obs)]
    recall = [np.asarray(x.recall(jnp.asarray(o))) for o in options]
    chosen = set()
    for b, h in np.ndindex(2, Q_HEADS):
        fits = [i for i in range(2) if recall[i][b, h] >= 0.6]
        cost = keep[b, h].sum()
        if fits:
            assert cost <= min(options[i][b, h].sum() for i in fits)
        chosen.add(next((i for i in range(2) if (options[i][b, h] == keep[b, h]).all()), 2))
    assert len(chosen) > 1
    assert (np.asarray(x.recall(jnp.asarray(keep))) >= 0.6).all()
    assert (mask_of(sparse, obs).sum((2, 3)) >= keep.sum((2, 3))).all()


@pytest.mark.slow
def test_flexprefill_chooses_by_divergence():
    p = np.asarray([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    q = np.asarray([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        np.asarray(divergence(jnp.asarray(p), jnp.asarray(q))), [0.0, np.log(2) ** 0.5], atol=1e-6
    )
    obs = case(12)
    aware = dataclasses.replace(PATTERNS["flexprefill"], tau=9.0, min_budget=0)
    keep = mask_of(aware, obs)
    # The query-aware map: softmax of pooled products per row, cut where its largest entries hold gamma.
    b, h, n = 0, 1, LENGTHS[0]
    q, k = np.asarray(obs.q, np.float64)[b, h], np.asarray(obs.k, np.float64)[b, 0]
    cut = [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
    rows = np.stack([q[c].mean(0) for c in cut]) @ np.stack([k[c].mean(0) for c in cut]).T * obs.scale
    rows = np.where(np.tril(np.ones(rows.shape, bool)), np.exp(rows), 0)
    rows /= rows.sum(1, keepdims=True)
    order = np.argsort(-rows.ravel())
    count = np.searchsorted(np.cumsum(rows.ravel()[order]), 0.6 * rows.sum()) + 1
    want = np.zeros(rows.size, bool)
    want[order[:count]] = True
    missing = want.reshape(rows.shape) & ~keep[b, h]
    assert not missing.any()
    more = {g: mask_of(dataclasses.replace(aware, gamma=g), obs).sum() for g in (0.3, 0.6, 0.9)}
    assert more[0.3] < more[0.6] < more[0.9]
    lines = mask_of(dataclasses.replace(PATTERNS["flexprefill"], tau=0.0), obs)
    assert (lines != keep).any()


def test_largest_and_covering_against_sorting():
    rng = np.random.default_rng(0)
    x = rng.random((5, 40)).astype(np.float32)
    x[0, :7] = 0.5
    for count in (1, 3, 39, 40):
        got = np.asarray(largest(jnp.asarray(x), count))
        edge = np.sort(x, axis=1)[:, -count][:, None]
        np.testing.assert_array_equal(got, x >= edge)
    assert not np.asarray(largest(jnp.asarray(x), 0)).any()
    for share in (0.1, 0.5, 0.99):
        got = np.asarray(covering(jnp.asarray(x), share * jnp.sum(jnp.asarray(x), -1)))
        for row, keep in zip(x.astype(np.float64), got):
            order = np.sort(row)[::-1]
            count = np.searchsorted(np.cumsum(order), share * row.sum() - 1e-6) + 1
            np.testing.assert_array_equal(keep, row >= order[count - 1])
