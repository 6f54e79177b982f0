"""Reducers against float64 loops: what merges into the most similar survivor, and what stays bit-identical."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import Observation, parse
from kvjax.policies.reducers import neighbours, similar
from kvjax.policies.reducers.nearest import nearest
from kvjax.policies.scorers.temporal import GlobalLocal
from tests.policies.reducer_cases import (
    FIXTURE,
    LENGTHS,
    B,
    D,
    H,
    S,
    check,
    choose,
    cosines,
    flat_scores,
    observation,
    reduce,
)

REDUCERS = [
    similar.MergeValues(),
    similar.MergeSimilar(),
    similar.EvictThenMerge(threshold=-1.0),
    neighbours.Anchors(),
    neighbours.GaussianSets(0.0),
    neighbours.ChunkClusters(8),
    neighbours.ValueCascade(4),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda r: type(r).__name__)
def test_without_losers_nothing_changes(reducer):
    obs = observation()
    index = jnp.where(obs.valid, jnp.arange(S), S)
    k, v = reduce(reducer, obs, index, flat_scores())
    for b, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(k[b, :, :n], obs.k[b, :, :n])
        np.testing.assert_array_equal(v[b, :, :n], obs.v[b, :, :n])


def test_nearest_in_blocks():
    rng = np.random.default_rng(0)
    keys, centres = rng.standard_normal((1, 1, 600, 4)), rng.standard_normal((1, 1, 9, 4))
    usable = np.ones((1, 1, 9), bool)
    usable[..., 3] = False
    cosine, place = nearest(jnp.asarray(keys), jnp.asarray(centres), jnp.asarray(usable))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    want = np.where(usable[0, 0], unit(keys[0, 0]) @ unit(centres[0, 0]).T, -np.inf)
    np.testing.assert_array_equal(place[0, 0], want.argmax(-1))
    np.testing.assert_allclose(cosine[0, 0], want.max(-1), atol=1e-6)


@pytest.mark.parametrize("threshold, fraction", [(0.0, 1.0), (0.3, 1.0), (0.0, 0.5)])
def test_merging_matches_kvpress(threshold, fraction):
    k, v = jnp.asarray(FIXTURE["merge/k"]), jnp.asarray(FIXTURE["merge/v"])
    index = jnp.asarray(FIXTURE["merge/index"])
    pos = jnp.broadcast_to(jnp.arange(40), (2, 2, 40))
    obs = Observation(q=None, q_pos=None, k=k, v=v, pos=pos, length=jnp.asarray([40, 40]))
    got_k, got_v = reduce(similar.MergeValues(threshold, fraction), obs, index, None)
    np.testing.assert_array_equal(
        got_k, np.take_along_axis(FIXTURE["merge/k"], np.asarray(index)[..., None], 2)
    )
    np.testing.assert_allclose(got_v, FIXTURE[f"merge/{threshold}/{fraction}"], atol=1e-5)


def test_merged_values_lie_in_the_hull_and_threshold_one_evicts():
    obs, (index, lists) = observation(), choose()
    _, v = reduce(similar.MergeValues(), obs, index, None)
    _, plain = reduce(similar.MergeValues(1.0), obs, index, None)
    values = np.asarray(obs.v)
    for (b, h), chosen in lists.items():
        n = LENGTHS[b]
        assert (np.asarray(v)[b, h, : len(chosen)] <= values[b, h, :n].max(0) + 1e-5).all()
        np.testing.assert_array_equal(np.asarray(plain)[b, h, : len(chosen)], values[b, h, chosen])


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_d2o_merges_what_resembles_a_survivor(threshold):
    obs, (index, lists) = observation(), choose()
    k, v = reduce(similar.MergeSimilar(threshold), obs, index, None)
    want_k, want_v = {}, {}
    for b in range(B):
        best = {}
        for h in range(H):
            c = cosines(obs.k[b, h], LENGTHS[b])
            for i in set(range(LENGTHS[b])) - set(lists[b, h]):
                best[h, i] = max((c[i, j], -n) for n, j in enumerate(lists[b, h]))
        level = np.mean([u for u, _ in best.values()]) if threshold is None else threshold
        for h in range(H):
            for want, x in ((want_k, obs.k), (want_v, obs.v)):
                x = np.asarray(x, np.float64)[b, h]
                out = x[lists[b, h]].copy()
                for n in range(len(out)):
                    mine = [
                        (u, i) for (hh, i), (u, at) in best.items() if hh == h and -at == n and u >= level
                    ]
                    out[n] = (out[n] + sum(u * x[i] for u, i in mine)) / (1 + len(mine))
                want[b, h] = out
    check(k, want_k, lists)
    check(v, want_v, lists)


def test_d2o_duplicates_merge_without_change_and_high_thresholds_evict():
    base = observation()
    k, v = np.asarray(base.k).copy(), np.asarray(base.v).copy()
    k[:, :, 1], v[:, :, 1] = k[:, :, 0], v[:, :, 0]
    obs = base.replace(k=jnp.asarray(k), v=jnp.asarray(v))
    index = jnp.asarray(np.broadcast_to(np.r_[0, 2, 5, 9], (B, H, 4)).astype(np.int32))
    got_k, got_v = reduce(similar.MergeSimilar(0.99999), obs, index, None)
    np.testing.assert_allclose(got_k, k[:, :, [0, 2, 5, 9]], atol=1e-6)
    np.testing.assert_allclose(got_v, v[:, :, [0, 2, 5, 9]], atol=1e-6)
    none_k, _ = reduce(similar.MergeSimilar(1.5), obs, index, None)
    np.testing.assert_array_equal(none_k, k[:, :, [0, 2, 5, 9]])


@pytest.mark.parametrize("threshold", [1.5, 0.2, -1.0])
def test_ems_zero_class(threshold):
    """Candidates below the threshold leave all centres bit-identical; weights are the scores."""
    obs, (index, lists) = observation(), choose()
    scores = flat_scores()
    k, v = reduce(similar.EvictThenMerge(threshold, sources=1.0), obs, index, scores)
    want_k, want_v = {}, {}
    for (b, h), chosen in lists.items():
        c, n = cosines(obs.k[b, h], LENGTHS[b]), LENGTHS[b]
        s = np.asarray(scores, np.float64)[b, h] + 1e-6
        lost = sorted(set(range(n)) - set(chosen), key=lambda i: -s[i])[: len(chosen)]
        for want, x in ((want_k, obs.k), (want_v, obs.v)):
            x = np.asarray(x, np.float64)[b, h]
            total, weight = x[chosen] * s[chosen, None], s[chosen].copy()
            for i in lost:
                at = int(np.argmax(c[i, chosen]))
                if c[i, chosen[at]] >= threshold:
                    total[at] += s[i] * x[i]
                    weight[at] += s[i]
            want[b, h] = total / weight[:, None]
    check(k, want_k, lists)
    check(v, want_v, lists)
    if threshold > 1:
        for (b, h), chosen in lists.items():
            np.testing.assert_array_equal(np.asarray(k)[b, h, : len(chosen)], np.asarray(obs.k)[b, h, chosen])


def test_ems_score():
    obs = observation()
    got, _ = jax.jit(lambda o: GlobalLocal(window=4, kernel=3).score(o, {}))(obs)
    for b, n in enumerate(LENGTHS):
        for h in range(H):
            a = np.zeros((n, n))
            for g in (2 * h, 2 * h + 1):
                for i in range(n):
                    x = (
                        np.asarray(obs.k, np.float64)[b, h, : i + 1]
                        @ np.asarray(obs.q, np.float64)[b, g, i]
                        * D**-0.5
                    )
                    e = np.exp(x - x.max())
                    a[i, : i + 1] += e / e.sum() / 2
            overall = a.sum(0) / (n - np.arange(n))
            last = np.pad(a[-4:].mean(0), 1)
            local = (last[:-2] + last[1:-1] + last[2:]) / 3
            want = np.maximum(local, overall * local.sum() / overall.sum())
            np.testing.assert_allclose(got[b, h, :n], want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("merging(fraction=0.0)", "fraction"),
        ("d2o(weights=raw)", "weights"),
        ("ems(kernel=4)", "kernel"),
        ("kvmerger(threshold=2.0)", "threshold"),
        ("chelsea(chunk=12)", "chunk"),
        ("cam(m=0)", "m must"),
        ("merging | ems", "exclude"),
    ],
)
def test_bad_arguments(spec, words):
    with pytest.raises(ValueError, match=words):
        parse(spec)
