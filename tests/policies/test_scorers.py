"""Each scorer's own property, from its paper's definition, against float64 loops where there is a formula: statistics, windows."""

from __future__ import annotations

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import calibration, parse
from kvjax.policies.ordering import hash_uniform
from kvjax.policies.scorers import statistics, windows
from kvjax.policies.scorers.attention import AccumulatedAttention, WindowAttention
from kvjax.types import ModelShape
from tests.policies.observations import (
    BATCH,
    DIM,
    KV_HEADS,
    LENGTHS,
    OBS,
    POS,
    Q_HEADS,
    VALID,
    attention,
    close,
    group_mean,
    kept,
    score,
    step,
)

# --- accumulated statistics ---------------------------------------------------------------------------------------


def test_keyformer_without_noise_is_h2o_and_its_noise_is_seeded():
    plain = statistics.NoisyAttention(tau0=1.0, tau1=1.0, noise=0.0)
    want, h2o_state = score(AccumulatedAttention(), OBS)
    got, state = score(plain, OBS)
    close(got, want)
    obs, padded = step(OBS, state, 1)
    close(score(plain, obs, padded)[0], score(AccumulatedAttention(), *step(OBS, h2o_state, 1))[0], obs)
    noisy = statistics.NoisyAttention(seed=3)
    first = score(noisy, OBS)[0]
    np.testing.assert_array_equal(first, score(noisy, OBS)[0])
    assert np.abs(first - score(statistics.NoisyAttention(seed=4), OBS)[0])[VALID].max() > 0.01


def test_keyformer_noise_is_gumbel_and_each_row_still_sums_to_one():
    scores = score(statistics.NoisyAttention(seed=1), OBS)[0]
    np.testing.assert_allclose(np.where(VALID, scores, 0).sum(-1)[:, 0], LENGTHS, rtol=1e-5)
    u = np.asarray(hash_uniform(1, jnp.arange(20000), 7))
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.005 and len(np.unique(u)) > 19000


