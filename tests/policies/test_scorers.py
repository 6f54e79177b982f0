"""Each scorer's own property, from its paper's definition, against float64 loops where there is a formula."""

from __future__ import annotations

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import calibration, parse
from kvjax.policies.ordering import hash_uniform
from kvjax.policies.scorers import compactor, future, lag, probed, statistics, windows, wrappers
from kvjax.policies.scorers.attention import AccumulatedAttention, WindowAttention
from kvjax.policies.scorers.keys import KeyNorm
from kvjax.types import ModelShape
from tests.policies.observations import (
    BATCH,
    DIM,
    KV_HEADS,
    LENGTHS,
    Q_HEADS,
    attention,
    group_mean,
    kept,
    prompt,
    score,
    step,
)

OBS = prompt()
VALID = np.asarray(OBS.valid)
POS = np.asarray(OBS.pos)


def close(got, want, obs=OBS, tol=1e-5):
    valid = np.asarray(obs.valid)
    np.testing.assert_allclose(np.asarray(got)[valid], np.asarray(want)[valid], atol=tol, rtol=tol)


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
    close(got, want)
    obs, padded = step(OBS, state, 5)
    after = score(statistics.AttendedTopK(3, recent), obs, padded)[0]
    row = attention(obs)[:, :, 0]
    now = ((row >= np.sort(row, -1)[..., -3:-2]) & (row > 0)).reshape(BATCH, KV_HEADS, 2, -1)
    old = np.pad(want, ((0, 0), (0, 0), (0, 1)))
    new = np.where(now.any(2), np.asarray(obs.length)[:, None, None], old) if recent else old + now.sum(2)
    close(after, new, obs)


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


# --- keys and values ----------------------------------------------------------------------------------------------


def test_lagkv_ignores_channel_shift_and_scale():
    scorer = lag.LagRelative(sink=2, lag=5)
    base = score(scorer, OBS)[0]
    moved = OBS.replace(k=OBS.k * 3.0 + jnp.arange(DIM), v=OBS.v * 0.5 - 2.0)
    close(score(scorer, moved)[0], base, tol=1e-4)
    assert len(np.unique(np.round(base[0, 0][VALID[0, 0]], 3))) > 4


def test_cap_scores_are_leverages():
    got = score(future.InformationCapacity(sink=2, future=16), OBS)[0]
    used = VALID & (POS >= 2)
    assert (got[used] > 0).all() and (got[used] < 1).all()
    assert (np.where(used, got, 0).sum(-1) < DIM).all()


def test_expected_attention_without_variance_is_the_mean_query():
    same = OBS.replace(q=jnp.broadcast_to(OBS.q[:, :, :1], OBS.q.shape), inv_freq=OBS.inv_freq * 0.0)
    got = score(future.ExpectedAttention(future=4, sink=0, value_norm=False), same)[0]
    logits = np.einsum(
        "bhsd,bhgd->bhgs", same.k, np.asarray(same.q)[:, :, 0].reshape(BATCH, KV_HEADS, 2, DIM)
    )
    e = np.where(VALID[:, :, None], np.exp(logits * OBS.scale), 0.0)
    close(got, (e / e.sum(-1, keepdims=True)).mean(2))


def test_expected_attention_statistics_from_a_file(tmp_path: pathlib.Path):
    """The prompt's own statistics in a file reproduce the online scores of that row."""
    obs = prompt(3, lengths=(32,))
    q = np.asarray(obs.unrotated_queries(), np.float64)[0, :, 4:]
    mean = q.mean(1)
    cov = np.einsum("hti,htj->hij", q - mean[:, None], q - mean[:, None]) / q.shape[1]
    path = str(tmp_path / "s.safetensors")
    arrays = {"query_mean": np.stack([mean] * 2), "query_cov": np.stack([cov] * 2)}
    arrays = {n: a.astype(np.float32) for n, a in arrays.items()}
    calibration.save(path, arrays, calibration.fingerprint(SHAPE))
    scorer = future.ExpectedAttention(future=8, stats=path)
    const = {n: jnp.asarray(x) for n, x in scorer.constants(0, SHAPE).items()}
    got = score(scorer, obs.replace(const=const))[0]
    want = score(future.ExpectedAttention(future=8), obs)[0]
    np.testing.assert_allclose(got[..., 4:], want[..., 4:], rtol=1e-4, atol=1e-6)


