"""Properties that follow from how methods are defined, where no formula of theirs is compared elsewhere."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import parse
from kvjax.policies.allocators import layers, tables
from kvjax.policies.allocators.adaptive import HeadCompetition
from kvjax.policies.scorers import compactor, probed, statistics, windows
from kvjax.policies.scorers.attention import AccumulatedAttention, LastQuery
from kvjax.policies.scorers.keys import KeyDiff
from tests.policies import allocator_cases as cases
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

LENGTH = np.asarray(LENGTHS)[:, None, None]


def at(obs, position):
    """bool [batch, kv_heads, slots]: the entries at a position, or at one int32 [batch] a row."""
    return np.asarray(obs.pos) == np.broadcast_to(np.asarray(position), BATCH)[:, None, None]


# ---- attention


def test_h2o_adds_up_the_columns_of_masked_attention():
    got, state = score(AccumulatedAttention(), OBS)
    prefill = group_mean(attention(OBS)).sum(axis=2)
    close(got, prefill)
    obs, padded = step(OBS, state, 11)
    row = group_mean(attention(obs))[:, :, 0]
    close(score(AccumulatedAttention(), obs, padded)[0], np.pad(prefill, ((0, 0), (0, 0), (0, 1))) + row, obs)


def test_scissorhands_asks_whether_attention_is_above_the_level_not_how_far():
    scorer = statistics.Persistence(window=8)
    obs, state = step(OBS, score(scorer, OBS)[1], 12)
    level = 1.0 / np.asarray(obs.valid).sum(-1).max(1)[:, None, None]
    # Both heads of a group alike, because their mean decides.
    mass = jnp.repeat(obs.mass[:, ::2], 2, axis=1)
    factor = np.repeat(np.random.default_rng(0).uniform(1, 9, mass[:, ::2].shape), 2, axis=1)
    scaled = jnp.where(mass >= level, mass * factor, mass)
    want = score(scorer, obs.replace(mass=mass), state)[0]
    np.testing.assert_array_equal(score(scorer, obs.replace(mass=scaled), state)[0], want)
    assert (scaled > mass).any() and len(np.unique(want[np.asarray(obs.valid)])) > 3


def test_roco_spares_what_varies_and_equal_deviations_leave_the_mean():
    sums, squares = np.full((2, *POS.shape), 0.5)
    count = np.full(POS.shape, 10.0)
    spiky = at(OBS, 3)
    sums, squares = np.where(spiky, 0.01, sums), np.where(spiky, 9.0, sums**2 / count)
    weakest = at(OBS, 5)
    sums = np.where(weakest, 0.2, sums)
    squares = np.where(weakest, 0.2**2 / count, squares)
    state = {"sum": sums, "squares": squares, "count": count}
    state = {n: jnp.asarray(x, jnp.float32) for n, x in state.items()}
    obs = OBS.replace(prefilling=False, mass=jnp.zeros((BATCH, 4, 32), jnp.float32))
    spared = score(statistics.MeanAndDeviation(decode_share=0.1), obs, state)[0]
    np.testing.assert_array_equal(np.where(VALID, spared, 9).argmin(-1), weakest.argmax(-1))
    assert (spared[spiky] > 2).all()
    plain = score(statistics.MeanAndDeviation(decode_share=0.0), obs, state)[0]
    np.testing.assert_array_equal(np.where(VALID, plain, 9).argmin(-1), spiky.argmax(-1))


def test_snapkv_keeps_the_neighbours_of_what_the_window_looks_at():
    """One key that draws all of the window's attention: kernel 5 keeps two entries on either side."""
    line = jnp.zeros(DIM).at[0].set(30.0)
    rows = (OBS.q_pos >= jnp.asarray(LENGTHS)[:, None] - 4)[:, None, :, None]
    k = jnp.where(jnp.asarray(at(OBS, 9))[..., None], line, OBS.k.at[..., 0].set(0.0))
    obs = OBS.replace(q=jnp.where(rows, line, OBS.q), k=k, keep=jnp.full((BATCH,), 9, jnp.int32))
    got = kept(parse("snapkv(budget=9, window=4, kernel=5)"), obs)
    np.testing.assert_array_equal(got, VALID & (((POS >= 7) & (POS <= 11)) | (POS >= LENGTH - 4)))


def test_tova_reads_the_last_query_alone_and_heads_agree():
    got = score(LastQuery(), OBS)[0]
    last = np.take_along_axis(attention(OBS), np.argmax(OBS.q_pos, axis=1)[:, None, None, None], axis=2)
    close(got, np.broadcast_to(last[:, :, 0].mean(axis=1, keepdims=True), got.shape))
    newest = OBS.q_pos == jnp.asarray(LENGTHS)[:, None] - 1
    earlier = OBS.replace(q=jnp.where(newest[:, None, :, None], OBS.q, -3.0 * OBS.q))
    chosen = kept(parse("tova(budget=12)"), earlier)
    np.testing.assert_array_equal(chosen, kept(parse("tova(budget=12)"), OBS))
    np.testing.assert_array_equal(chosen[:, 0], chosen[:, 1])


