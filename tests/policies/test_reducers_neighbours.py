"""Reducers that merge into neighbours, against float64 loops: Elastic Cache, KVMerger, Chelsea, CaM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import parse
from kvjax.policies.base import PROTECTED
from kvjax.policies.reducers import neighbours
from kvjax.policies.reducing import LOG_COUNT
from kvjax.policies.scorers.temporal import Redundancy
from tests.policies.reducer_cases import (
    LENGTHS,
    B,
    D,
    H,
    S,
    check,
    choose,
    cosines,
    observation,
    reduce,
)


def test_anchors_are_the_exact_means_of_their_clusters():
    obs, (index, lists) = observation(), choose()
    k, v = reduce(neighbours.Anchors(), obs, index, None)
    want_k, want_v = {}, {}
    for (b, h), chosen in lists.items():
        owner = [min(chosen, key=lambda j: (abs(i - j), j)) for i in range(LENGTHS[b])]
        for want, x in ((want_k, obs.k), (want_v, obs.v)):
            x = np.asarray(x, np.float64)[b, h]
            want[b, h] = np.array([x[[i for i, o in enumerate(owner) if o == j]].mean(0) for j in chosen])
    check(k, want_k, lists)
    check(v, want_v, lists)


def test_kvmerger_sets_and_weights():
    rng = np.random.default_rng(5)
    walk = np.cumsum(rng.standard_normal((B, H, S, D)) * 0.5, axis=2)  # neighbours resemble each other
    obs, (index, lists) = observation(k=walk), choose(keep=8)
    scores = np.random.default_rng(3).random((B, H, S)).astype(np.float32)
    scores[:, :, 3] = PROTECTED
    eps = 0.8
    k, v = reduce(neighbours.GaussianSets(eps), obs, index, jnp.asarray(scores))
    want_k, want_v, merged = {}, {}, 0
    for (b, h), chosen in lists.items():
        n, c = LENGTHS[b], cosines(walk[b, h], LENGTHS[b])
        group = np.zeros(n, int)
        for i in range(1, n):
            joined = c[i, i - 1] >= eps and 3 not in (i, i - 1)
            group[i] = group[i - 1] + (not joined)
        owner = {}
        for i in range(n):
            mine = [j for j in chosen if group[j] == group[i]]
            if mine:
                owner[i] = min(mine, key=lambda j: (abs(i - j), j))
        for want, x in ((want_k, obs.k), (want_v, obs.v)):
            x, keys, out = np.asarray(x, np.float64)[b, h], walk[b, h], []
            for j in chosen:
                others = [i for i, o in owner.items() if o == j and i not in chosen]
                merged += len(others)
                far = np.array([((keys[i] - keys[j]) ** 2).sum() for i in others])
                w = np.zeros(0)
                if len(far):
                    sigma2 = far.mean()
                    for _ in range(2):
                        w = np.exp(-far / (2 * sigma2))
                        sigma2 = ((1 + w.sum()) / (np.sqrt(2) * (1 + len(far)))) ** 2
                out.append((x[j] + sum(a * x[i] for a, i in zip(w, others))) / (1 + w.sum()))
            want[b, h] = np.array(out)
    assert merged > 20
    check(k, want_k, lists, atol=2e-4)
    check(v, want_v, lists, atol=2e-4)


def test_chelsea_ranks_sources_by_similarity():
    obs, chunk = observation(), 8
    got, _ = jax.jit(lambda o: Redundancy(chunk).score(o, {}))(obs)
    for b, n in enumerate(LENGTHS):
        c = cosines(obs.k[b, 1], n)
        for i in range(n):
            place = i % chunk
            level = (~place & (place + 1)).bit_length() - 1
            base = i - place
            targets = [
                j
                for j in range(base, min(base + chunk, n))
                if (~(j - base) & (j - base + 1)).bit_length() - 1 > level
            ]
            best = max((c[i, j] for j in targets), default=-1.0)
            np.testing.assert_allclose(got[b, 1, i], 3 * level - max(best, -1.0), atol=1e-5)


def test_chelsea_pairs_with_equal_keys_become_one():
    """Pairs (2i, 2i+1) with equal keys and values: half the entries give the same attention output."""
    rng = np.random.default_rng(2)
    k, v = (np.repeat(rng.standard_normal((B, H, S // 2, D)), 2, axis=2) for _ in range(2))
    obs = observation(k=k, v=v)
    scores = Redundancy(8).score(obs, {})[0]
    policy = parse("chelsea(chunk=8, sink=0, recent=0)")
    lengths = jnp.asarray(LENGTHS)
    kept = policy.allocator.counts(scores, obs.valid, jnp.asarray([20, 15]), 0)
    index = policy.selection.select(policy.protect(scores, obs.pos, lengths), obs.valid, kept, 20)
    got_k, got_v = reduce(policy.reducer, obs, index, scores)
    q = rng.standard_normal(D)
    for h in range(H):

        def attend(keys, values):
            e = np.exp(np.asarray(keys, np.float64) @ q)
            return e @ np.asarray(values, np.float64) / e.sum()

        np.testing.assert_allclose(attend(got_k[0, h], got_v[0, h]), attend(k[0, h], v[0, h]), atol=1e-5)


@pytest.mark.parametrize("reducer", [neighbours.ChunkClusters(8, True), neighbours.GaussianSets(0.999, True)])
def test_counted_clusters_of_equal_entries_are_exact(reducer):
    """Runs of 3, 2 and 1 equal entries with sizes in the logits: the attention of all, merged once or twice."""
    rng = np.random.default_rng(2)
    runs = np.repeat(np.arange(20), [1, 3, 2, 2] * 5)
    k, v = (rng.standard_normal((B, H, 20, D))[:, :, runs] for _ in range(2))
    obs, scores = observation(k=k, v=v), jnp.zeros((B, H, S))
    first = np.r_[0, 1 + np.flatnonzero(np.diff(runs))]
    some, state = np.union1d(first, [2, 6]), {LOG_COUNT: jnp.zeros((B, H, S))}
    apply = jax.jit(reducer.apply)
    index = jnp.broadcast_to(jnp.asarray(np.r_[some, [S] * (S - len(some))]), (B, H, S))
    k1, v1, counts = apply(obs, index, scores, state)
    pos = jnp.where(index < S, index, -1)
    again = jnp.asarray(np.r_[np.flatnonzero(np.isin(some, first)), [S] * (S - 20)])
    k2, v2, counts = apply(
        obs.replace(k=k1, v=v1, pos=pos), jnp.broadcast_to(again, (B, H, S)), scores, counts
    )
    np.testing.assert_allclose(np.exp(counts[LOG_COUNT][0, 0, :20]), [1, 3, 2, 2] * 5, rtol=1e-5)
    q = rng.standard_normal(D)
    for h in range(H):

        def attend(keys, values, log_count):
            e = np.exp(np.asarray(keys, np.float64) @ q + log_count)
            return e @ np.asarray(values, np.float64) / e.sum()

        want = attend(k[0, h], v[0, h], 0)
        got = attend(k2[0, h, :20], v2[0, h, :20], np.asarray(counts[LOG_COUNT])[0, h, :20])
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_chelsea_clusters_stay_in_their_chunk():
    obs, (index, lists) = observation(), choose()
    k, v = reduce(neighbours.ChunkClusters(8), obs, index, None)
    want_k, want_v = {}, {}
    for (b, h), chosen in lists.items():
        c = cosines(obs.k[b, h], LENGTHS[b])
        members = {j: [j] for j in chosen}
        for i in set(range(LENGTHS[b])) - set(chosen):
            mine = [j for j in chosen if j // 8 == i // 8]
            if mine:
                members[max(mine, key=lambda j: c[i, j])].append(i)
        for want, x in ((want_k, obs.k), (want_v, obs.v)):
            x = np.asarray(x, np.float64)[b, h]
            want[b, h] = np.array([x[members[j]].mean(0) for j in chosen])
    check(k, want_k, lists)
    check(v, want_v, lists)


def test_cam_windows_and_probabilities():
    obs, (index, lists) = observation(), choose()
    m = 4
    mass = np.asarray(obs.group(obs.column_mass()), np.float64)
    values = np.asarray(obs.v, np.float64)
    want = {}
    for (b, h), chosen in lists.items():
        out = values[b, h][chosen].copy()
        for i in set(range(LENGTHS[b])) - set(chosen):
            window = [n for n, j in enumerate(chosen) if j > i][:m]
            if window:
                p = np.clip(mass[b, h, i] / np.mean([mass[b, h, chosen[n]] for n in window]), 0, 1)
                out[window] += p * values[b, h, i] / len(window)
        want[b, h] = out
    for seed in range(2):
        k, _ = reduce(neighbours.ValueCascade(m, seed), obs, index, None)
        for (b, h), chosen in lists.items():
            np.testing.assert_array_equal(np.asarray(k)[b, h, : len(chosen)], np.asarray(obs.k)[b, h, chosen])
    p, first, n = neighbours.ValueCascade(m).probability(obs, index)
    for (b, h), chosen in lists.items():
        got = values[b, h][chosen].copy()
        for i in range(LENGTHS[b]):
            at = slice(int(first[b, h, i]), int(first[b, h, i] + n[b, h, i]))
            if p[b, h, i] > 0:
                got[at] += float(p[b, h, i]) * values[b, h, i] / int(n[b, h, i])
        np.testing.assert_allclose(got, want[b, h], atol=1e-4)


def test_cam_draws():
    """One draw adds V / m to m survivors or nothing; equal seeds agree; over seeds the mean approaches p."""
    obs, (index, _) = observation(), choose(keep=12)
    p, first, n = neighbours.ValueCascade(4).probability(obs, index)
    values = np.nan_to_num(np.asarray(obs.v, np.float64))
    total, runs = 0.0, 200
    for seed in range(runs):
        _, v = reduce_seeded(obs, index, seed)
        total = total + np.asarray(v, np.float64) / runs
    want = values[0, 0][np.asarray(index)[0, 0, :12]].copy()
    for i in range(LENGTHS[0]):
        if p[0, 0, i] > 0:
            at = slice(int(first[0, 0, i]), int(first[0, 0, i] + n[0, 0, i]))
            want[at] += float(p[0, 0, i]) * values[0, 0, i] / int(n[0, 0, i])
    np.testing.assert_allclose(total[0, 0, :12], want, atol=0.25)


@jax.jit
def reduce_seeded(obs, index, seed):
    return neighbours.ValueCascade(4, seed).reduce(obs, index, None)