def test_non_causal_mass_adds_up_per_chunk():
    q, k = OBS.q, jnp.repeat(OBS.k, 2, axis=1)
    mask = OBS.q_pos >= 0
    mass = np.asarray(compactor.non_causal_mass(q, k, mask, 8, False))
    for b, n in enumerate(LENGTHS):
        row = mass[b][:, np.asarray(mask)[b]]
        for start in range(0, n, 8):
            part = row[:, start : start + 8]
            np.testing.assert_allclose(part.sum(-1), part.shape[-1], rtol=1e-5)


def test_leverage_is_exact_with_a_square_sketch():
    sketch = jnp.broadcast_to(jnp.eye(DIM), (KV_HEADS, DIM, DIM))
    got = np.asarray(compactor.leverage(OBS.k, OBS.valid, sketch, jitter=1e-6))
    for b, h in np.ndindex(BATCH, KV_HEADS):
        x = np.asarray(OBS.k, np.float64)[b, h][VALID[b, h]]
        x = x - x.mean(0)
        want = np.einsum("sd,de,se->s", x, np.linalg.inv(x.T @ x), x)
        np.testing.assert_allclose(got[b, h][VALID[b, h]], want, atol=1e-4)
        assert want.sum() <= DIM + 1e-6


def test_cur_ignores_the_scale_of_a_block():
    scorer = compactor.ValueGuided(block=8)
    factor = jnp.where((OBS.pos >= 8) & (OBS.pos < 16), 5.0, 1.0)[..., None]
    close(score(scorer, OBS.replace(k=OBS.k * factor, v=OBS.v * factor))[0], score(scorer, OBS)[0])


# --- wrappers -----------------------------------------------------------------------------------------------------


def test_criticalkv_stages():
    inner = WindowAttention(4, 3)
    base = kept(parse("snapkv(budget=12, window=4, kernel=3)"), OBS)
    np.testing.assert_array_equal(kept(parse("criticalkv(snapkv(window=4, kernel=3), share=1.0)"), OBS), base)
    scores = score(wrappers.OutputPerturbation(inner), OBS)[0]
    scaled = score(wrappers.OutputPerturbation(inner), OBS.replace(wo=OBS.wo * 7.0))[0]
    np.testing.assert_array_equal(np.argsort(scaled[VALID]), np.argsort(scores[VALID]))
    plain = score(inner, OBS)[0]
    norm = np.abs(np.einsum("bhsd,hgde->bhgse", OBS.v, np.asarray(OBS.wo).reshape(KV_HEADS, 2, DIM, -1))).sum(
        -1
    )
    first = scores > 1e19
    assert (first.sum(-1) == 6).all()
    want = (plain + 1e-4) * norm.mean(2)
    np.testing.assert_allclose(scores[VALID & ~first], want[VALID & ~first], rtol=1e-4)


@pytest.mark.parametrize("block", [1, 4, 64])
def test_block_with_a_token_wise_score_is_plain_top_k(block):
    want = kept(parse("l2norm(budget=12)"), OBS)
    np.testing.assert_array_equal(kept(parse(f"block(l2norm(), block={block})"), OBS), want)


