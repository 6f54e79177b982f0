"""What selection units keep: whole chunks, windows and segments, exact counts, representatives."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import parse
from kvjax.policies.allocators.everywhere import CompositeTokens, GlobalHeads
from kvjax.policies.allocators.threshold import Threshold
from kvjax.policies.base import Tokens
from kvjax.policies.selections.chunks import Chunks, Crush, EntropyGatedChunks, Segments
from tests.policies.observations import BATCH, KV_HEADS, LENGTHS, SLOTS, kept, prompt

OBS = prompt()
VALID = np.asarray(OBS.valid)
POS = np.asarray(OBS.pos)
RNG = np.random.default_rng(0)
SCORES = jnp.asarray(RNG.standard_normal((BATCH, KV_HEADS, SLOTS)), jnp.float32)


def chosen(selection, scores=SCORES, counts=13, capacity=SLOTS):
    """bool [batch, kv_heads, slots]."""
    if np.ndim(counts) == 0:
        counts = jnp.full((BATCH, KV_HEADS), counts, jnp.int32)
    index = np.asarray(selection.select(scores, OBS.valid, jnp.asarray(counts), capacity))
    assert (np.diff(index, axis=-1) >= 0).all()
    out = np.zeros((BATCH, KV_HEADS, SLOTS + 1), int)
    for b, h in np.ndindex(BATCH, KV_HEADS):
        np.add.at(out[b, h], index[b, h], 1)
    assert out[..., :SLOTS].max() <= 1 and not out[..., :SLOTS][~VALID].any()
    return out[..., :SLOTS].astype(bool)


def chunks_of(length: int, size: int):
    return [range(s, min(s + size, length)) for s in range(0, length, size)]


def test_chunks_are_whole_shared_by_heads_and_the_best_that_fit():
    keep = chosen(Chunks(5))
    total = np.where(VALID, SCORES, 0).sum(1)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_array_equal(keep[b, 0], keep[b, 1])
        slots = np.argsort(np.where(VALID[b, 0], POS[b, 0], 99))
        ranked = sorted(chunks_of(n, 5), key=lambda c: -total[b, slots[list(c)]].mean())
        want, left = np.zeros(SLOTS, bool), 13
        for c in ranked:
            if len(c) > left:
                break
            want[slots[list(c)]], left = True, left - len(c)
        np.testing.assert_array_equal(keep[b, 0], want)


def test_chunks_of_one_token_are_tokens():
    one_head = jnp.broadcast_to(SCORES[:, :1], SCORES.shape)
    np.testing.assert_array_equal(chosen(Chunks(1), one_head), chosen(Tokens(), one_head))


def test_chunk_counts_below_a_chunk_and_beyond_the_row():
    few = chosen(Chunks(8), counts=3)
    assert (few.sum(-1) == 3).all() and len({r for r in np.flatnonzero(few[0, 0]) // 8}) == 1
    np.testing.assert_array_equal(chosen(Chunks(8), counts=32), VALID)
    np.testing.assert_array_equal(chosen(EntropyGatedChunks(5, 2), counts=32), VALID)
    np.testing.assert_array_equal(chosen(Crush(0.5), counts=32), VALID)


def test_entropy_gate_meets_the_count_exactly_with_one_set_for_all_heads():
    for count in (1, 7, 13, 20):
        keep = chosen(EntropyGatedChunks(5, 2), jnp.abs(SCORES), counts=count)
        assert (keep.sum(-1) == count).all()
        np.testing.assert_array_equal(keep[:, 0], keep[:, 1])


def test_windowkv_keeps_the_suffix_and_whole_windows():
    for mode in ("average", "max"):
        keep = kept(parse(f"windowkv(budget=12, mode={mode}, suffix=4, size=3, group=8)"), OBS)
        for b, n in enumerate(LENGTHS):
            np.testing.assert_array_equal(keep[b, 0], keep[b, 1])
            positions = set(POS[b, 0][keep[b, 0]].tolist())
            assert set(range(n - 4, n)) <= positions
            review = sorted(positions - set(range(n - 4, n)))
            assert {p // 3 for p in review} == {p // 3 for p in review if set(c_of(p, n - 4)) <= positions}


def c_of(p: int, n: int):
    return range(p // 3 * 3, min(p // 3 * 3 + 3, n))


def test_windowkv_budgets_fall_by_group():
    alloc = parse("windowkv(budget=100, suffix=20, group=2)").allocator
    levels = [alloc.layer_keep(i, 8, 100, 1000) for i in range(8)]
    assert levels[::2] == levels[1::2] and levels == sorted(levels, reverse=True)
    assert levels[0] == 2 * 80 - 80 * 8 // 14 + 20 and levels[-1] == 80 * 8 // 14 + 20
    assert [int(alloc.layer_keep(i, 8, jnp.asarray(100), jnp.asarray(1000))) for i in range(8)] == levels
    uneven = [
        parse("windowkv(budget=100, suffix=20)").allocator.layer_keep(i, 12, 100, 1000) for i in range(12)
    ]
    assert 1200 - 24 <= sum(uneven) <= 1200 and uneven[0] > uneven[-1] == 80 * 8 // 14 + 20


def test_segments_stay_or_go_whole():
    shot = np.repeat([0, 1, 2, 3, 4, 5], [4, 7, 6, 3, 8, 4])
    mean = jnp.asarray([0.3, 0.9, 0.1, 0.5, 0.8, 0.2])[shot]
    scores = jnp.broadcast_to(mean, SCORES.shape)
    keep = chosen(Segments(), scores, counts=17)
    assert set(shot[keep[0, 0]]) == {1, 4} and keep[0, 0].sum() == 15  # 7 + 8; the next has 3
    tiny = chosen(Segments(), scores, counts=4)
    assert set(shot[tiny[0, 0]]) == {1} and tiny[0, 0].sum() == 4


@pytest.mark.parametrize("anchor", ["mean", "zeros", "ones", "alternate"])
def test_crush_represents_the_evicted_at_even_strides(anchor):
    base, keep = chosen(Tokens(), counts=8), chosen(Crush(0.5, anchor), counts=12)
    assert (keep.sum(-1) == 12).all()
    important = chosen(Tokens(), counts=6)
    assert keep[important].all() and base.sum() == 8 * BATCH * KV_HEADS
    np.testing.assert_array_equal(chosen(Crush(0.0, anchor), counts=8), base)
    half = [chosen(Tokens(), counts=jnp.full((BATCH, KV_HEADS), (n + 1) // 2)) for n in LENGTHS]
    for b, n in enumerate(LENGTHS):
        bits = half[b][b]
        at = {"mean": 2 * bits.sum(-1) > n, "zeros": [0, 0], "ones": [1, 1], "alternate": [0, 1]}[anchor]
        distance = (bits != np.asarray(at, bool)[:, None]).sum(0)
        for h in range(KV_HEADS):
            lost = np.flatnonzero(VALID[b, h] & ~important[b, h])
            order = lost[np.argsort(distance[lost], kind="stable")]
            want = {order[i * len(order) // 6] for i in range(6)}
            assert set(np.flatnonzero(keep[b, h] & ~important[b, h])) == want


def test_threshold_bounds_a_layer_by_its_lowest_scores():
    keep = jnp.asarray([12, 4], jnp.int32)
    counts = np.asarray(Threshold(0.0).counts(SCORES, OBS.valid, keep, 0))
    for b in range(BATCH):
        passing = [
            np.sort(SCORES[b, h][VALID[b, h] & (np.asarray(SCORES[b, h]) >= 0)]) for h in range(KV_HEADS)
        ]
        flat = np.sort(np.concatenate(passing))[::-1][: KV_HEADS * int(keep[b])]
        np.testing.assert_array_equal(counts[b], [(p >= flat[-1]).sum() for p in passing])


def test_all_layers_and_heads_compete():
    layers = [SCORES, SCORES * 2.0, SCORES - 0.5]
    valid, keep = [OBS.valid] * 3, jnp.asarray([9, 5], jnp.int32)
    counts = np.stack(GlobalHeads().model_counts(layers, valid, keep, keep, [None] * 3), axis=1)
    for b in range(BATCH):
        flat = np.concatenate([np.asarray(x)[b][VALID[b]] for x in layers])
        level = np.sort(flat)[::-1][3 * KV_HEADS * int(keep[b]) - 1]
        want = [[(np.asarray(x)[b, h][VALID[b, h]] >= level).sum() for h in range(KV_HEADS)] for x in layers]
        np.testing.assert_array_equal(counts[b], want)


def test_composite_tokens_give_layer_0_most_and_heads_alike():
    layers = [SCORES, SCORES * 2.0, SCORES - 0.5]
    valid, keep = [OBS.valid] * 3, jnp.asarray([9, 5], jnp.int32)
    counts = np.stack(CompositeTokens().model_counts(layers, valid, keep, keep, [None] * 3), axis=1)
    assert (counts[:, :, 0] == counts[:, :, 1]).all() and (counts[:, 0, 0] == counts[:, :, 0].max(1)).all()
    np.testing.assert_array_equal(counts[:, :, 0].sum(1), 3 * np.asarray(keep))
    for b in range(BATCH):
        ranked = [np.sort(np.asarray(x)[b][:, VALID[b, 0]], axis=-1)[:, ::-1].mean(0) for x in layers]
        ranked[0] = np.max(ranked, axis=0)
        level = np.sort(np.concatenate(ranked))[::-1][3 * int(keep[b]) - 1]
        np.testing.assert_array_equal(counts[b, 1:, 0], [(r >= level).sum() for r in ranked[1:]])
