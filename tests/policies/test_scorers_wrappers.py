"""Scorers that refine others, and scorers of probes: their own properties, against float64 loops."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import parse
from kvjax.policies.scorers import probed, wrappers
from kvjax.policies.scorers.attention import WindowAttention
from kvjax.policies.scorers.keys import KeyNorm
from tests.policies.observations import (
    BATCH,
    DIM,
    KV_HEADS,
    LENGTHS,
    OBS,
    POS,
    VALID,
    attention,
    close,
    group_mean,
    kept,
    prompt,
    score,
    step,
)

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