def test_streaming_llm_keeps_ends_whatever_the_attention():
    for seed in (0, 1):
        got = kept(parse("streaming_llm(budget=12, sink=4)"), prompt(seed))
        np.testing.assert_array_equal(got, VALID & ((POS < 4) | (POS >= LENGTH - 8)))


def test_attendre_with_everything_attended_is_first_in_first_out():
    lra = parse("attendre_lra(budget=12, top=64, recent=1)")
    np.testing.assert_array_equal(kept(lra, OBS), VALID & (POS >= LENGTH - 12))
    obs, state = step(OBS, score(lra.scorer, OBS)[1], 13)
    scores = np.where(obs.valid, score(lra.scorer, obs, state)[0], np.inf)
    np.testing.assert_array_equal(scores.argmin(-1), at(obs, 0).argmax(-1))


def test_attendre_lfa_never_evicts_the_most_attended():
    counts = np.asarray(score(statistics.AttendedTopK(3, False), OBS)[1]["usage"])
    got = kept(parse("attendre_lfa(budget=12, top=3, recent=1)"), OBS)
    for b, h in np.ndindex(BATCH, KV_HEADS):
        free = got[b, h] & (POS[b, h] < LENGTHS[b] - 1)
        lost = VALID[b, h] & ~got[b, h]
        assert counts[b, h][lost].max() <= counts[b, h][free].min()


# ---- keys and values


def test_l2norm_reads_keys_alone_and_small_ones_stay():
    policy = parse("l2norm(budget=12)")
    other = OBS.replace(q=-OBS.q, v=OBS.v * 3.0 + 1.0)
    np.testing.assert_array_equal(kept(policy, other), kept(policy, OBS))
    norm = np.where(VALID, np.linalg.norm(OBS.k, axis=-1), -1)
    largest = np.arange(32) == norm.argmax(-1)[..., None]
    assert not kept(policy, OBS)[largest].any()
    assert kept(policy, OBS.replace(k=jnp.where(largest[..., None], 0.1 * OBS.k, OBS.k)))[largest].all()


def test_keydiff_ignores_lengths_and_drops_copies_first():
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.1, 9, OBS.pos.shape), jnp.float32)[..., None]
    close(score(KeyDiff(), OBS.replace(k=OBS.k * scale))[0], score(KeyDiff(), OBS)[0])
    copies = (POS % 2 == 0) & VALID
    obs = OBS.replace(k=jnp.where(copies[..., None], jnp.arange(DIM) - 3.0, OBS.k))
    scores = np.where(VALID, score(KeyDiff(), obs)[0], np.inf)
    for b, h in np.ndindex(BATCH, KV_HEADS):
        n = copies[b, h].sum()
        assert copies[b, h][np.argsort(scores[b, h], kind="stable")[:n]].all()


def test_qfilters_turn_with_the_queries():
    """The same rotation of queries and keys changes no score."""
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(2).standard_normal((DIM, DIM)))[0], jnp.float32)
    turned = OBS.replace(q=OBS.q @ turn, k=OBS.k @ turn)
    close(score(windows.QueryFilter(), turned)[0], score(windows.QueryFilter(), OBS)[0], tol=1e-3)


@pytest.mark.parametrize("columns", [3, DIM, 3 * DIM])
def test_leverages_are_shares_of_the_sketch(columns):
    sketch = compactor.Leverage(columns).draw(0, KV_HEADS, DIM)
    got = np.where(VALID, compactor.leverage(OBS.k, OBS.valid, sketch), 0.0)
    assert got.min() >= 0 and got.max() <= 1 + 1e-5
    assert (got.sum(-1) <= min(columns, DIM) + 1e-3).all() and got.sum(-1).min() > 0.9 * min(columns, DIM)


def test_compactor_without_leverage_is_non_causal_attention_between_the_ends():
    ends = dict(first=3, last=2)
    plain = score(compactor.NonCausalAttention(8, **ends), OBS)[0]
    np.testing.assert_array_equal(score(compactor.Compactor(0.0, 8, 6, **ends), OBS)[0], plain)
    moved = OBS.replace(k=jnp.where((OBS.pos < 3)[..., None], 9.0, OBS.k))
    close(score(compactor.Compactor(0.0, 8, 6, **ends), moved)[0], plain)
    got = kept(parse("compactor(budget=12, blending=0.0, chunk=8, sketch=6, sink=3, recent=2)"), OBS)
    assert got[VALID & ((POS < 3) | (POS >= LENGTH - 2))].all()


