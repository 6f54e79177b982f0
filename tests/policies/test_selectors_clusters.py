"""Properties of selectors that group similar keys: ClusterKV, RetroInfer, Squeezed Attention, LouisKV, IceCache."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies.selectors.clusters import Clusters, ThreeZones
from kvjax.policies.selectors.grouping import kmeans
from kvjax.policies.selectors.semantic import SemanticPages
from kvjax.policies.selectors.squeezed import CentroidThreshold
from kvjax.policies.selectors.triggered import Boundaries
from tests.policies.selector_cases import SCALE, B, D, G, H, built, call, draw, entries, later, softmax

LENGTHS, N = (40, 27), 48


def np_kmeans(x, groups, rounds, cosine):
    """Oracle: Lloyd's algorithm from evenly spaced rows, float64."""
    unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)  # noqa: E731
    x = unit(x) if cosine else x
    c = x[[j * len(x) // groups for j in range(groups)]]
    for _ in range(rounds + 1):
        to = unit(c) if cosine else c
        score = x @ to.T - (0 if cosine else 0.5 * (to**2).sum(-1))
        label = score.argmax(-1)
        c = np.stack([x[label == g].mean(0) if (label == g).any() else c[g] for g in range(groups)])
    return label


@pytest.mark.parametrize("cosine", [True, False])
def test_kmeans_is_lloyds_algorithm(cosine):
    held = entries(LENGTHS, N)
    groups = jnp.asarray([[5, 7], [3, 4]])
    got = np.asarray(kmeans(held.k, held.pos >= 0, groups, most=7, rounds=6, cosine=cosine))
    for b in range(B):
        for h in range(H):
            x = np.asarray(held.k, np.float64)[b, h, : LENGTHS[b]]
            want = np_kmeans(x, int(groups[b, h]), 6, cosine)
            assert got[b, h, : LENGTHS[b]].tolist() == want.tolist()
            assert (got[b, h, LENGTHS[b] :] == -1).all()


def test_every_clustered_token_is_in_one_cluster_and_sinks_in_none():
    s = Clusters(12, 3, per=4, rounds=5)
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    labels, used = np.asarray(index["labels"]), np.asarray(index["used"])
    for b in range(B):
        for h in range(H):
            assert (labels[b, h, :3] == -1).all() and (labels[b, h, LENGTHS[b] :] == -1).all()
            inside = labels[b, h, 3 : LENGTHS[b]]
            assert used[b, h] == (LENGTHS[b] - 3) // 4 and inside.min() >= 0 and inside.max() < used[b, h]
            for g in range(used[b, h]):
                members = np.asarray(held.k)[b, h, 3 : LENGTHS[b]][inside == g]
                if len(members):
                    np.testing.assert_allclose(
                        np.asarray(index["centroids"])[b, h, g], members.mean(0), rtol=1e-5, atol=1e-6
                    )


def test_clusters_of_one_key_rank_like_exact_logits():
    s = Clusters(12, 0, per=1, flush=1 << 20, rounds=2, over="max")
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    c = call(held)
    scores = np.asarray(s.score(index, c)[0])
    q = np.asarray(c.grouped, np.float64)
    for b in range(B):
        for h in range(H):
            want = (q[b, h] @ np.asarray(held.k, np.float64)[b, h, : LENGTHS[b]].T).max(0) * SCALE
            np.testing.assert_allclose(scores[b, h, : LENGTHS[b]], want, rtol=1e-4, atol=1e-5)


def test_new_tokens_are_read_until_enough_of_them_are_clustered():
    s = Clusters(12, 0, per=4, flush=3, into=1, rounds=2)
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    old = np.asarray(index["centroids"])
    for step in range(3):
        held, new = later(held, seed=20 + step)
        c = call(held)
        index = s.append(index, new, c)
        scores = np.asarray(s.score(index, c)[0])
        for b in range(B):
            fresh = scores[b, :, LENGTHS[b] : LENGTHS[b] + step + 1]
            assert np.isposinf(fresh).all() if step < 2 else np.isfinite(fresh).all()
    for b in range(B):
        for h in range(H):
            u = (LENGTHS[b]) // 4
            np.testing.assert_array_equal(np.asarray(index["centroids"])[b, h, :u], old[b, h, :u])
            new3 = np.asarray(held.k)[b, h, LENGTHS[b] : LENGTHS[b] + 3].mean(0)
            np.testing.assert_allclose(np.asarray(index["centroids"])[b, h, u], new3, rtol=1e-5, atol=1e-6)


def test_retroinfer_estimates_singletons_exactly():
    s = ThreeZones(4, 0, 1, per=1, rounds=1, estimated=1.0, flush=1 << 20)
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    c = call(held)
    out, lse = s.estimate(index, c, jnp.zeros((B, H, N), bool))
    k, v, q = (np.asarray(x, np.float64) for x in (held.k, held.v, c.q[:, :, 0]))
    for b in range(B):
        for h in range(H * G):
            logits = q[b, h] @ k[b, h // G, : LENGTHS[b]].T * SCALE
            want = softmax(logits) @ v[b, h // G, : LENGTHS[b]]
            np.testing.assert_allclose(np.asarray(out)[b, h, 0], want, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(lse[b, h, 0], np.log(np.exp(logits).sum()), rtol=1e-5)


def test_retroinfer_estimates_only_what_was_not_read():
    """With constant values any split gives that value, and the mass of a cluster is its size less what was read."""
    s = ThreeZones(4, 0, 1, per=4, rounds=4, estimated=1.0, flush=1 << 20)
    held = entries(LENGTHS, N).replace(v=jnp.ones((B, H, N, D)) * 3.0)
    index, _ = built(s, held)
    c = call(held)
    chosen = np.zeros((B, H, N), bool)
    chosen[:, :, ::3] = True
    out, lse = s.estimate(index, c, jnp.asarray(chosen))
    np.testing.assert_allclose(np.asarray(out), 3.0, rtol=1e-5)
    labels, q = np.asarray(index["labels"]), np.asarray(c.q, np.float64)[:, :, 0]
    for b in range(B):
        for h in range(H * G):
            left = (labels[b, h // G] >= 0) & ~chosen[b, h // G]
            mean = np.asarray(index["centroids"], np.float64)[b, h // G][labels[b, h // G][left]]
            np.testing.assert_allclose(lse[b, h, 0], np.log(np.exp(mean @ q[b, h] * SCALE).sum()), rtol=1e-5)


def test_squeezed_share_of_single_keys_is_the_softmax_and_shares_sum_to_one():
    held = entries(LENGTHS, N)
    one = CentroidThreshold(12, 0, 4, per=1, coarse_per=4, window=4, rounds=1)
    index, _ = built(one, held)
    c = call(held)
    s, sizes = one._share(index, c.grouped, SCALE, "fine")
    q = np.asarray(c.grouped, np.float64)
    got = np.take_along_axis(np.asarray(s), np.maximum(np.asarray(index["labels"]), 0), axis=2)
    for b in range(B):
        for h in range(H):
            n = LENGTHS[b] - 4
            want = softmax(q[b, h] @ np.asarray(held.k, np.float64)[b, h, :n].T * SCALE).mean(0)
            np.testing.assert_allclose(got[b, h, :n], want, rtol=1e-4, atol=1e-6)
    many = CentroidThreshold(12, 0, 4, per=5, coarse_per=9, window=4, rounds=5)
    index, _ = built(many, held)
    for level in ("fine", "coarse"):
        s, sizes = many._share(index, c.grouped, SCALE, level)
        np.testing.assert_allclose(np.sum(np.asarray(s) * np.asarray(sizes), -1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("percentile", [0.0, 0.5, 0.9])
def test_squeezed_threshold_is_the_quantile_of_the_last_queries(percentile):
    window = 4
    s = CentroidThreshold(12, 0, 4, per=4, coarse_per=8, window=window, percentile=percentile, rounds=4)
    held = entries(LENGTHS, N)
    index, c = built(s, held)
    q, labels = np.asarray(c.q, np.float64), np.asarray(index["labels"])
    mu, sizes = np.asarray(index["fine"], np.float64), np.asarray(index["sizes"])
    for b in range(B):
        values = []
        for h in range(H):
            live = sizes[b, h] > 0
            for t in range(q.shape[2] - window, q.shape[2]):
                e = np.exp(q[b, h * G : h * G + G, t] @ mu[b, h].T * SCALE) * live
                share = (e / (e * sizes[b, h]).sum(-1, keepdims=True)).mean(0)
                values += share[labels[b, h][labels[b, h] >= 0]].tolist()
        values = np.sort(values)
        want = values[max(0, int(np.ceil(percentile * len(values))) - 1)]
        np.testing.assert_allclose(np.asarray(index["thresholds"])[b, 1], want, rtol=1e-4)


@pytest.mark.parametrize("trigger, times", [(-1.0, 0), (1.5, 4)])
def test_louiskv_selects_at_every_step_or_never(trigger, times):
    s = Boundaries(12, 0, 2, per=4, segments=1, trigger=trigger, rounds=2)
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    count = 0
    for step in range(4):
        held, new = later(held, seed=30 + step)
        c = call(held, seed=40 + step)
        index = s.append(index, new, c)
        due, index = s.due(index, c)
        assert np.asarray(due).all() == np.asarray(due).any()
        if np.asarray(due).all():
            count += 1
            index = s.score(index, c)[1]
    assert count == times
    if times:  # each step closed the segment before it: one token each, its key the unit's
        for b in range(B):
            used = int(index["used"][b, 0])
            assert used == LENGTHS[b] // 4 + 3
            got = np.asarray(index["centroids"])[b, :, used - 1]
            np.testing.assert_allclose(got, np.asarray(held.k)[b, :, LENGTHS[b] + 2], rtol=1e-5, atol=1e-6)


def test_louiskv_trigger_is_the_mean_cosine():
    held = entries(LENGTHS, N)
    q = np.asarray(draw(B, H * G, 1, D, seed=50))
    cos = []
    for b in range(B):
        _, c = built(Boundaries(12, per=4, rounds=1), held)
        last = np.asarray(c.q)[b, :, np.asarray(c.q_pos)[b].argmax()]
        now = q[b, :, 0]
        cos.append(
            ((last * now).sum(-1) / np.linalg.norm(last, axis=-1) / np.linalg.norm(now, axis=-1)).mean()
        )
    for shift, want in ((-1e-3, False), (1e-3, True)):
        for b in range(B):
            s = Boundaries(12, per=4, rounds=1, trigger=float(cos[b]) + shift)
            index, _ = built(s, held)
            assert bool(s.due(index, call(held, q=q))[0][b]) is want


def test_icecache_puts_every_token_on_one_page_and_neighbours_together():
    s = SemanticPages(12, 2, 4, page=4)
    centers = np.asarray(draw(8, D, seed=3)) * 10
    which = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 4))
    k = np.zeros((B, H, N, D), np.float32)
    k[:, :, 2:34] = centers[which] + np.asarray(draw(32, D, seed=4)) * 0.01
    held = entries((34, 34), N, k=k)
    order = np.asarray(s.order(held, call(held)))
    assert (np.sort(order, -1) == np.arange(N)).all()
    assert (np.sort(order[..., :2], -1) == [0, 1]).all()  # sinks stay in front
    assert (order[..., 34:] >= 34).all()  # empty entries at the end
    split = 0
    for b in range(B):
        for h in range(H):
            place = np.empty(N, int)
            place[order[b, h]] = np.arange(N) // 4
            for g in range(8):
                pages = place[2:34][which == g]
                split += len(set(pages)) - 1
    assert (
        split <= 2 * B * H * 8 and split < 0.5 * B * H * 8 * 3
    )  # at random, three of four would be elsewhere


def test_icecache_scores_pages_by_their_mean_key():
    s = SemanticPages(12, 2, 4, page=4, over="max")
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    held, new = later(held, 3)
    index = s.append(index, new, call(held))
    c = call(held)
    scores = np.asarray(s.score(index, c)[0])
    for b in range(B):
        for h in range(H):
            n = LENGTHS[b] + 3
            for p in range(-(-n // 4)):
                mean = np.asarray(held.k, np.float64)[b, h, 4 * p : min(n, 4 * p + 4)].mean(0)
                want = (np.asarray(c.grouped, np.float64)[b, h] @ mean).max() * SCALE
                np.testing.assert_allclose(scores[b, h, p], want, rtol=1e-4, atol=1e-5)