def test_roco_mean_and_protected_deviation():
    a = group_mean(attention(OBS))  # [batch, kv_heads, queries, slots]
    q_pos = np.asarray(OBS.q_pos)
    sees = (q_pos[:, None, :, None] >= POS[:, :, None]) & VALID[:, :, None]
    n = np.maximum(sees.sum(2), 1)
    mean = a.sum(2) / n
    deviation = np.sqrt(np.maximum((a**2).sum(2) / n - mean**2, 0))
    got, state = score(statistics.MeanAndDeviation(prefill_share=0.25), OBS)
    protected = np.zeros_like(VALID)
    for b, h in np.ndindex(BATCH, KV_HEADS):
        best = np.argsort(-np.where(VALID[b, h], deviation[b, h], -1))[: 12 // 4]
        protected[b, h, best] = True
    close(got, mean + 2 * protected)
    obs, padded = step(OBS, state, 2)
    row = group_mean(attention(obs))[:, :, 0]
    total = np.pad(a.sum(2), ((0, 0), (0, 0), (0, 1))) + row
    count = np.pad(sees.sum(2), ((0, 0), (0, 0), (0, 1))) + np.asarray(obs.valid)
    new = score(statistics.MeanAndDeviation(decode_share=0.0), obs, padded)[0]
    close(new, total / np.maximum(count, 1), obs)


def _important(obs, reduce):
    """bool [batch, kv_heads, queries, slots]: A >= 1 / visible, float64."""
    a = attention(obs)
    a = reduce(a.reshape(a.shape[0], KV_HEADS, -1, *a.shape[2:]), axis=2)
    visible = (np.asarray(obs.pos)[:, :, None] <= np.asarray(obs.q_pos)[:, None, :, None]) & np.asarray(
        obs.valid
    )[:, :, None]
    return (a >= 1.0 / np.maximum(visible.sum(-1, keepdims=True), 1)) & (
        np.asarray(obs.q_pos)[:, None, :, None] >= 0
    )


def test_corm_keeps_what_one_of_the_last_queries_found_important():
    scorer = statistics.RecentMessage(window=6)
    got, state = score(scorer, OBS)
    hit = _important(OBS, np.max)
    recent = np.asarray(OBS.q_pos)[:, None, :, None] >= np.asarray(OBS.length)[:, None, None, None] - 6
    np.testing.assert_array_equal((got >= 1.0)[VALID], (hit & recent).any(2)[VALID])
    obs, padded = step(OBS, state, 3)
    after = score(scorer, obs, padded)[0]
    both = np.pad((hit & recent)[:, :, :, :], ((0, 0), (0, 0), (0, 0), (0, 1)))
    oldest = np.asarray(OBS.q_pos)[:, None, :, None] == np.asarray(OBS.length)[:, None, None, None] - 6
    want = (both & ~oldest).any(2) | _important(obs, np.max)[:, :, 0]
    valid = np.asarray(obs.valid)
    np.testing.assert_array_equal((after >= 1.0)[valid], want[valid])


def test_corm_with_uniform_attention_keeps_everything():
    obs = OBS.replace(q=jnp.zeros_like(OBS.q), keep=jnp.full((BATCH,), 32, jnp.int32))
    np.testing.assert_array_equal(kept(parse("corm(window=6, recent=2)"), obs), VALID)


@pytest.mark.parametrize("window", [8, 40])
def test_scissorhands_counts_marks(window):
    scorer = statistics.Persistence(window=window)
    got, state = score(scorer, OBS)
    hits = _important(OBS, np.mean)
    length = np.asarray(OBS.length)[:, None, None]
    recent = np.asarray(OBS.q_pos)[:, None, :, None] >= length[..., None] - window
    close(got, (hits & recent).sum(2) / np.clip(length - POS, 1, window))
    obs, padded = step(OBS, state, 4)
    newest = _important(obs, np.mean)[:, :, 0]
    still = recent & (np.asarray(OBS.q_pos)[:, None, :, None] > length[..., None] - window)
    total = np.pad((hits & still).sum(2), ((0, 0), (0, 0), (0, 1))) + newest
    observed = np.clip(np.asarray(obs.length)[:, None, None] - np.asarray(obs.pos), 1, window)
    close(score(scorer, obs, padded)[0], total / observed, obs)


@pytest.mark.parametrize("recent", [True, False])
def test_attendre_counts_top_k_hits(recent):
    a = attention(OBS)
    top = np.sort(a, axis=-1)[..., -3:-2]
    hit = (a >= top) & (a > 0)
    grouped = hit.reshape(BATCH, KV_HEADS, 2, *hit.shape[2:])
    if recent:
        want = np.where(grouped.any(2), np.asarray(OBS.q_pos)[:, None, :, None] + 1, 0).max(2)
    else:
        want = grouped.sum(axis=(2, 3))
    got, state = score(statistics.AttendedTopK(3, recent), OBS)

    def points(usage, seen):
        length, pos = np.asarray(seen.length)[:, None, None], np.asarray(seen.pos)
        return usage - length * recent + pos / (2 * length)

    close(got, points(want, OBS))
    obs, padded = step(OBS, state, 5)
    after = score(statistics.AttendedTopK(3, recent), obs, padded)[0]
    row = attention(obs)[:, :, 0]
    now = ((row >= np.sort(row, -1)[..., -3:-2]) & (row > 0)).reshape(BATCH, KV_HEADS, 2, -1)
    old = np.pad(want, ((0, 0), (0, 0), (0, 1)))
    new = np.where(now.any(2), np.asarray(obs.length)[:, None, None], old) if recent else old + now.sum(2)
    close(after, points(new, obs), obs)


def test_treekv_gaps_are_powers_of_two():
    """With equal scores, 64 entries in 16 places leave gaps 8 x 3, 4 x 4, 2 x 8 from old to new."""
    alive = statistics.sweep(jnp.zeros((1, 1, 64)), jnp.asarray([[64]]), jnp.asarray([[16]]), 1)
    gaps = np.diff(np.flatnonzero(np.asarray(alive)[0, 0]))
    assert np.bincount(gaps)[[2, 4, 8]].sum() == 15 and (np.diff(gaps) <= 0).all()
    np.testing.assert_array_equal(np.bincount(gaps, minlength=9)[[8, 4, 2]], [3, 4, 8])


def test_treekv_decode_evicts_the_weaker_of_the_pair_at_the_pointer():
    scorer = statistics.TreeSweep(sink=2, recent=4, block=1)
    obs, state = step(OBS, score(scorer, OBS)[1], 6)
    obs = obs.replace(keep=jnp.full((BATCH,), 10, jnp.int32))
    scores, new = score(scorer, obs, state)
    mean = np.asarray(new["sum"]) / np.maximum(np.asarray(new["count"]), 1)
    for b, h in np.ndindex(BATCH, KV_HEADS):
        pos, n = np.asarray(obs.pos)[b, h], int(obs.length[b])
        swept = sorted(np.flatnonzero((pos >= 2) & (pos < n - 4)), key=lambda s: pos[s])
        at = (n - 6 - 4 - 1) % 4
        pair = swept[at : at + 2]
        assert np.argmin(np.where(pos >= 0, scores[b, h], np.inf)) == min(pair, key=lambda s: mean[b, h, s])


def test_hashevict_distance_follows_the_cosine_and_ignores_norms():
    scorer = statistics.HashDistance(bits=4096, window=1)
    got, state = score(scorer, OBS)
    assert state["code"].dtype == jnp.uint8 and state["code"].shape[-1] == 512
    q, k = np.asarray(OBS.q), np.asarray(OBS.k)
    last = np.argmax(np.asarray(OBS.q_pos), axis=1)
    for b, h in np.ndindex(BATCH, KV_HEADS):
        angle = 0.0
        for g in range(2):
            x = q[b, 2 * h + g, last[b]]
            cos = k[b, h] @ x / np.linalg.norm(k[b, h], axis=1) / np.linalg.norm(x)
            angle = angle + np.arccos(np.clip(cos, -1, 1)) / np.pi * 4096
        np.testing.assert_allclose(-got[b, h][VALID[b, h]], angle[VALID[b, h]], atol=250)
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.1, 9, OBS.pos.shape), jnp.float32)[..., None]
    np.testing.assert_array_equal(score(scorer, OBS.replace(k=OBS.k * scale))[0], got)
    obs, padded = step(OBS, state, 7)
    fresh = score(scorer, obs)[1]["code"]  # from zero state only the newest entry has a code
    after = score(scorer, obs, padded)[1]["code"]
    np.testing.assert_array_equal(after[:, :, -1], fresh[:, :, -1])
    np.testing.assert_array_equal(after[:, :, :-1], padded["code"][:, :, :-1])