def test_nacl_without_sampling_is_the_proxy_and_sampling_is_seeded():
    want = kept(parse("snapkv(budget=12, window=4, kernel=1)"), OBS)
    np.testing.assert_array_equal(kept(parse("nacl(budget=12, proxy=4, sink=0, share=0.0)"), OBS), want)
    drawn = [kept(parse(f"nacl(budget=12, proxy=4, sink=0, share=0.5, seed={s})"), OBS) for s in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any() and (drawn[0].sum(-1) == 12).all()
    # Half of the 8 free entries are still the best ones.
    assert ((drawn[0] & want).sum(-1) >= 8).all()


def test_random_keeps_every_entry_equally_often():
    # Without jit: a seed is static, and every one would be a program of its own.
    drawn = [np.asarray(parse(f"random(seed={s})").scorer.score(OBS, {})[0])[0, 0] for s in range(24)]
    frequency = np.mean([np.argsort(np.argsort(-x)) < 12 for x in drawn], axis=0)
    assert abs(frequency.mean() - 12 / 32) < 1e-6
    assert np.abs(frequency - 12 / 32).max() < 4.5 * np.sqrt(12 / 32 * 20 / 32 / 24)


def test_dms_keeps_exactly_what_passes():
    obs = OBS.replace(keep=jnp.full((BATCH,), 32, jnp.int32))
    got = kept(parse("dms(random(), threshold=0.5, window=4)"), obs)
    scores = score(wrappers.Random(), OBS)[0]
    recent = np.asarray(LENGTHS)[:, None, None] - 4 <= POS
    np.testing.assert_array_equal(got, VALID & ((scores >= 0.5) | recent))


# --- probes -------------------------------------------------------------------------------------------------------


def test_kvzip_scores_are_the_largest_attention_of_the_repetition():
    """Entries 0..19 of row 0 are the prompt, 20..31 the repeated input; the chunk is positions 8..15."""
    obs = prompt(5, lengths=(32,))
    own = slice(20, 32)
    obs = obs.replace(
        q=obs.q[:, :, own],
        q_pos=obs.q_pos[:, own],
        span=(jnp.asarray([8]), jnp.asarray([16])),
        hidden=obs.hidden[:, own],
    )
    visible = (POS[0, 0] < 2) | ((POS[0, 0] >= 8) & (POS[0, 0] < 16)) | (POS[0, 0] >= 20)
    narrow = obs.replace(pos=jnp.where(jnp.asarray(visible), obs.pos, -1))
    a = attention(narrow)[0].reshape(KV_HEADS, 2, 12, 32)
    got = score(probed.Reconstruction(sink=2), obs)[0][0]
    want = np.where((POS[0, 0] >= 8) & (POS[0, 0] < 16), a.max(axis=(1, 2)), 0.0)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.max() <= 1.0
    size = np.linalg.norm(
        np.einsum("hsd,hgde->hgse", obs.v[0], np.asarray(obs.wo).reshape(KV_HEADS, 2, DIM, -1)), axis=-1
    )
    plus = a * size[:, :, None] / np.linalg.norm(np.asarray(obs.hidden)[0], axis=-1)[None, None, :, None]
    got = score(probed.Reconstruction(sink=2, plus=True), obs)[0][0]
    np.testing.assert_allclose(got, np.where(want > 0, plus.max(axis=(1, 2)), 0.0), rtol=1e-4, atol=1e-6)
    again = {"score": jnp.full((1, KV_HEADS, 32), 0.5)}
    kept_score = score(probed.Reconstruction(sink=2), obs, again)[0][0]
    np.testing.assert_allclose(kept_score, np.maximum(want, 0.5), atol=1e-6)


def test_kvcompose_scores_are_replayed_maxima_plus_their_mean():
    obs = prompt(6, lengths=(32,))
    obs = obs.replace(q=obs.q[:, :, 16:], q_pos=obs.q_pos[:, 16:])
    best = group_mean(attention(obs).max(axis=2))
    got = score(probed.Replay(), obs)[0]
    np.testing.assert_allclose(got, best + best.mean(axis=1, keepdims=True), atol=1e-6)


def test_shotkv_shots_have_one_score_whatever_the_order_inside():
    ids = jnp.asarray(np.random.default_rng(1).integers(5, 9, (BATCH, 32)))
    scorer = probed.Shots(window=4, separators=(7,))
    obs = OBS.replace(token_ids=ids)
    scores, state = score(scorer, obs)
    a = attention(OBS)
    for b, n in enumerate(LENGTHS):
        slots = np.argsort(np.where(POS[b, 0] >= 0, POS[b, 0], 99))[:n]
        rows = slots[-4:]
        mass = group_mean(a[b : b + 1][:, :, rows].sum(2))[0].sum(0)
        mass[slots[-4:]] = 0.0
        start = 0
        for i, s in enumerate(slots):
            if i + 1 == n or int(ids[b, s]) == 7:
                members = slots[start : i + 1]
                inside = [m for m in members if POS[b, 0, m] < n - 4]
                np.testing.assert_allclose(scores[b, 0, inside], mass[members].mean(), rtol=1e-4, atol=1e-7)
                assert (np.asarray(state["segment"])[b, 0, members] == 1 + start).all()
                start = i + 1


def test_scope_pins_the_prompt_and_ranks_generated_entries_by_the_current_query():
    scorer = probed.DecodeRegion(KeyNorm(), recent=1)
    scores, state = score(scorer, OBS)
    close(scores, score(KeyNorm(), OBS)[0])
    obs, padded = step(OBS, state, 8)
    obs, padded = step(obs, padded, 9)
    after = score(scorer, obs, padded)[0]
    row = group_mean(attention(obs)[:, :, 0])
    np.testing.assert_allclose(after[:, :, -2], row[:, :, -2], rtol=1e-4)
    assert (after[:, :, -1] > 1e5).all() and (after[:, :, :32] > 1e8)[VALID].all()


def test_criticaladakv_against_a_loop():
    """Ada-KV's budgets by score, then two stages in each head; heads that compete again get those budgets."""
    inner, alpha, share, epsilon = windows_of_four(), 0.2, 0.5, 1e-4
    policy = parse("criticaladakv(snapkv(window=4, kernel=3), budget=12)")
    base = np.asarray(score(inner, OBS)[0], np.float64)
    got = score(policy.scorer, OBS)[0]
    counts = np.asarray(policy.allocator.counts(jnp.asarray(got), OBS.valid, OBS.need("keep"), 0))
    wo = np.asarray(OBS.wo, np.float64).reshape(KV_HEADS, 2, DIM, -1)
    norm = np.abs(np.einsum("bhsd,hgde->bhgse", np.asarray(OBS.v, np.float64), wo)).sum(-1).mean(2)
    for b in range(base.shape[0]):
        valid, keep = VALID[b, 0], 12
        scores = np.where(valid, base[b], -np.inf)
        sure = np.zeros_like(valid[None].repeat(KV_HEADS, 0))
        for h in range(KV_HEADS):
            sure[h, np.argsort(-scores[h], kind="stable")[: int(alpha * keep)]] = True
        flat = np.where(sure, np.inf, scores).reshape(-1)
        winners = np.argsort(-flat, kind="stable")[: KV_HEADS * keep]
        budgets = np.bincount(winners // scores.shape[1], minlength=KV_HEADS)
        np.testing.assert_array_equal(counts[b], budgets)
        for h in range(KV_HEADS):
            order = np.argsort(-scores[h], kind="stable")
            first = order[: int(share * budgets[h])]
            second = np.where(valid, (base[b, h] + epsilon) * norm[b, h], -np.inf)
            second[first] = np.inf
            want = set(np.argsort(-second, kind="stable")[: budgets[h]].tolist())
            assert set(np.flatnonzero(got[b, h] >= 1e25).tolist()) == want


def test_criticaladakv_of_one_head_is_criticalkv():
    obs = dataclasses.replace(
        OBS, q=OBS.q[:, :2], k=OBS.k[:, :1], v=OBS.v[:, :1], pos=OBS.pos[:, :1], wo=OBS.wo[:2]
    )
    one = parse("criticaladakv(snapkv(window=4, kernel=3), budget=12)").scorer
    two = wrappers.OutputPerturbation(windows_of_four())
    got, want = score(one, obs)[0], score(two, obs)[0]
    for b in range(got.shape[0]):
        live = VALID[b, 0]
        best = np.argsort(-np.where(live, want[b, 0], -np.inf), kind="stable")[:12]
        assert set(np.flatnonzero((got[b, 0] >= 1e25) & live).tolist()) == set(best.tolist())


def windows_of_four():
    return parse("snapkv(window=4, kernel=3)").scorer