def test_kvzip_plus_scales_with_the_value():
    obs = prompt(5, lengths=(32,))
    obs = obs.replace(q=obs.q[:, :, 20:], q_pos=obs.q_pos[:, 20:], hidden=obs.hidden[:, 20:])
    one = (obs.pos == 7)[..., None]
    scorer = probed.Reconstruction(sink=2, plus=True)
    got, base = (score(scorer, o)[0] for o in (obs.replace(v=jnp.where(one, 5.0 * obs.v, obs.v)), obs))
    np.testing.assert_allclose(got, np.where(one[..., 0], 5.0 * base, base), rtol=1e-5)
    assert base[one[..., 0]].min() > 0


# ---- budgets


@pytest.mark.parametrize("keep", [3, 12, 20])
def test_adakv_without_a_safeguard_keeps_more_mass_than_equal_heads(keep):
    obs = OBS.replace(keep=jnp.full((BATCH,), keep, jnp.int32))
    spec = f"keydiff(budget={keep})"
    scores = score(KeyDiff(), obs)[0]
    apart, equal = (
        np.where(kept(parse(s), obs), scores, 0).sum((1, 2)) for s in (f"{spec} | adakv(alpha=0.0)", spec)
    )
    assert (apart >= equal - 1e-5).all() and (apart > equal + 1e-3).any()
    for alpha in (0.0, 0.2, 1.0):
        alike = jnp.asarray(np.repeat(scores[:, :1], KV_HEADS, axis=1))
        counts = HeadCompetition(alpha).counts(alike, obs.valid, obs.keep, 0)
        assert np.ptp(np.asarray(counts), axis=1).max() <= 1  # ties: an odd entry goes to one of them
        np.testing.assert_array_equal(np.asarray(counts).sum(1), KV_HEADS * np.minimum(keep, LENGTHS))


@pytest.mark.parametrize(
    "allocator, most",
    [(layers.Preference(4, ceiling=2), 2), (layers.LayerErrors((0.97, 0.01, 0.01, 0.01), 2), 3)],
)
def test_what_a_ceiling_cuts_goes_to_the_other_layers(allocator, most):
    weights = [np.full(cases.B, x, np.float32) for x in (0.97, 0.01, 0.01, 0.01)]
    got = cases.model_counts(allocator, 10, weights, window=0)
    assert (got[:, 0] == 10 * most).all() and (got.sum((1, 2)) == cases.L * cases.H * 10).all()
    assert (got[:, 1:].sum(1) == 10 * (cases.L - most)).all() and np.ptp(got[:, 1:]) <= 1


def test_dynamickv_bounds_a_layer_by_rho_times_the_mean():
    made = [cases.scores_of(i) for i in range(cases.L)]
    scores, valid = ([jnp.asarray(x[j]) for x in made] for j in (0, 1))
    scores[2] = scores[2] + 5.0  # all winners
    keep, length = jnp.asarray([10, 10]), jnp.asarray(cases.LENGTHS)
    got = np.asarray(
        cases.counts_of_layers(layers.GlobalTop(rho=2), scores, valid, keep, length, [None] * cases.L)
    )
    assert (got[:, 2] == 20).all() and (got.sum((1, 2)) == cases.L * cases.H * 10).all()


def test_equal_budgets_per_layer_are_the_plain_method():
    table = tables.LayerTable((0.375,) * 2)
    inner = parse("keydiff(budget=0.375)")
    for n in (7, 21, 32):
        assert table.layer_keep(1, 2, None, n) == inner.keep(n)
    obs = OBS.replace(keep=inner.keep_counts(jnp.asarray(LENGTHS), 32))
    policy = dataclasses.replace(inner, allocator=table)
    np.testing.assert_array_equal(kept(policy, obs), kept(inner, obs))


def test_simlayerkv_finds_no_laziness_in_uniform_attention():
    obs = OBS.replace(q=jnp.zeros_like(OBS.q))
    share = 8 / np.asarray(LENGTHS)  # 2 sinks and 6 recent entries of n, one query each
    lazy = score(windows.LazyLayer(threshold=0.3, recent=6, initial=2), obs)[0]
    np.testing.assert_array_equal((np.where(VALID, lazy, 1) < 0).any((1, 2)), share > 0.3)


def test_one_ranking_for_all_heads_ignores_their_order():
    """TOVA and CompressKV rank once for all heads: exchanging the heads changes no score."""
    swapped = OBS.replace(k=OBS.k[:, ::-1], v=OBS.v[:, ::-1], q=OBS.q[:, jnp.asarray([2, 3, 0, 1])])
    for scorer in (LastQuery(), windows.RetrievalHeads(4, 3)):
        np.testing.assert_allclose(score(scorer, swapped)[0], score(scorer, OBS)[0], rtol=1e-5, atol=1e-7)