# --- windows ------------------------------------------------------------------------------------------------------


def test_finch_without_normalisation_is_snapkv_without_pooling_and_weighs_rows():
    plain = score(windows.PromptGuided(5, normalize=False), OBS)[0]
    want = score(WindowAttention(5, 1), OBS)[0]
    close(plain, want)
    a = attention(OBS)
    weighted = score(windows.PromptGuided(5), OBS)[0]
    for b in range(BATCH):
        rows = np.argsort(np.asarray(OBS.q_pos)[b])[-5:]
        w = np.asarray(OBS.q_pos)[b, rows]  # visible - 1
        mean = group_mean((a[b : b + 1, :, rows] * w[None, None, :, None]).mean(2))[0]
        before = VALID[b] & (POS[b] < LENGTHS[b] - 5)
        np.testing.assert_allclose(weighted[b][before], mean[before], rtol=1e-4)


def test_compresskv_listens_to_its_heads_only():
    scorer = windows.RetrievalHeads(4, 3, heads=((1, 2), (0, 3)))
    base = score(scorer, OBS)[0]
    np.testing.assert_array_equal(base[:, 0], base[:, 1])
    other = OBS.replace(q=OBS.q.at[:, 3].multiply(-2.0).at[:, 0].add(1.0))
    np.testing.assert_array_equal(score(scorer, other)[0], base)
    used = OBS.replace(q=OBS.q.at[:, 1].multiply(-2.0))
    assert np.abs(score(scorer, used)[0] - base)[VALID].max() > 1e-3


def test_pyramidinfer_weighs_recent_rows():
    got = score(windows.RecentWeighted(0.25, 1.2), OBS)[0]
    a = attention(OBS)
    for b, n in enumerate(LENGTHS):
        rows = 1 + n * 250 // 1000
        order = np.argsort(np.asarray(OBS.q_pos)[b])[-rows:]
        mean = (a[b][:, order] * np.linspace(1, 1.2, rows)[None, :, None]).mean(axis=(0, 1))
        recent = POS[b, 0] >= n - rows
        np.testing.assert_allclose(got[b, 0][VALID[b, 0] & ~recent], mean[VALID[b, 0] & ~recent], rtol=1e-4)
        assert (got[b, 0][recent] > 1e5).all()


def test_pyramidinfer_schedule_falls_and_keeps_the_mean():
    policy = parse("pyramidinfer(budget=100)")
    levels = [policy.allocator.layer_keep(i, 8, 100, 1000) for i in range(8)]
    assert sorted(levels, reverse=True) == levels and levels[0] > levels[-1] and 792 <= sum(levels) <= 800
    traced = [int(policy.allocator.layer_keep(i, 8, jnp.asarray(100), jnp.asarray(1000))) for i in range(8)]
    assert traced == levels
    flat = parse("pyramidinfer(budget=100, p=1.0)").allocator
    assert {flat.layer_keep(i, 8, 100, 1000) for i in range(8)} == {100}


def test_simlayerkv_lazy_rows_keep_sinks_and_recents():
    everything = OBS.replace(keep=jnp.full((BATCH,), 32, jnp.int32))
    np.testing.assert_array_equal(kept(parse("simlayerkv(threshold=1.0, recent=6)"), everything), VALID)
    lazy = kept(parse("simlayerkv(threshold=0.0, recent=6, initial=2)"), everything)
    for b, n in enumerate(LENGTHS):
        want = (POS[b] >= 0) & ((POS[b] < 2) | (POS[b] >= n - 5))
        np.testing.assert_array_equal(lazy[b], want)
    a = attention(OBS)
    last = [a[b][:, np.argmax(np.asarray(OBS.q_pos)[b])].mean(0) for b in range(BATCH)]
    share = [
        sum(x for x, p in zip(last[b], POS[b, 0]) if 0 <= p < n - 1 and (p < 2 or p >= n - 7))
        for b, n in enumerate(LENGTHS)
    ]
    middle = (share[0] + share[1]) / 2
    one = kept(parse(f"simlayerkv(threshold={middle}, recent=6, initial=2)"), everything)
    more, less = int(np.argmax(share)), int(np.argmin(share))
    assert one[more].sum() == 2 * 7 and one[less].sum() == VALID[less].sum()


def test_qfilters_direction_is_the_first_singular_vector():
    got = score(windows.QueryFilter(), OBS)[0]
    for b, h in np.ndindex(BATCH, KV_HEADS):
        filters = []
        for g in range(Q_HEADS // KV_HEADS):
            q = np.asarray(OBS.q, np.float64)[b, 2 * h + g][np.asarray(OBS.q_pos)[b] >= 0]
            v = np.linalg.svd(q, full_matrices=False)[2][0]
            filters.append(v if np.sign(q @ v).sum() >= 0 else -v)
        want = np.asarray(OBS.k, np.float64)[b, h] @ np.mean(filters, axis=0)
        np.testing.assert_allclose(got[b, h][VALID[b, h]], want[VALID[b, h]], atol=2e-4)


SHAPE = ModelShape(2, Q_HEADS, KV_HEADS, DIM, (None, None))


def test_qfilters_file_and_another_models_file(tmp_path: pathlib.Path):
    filters = np.random.default_rng(0).standard_normal((2, KV_HEADS, DIM)).astype(np.float32)
    path = str(tmp_path / "q.safetensors")
    calibration.save(path, {"filters": filters}, calibration.fingerprint(SHAPE, "abc"))
    scorer = windows.QueryFilter(path)
    const = {n: jnp.asarray(x) for n, x in scorer.constants(1, SHAPE).items()}
    got = score(scorer, OBS.replace(const=const))[0]
    close(got, -np.einsum("bhsd,hd->bhs", np.asarray(OBS.k), filters[1]))
    flipped = score(scorer, OBS.replace(const={"filters": -const["filters"]}))[0]
    close(flipped, -got)
    assert set(calibration.load(path, calibration.fingerprint(SHAPE, "abc"))) == {"filters"}
    with pytest.raises(ValueError, match="another model"):
        scorer.constants(0, dataclasses.replace(SHAPE, layers=3, windows=(None,) * 3))
    with pytest.raises(ValueError, match="another model"):
        calibration.load(path, calibration.fingerprint(SHAPE, "xyz"))
    with pytest.raises(ValueError, match="does not exist"):
        calibration.load(str(tmp_path / "none"))
    (tmp_path / "bad").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a calibration file"):
        calibration.load(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="needs file"):
        parse("qfilters(evict_decode=True)")
