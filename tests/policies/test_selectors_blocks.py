"""Properties of selectors over blocks, sentences and spans: InfLLM, ActQKV, LServe, LLSA, SentenceKV, LongCache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import arrays
from kvjax.policies.selectors.blocks import ProbeBlocks, Representatives, probe_query
from kvjax.policies.selectors.hierarchy import PooledLevels
from kvjax.policies.selectors.pages import PageBounds, SubChunkBounds
from kvjax.policies.selectors.refined import RefinedCodes
from kvjax.policies.selectors.sentences import Sentences
from kvjax.policies.selectors.spans import Spans
from kvjax.types import ModelShape
from tests.policies.selector_cases import (
    INV_FREQ,
    SCALE,
    SHAPE,
    B,
    D,
    G,
    H,
    built,
    call,
    draw,
    entries,
    later,
    softmax,
)

LENGTHS, N = (40, 27), 48


def np_rope(x, pos):
    angle = np.asarray(pos, np.float64)[..., None] * np.asarray(INV_FREQ, np.float64)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def test_infllm_represents_a_block_by_its_most_attended_tokens():
    block, best, local = 8, 3, 10
    s = Representatives(16, 0, 1, block=block, best=best, local=local)
    held = entries(LENGTHS, N)
    index, c = built(s, held)
    for b in range(B):
        n, q_pos = LENGTHS[b], np.asarray(c.q_pos)[b]
        for h in range(H):
            k = np.asarray(held.k, np.float64)[b, h, :n]
            mass = np.zeros(n)
            for g in range(G):
                for t, p in enumerate(q_pos):
                    if p >= 0:
                        seen = np.arange(max(0, p - local + 1), p + 1)
                        q = np.asarray(c.q, np.float64)[b, h * G + g, t]
                        mass[seen] += softmax(k[seen] @ q * SCALE)
            plain = np_rope(k, -np.arange(n))
            for j in range(-(-n // block)):
                inside = np.arange(block * j, min(n, block * j + block))
                top = inside[np.argsort(-mass[inside])[:best]]
                np.testing.assert_allclose(
                    np.asarray(index["keys"])[b, h, j], plain[top].mean(0), rtol=1e-3, atol=1e-4
                )
    scores = np.asarray(s.score(index, call(held))[0])
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])  # one choice for all heads


def test_actqkv_probe_is_the_mean_of_equal_queries_and_tilts_to_an_outlier():
    q = np.repeat(np.asarray(draw(B, H * G, 1, D)), 4, axis=2)
    held = jnp.asarray([4, 3], jnp.int32)
    np.testing.assert_allclose(probe_query(jnp.asarray(q), held), q[:, :, 0], rtol=1e-5)
    q[:, :, 2] += 5.0
    tilted = np.asarray(probe_query(jnp.asarray(q), held))
    far = np.linalg.norm(tilted - q[:, :, 2], axis=-1)
    assert (far < np.linalg.norm(q[:, :, 1:].mean(2) - q[:, :, 2], axis=-1)).all()
    weights = lambda x: ((x - x.mean(0)) ** 2 / ((x - x.mean(0)) ** 2).mean(0)).sum(-1)  # noqa: E731
    x = q[0, 0].astype(np.float64)
    np.testing.assert_allclose(tilted[0, 0], (weights(x) / weights(x).sum()) @ x, rtol=1e-4)


def test_actqkv_keeps_the_last_queries_and_reads_less_where_scores_are_peaked():
    s = ProbeBlocks(24, 0, 1, block=4, best=2, local=8, window=3)
    held = entries(LENGTHS, N)
    index, c = built(s, held)
    for b in range(B):
        order = np.argsort(np.asarray(c.q_pos)[b])[-3:]
        want = np_rope(np.asarray(c.q, np.float64)[b][:, order], -np.asarray(c.q_pos)[b][order])
        np.testing.assert_allclose(np.asarray(index["ring"])[b], want, rtol=1e-3, atol=1e-4)
    read = []
    for scale in (0.0, 100.0):
        some = {**index, "keys": index["keys"] * scale}
        scores = np.asarray(s.score(some, call(held))[0])
        read.append((scores > -np.inf)[0, 0, :10].sum())
    assert read[0] == 6 and read[1] < 6


@pytest.mark.parametrize("page, chunk", [(16, 4), (8, 8)])
def test_lserve_bounds_every_key_and_with_one_chunk_a_page_is_quest(page, chunk):
    s = SubChunkBounds(16, page=page, chunk=chunk)
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    held, new = later(held, 3)
    index, c = s.append(index, new, call(held)), call(held)
    scores = np.asarray(s.score(index, c)[0])
    for b in range(B):
        for h in range(H):
            dots = (
                np.asarray(c.grouped, np.float64)[b, h]
                @ np.asarray(held.k, np.float64)[b, h, : LENGTHS[b] + 3].T
            )
            for j in range(-(-dots.shape[1] // page)):
                assert scores[b, h, j] >= dots[:, page * j : page * j + page].max() - 1e-4
    whole = PageBounds(16, page=page)
    wide, _ = built(whole, held)
    quest = np.asarray(whole.score(wide, c)[0])
    live = np.isfinite(quest) & (quest > -1e30)
    assert (scores[live] <= quest[live] + 1e-4).all()
    if page == chunk:
        np.testing.assert_allclose(scores[live], quest[live], rtol=1e-5)
    assert SubChunkBounds(0.1, least=30).entries(100) == 30


def test_llsa_opens_all_blocks_then_ranks_like_flat_means_and_keeps_a_constant_value():
    s = PooledLevels(1.0, block=4, over="max")
    held = entries(LENGTHS, N).replace(v=jnp.full((B, H, N, D), 2.0))
    index, _ = built(s, held)
    held2, new = later(held, 2)
    index = s.append(index, new, call(held2))
    c = call(held2)
    scores = np.asarray(s.score(index, c)[0])
    for b in range(B):
        n = LENGTHS[b] + 2
        for h in range(H):
            for j in range(-(-n // 4)):
                mean = np.asarray(held2.k, np.float64)[b, h, 4 * j : min(n, 4 * j + 4)].mean(0)
                want = (np.asarray(c.grouped, np.float64)[b, h] @ mean).max() * SCALE
                np.testing.assert_allclose(scores[b, h, j], want, rtol=1e-4, atol=1e-5)
    few = PooledLevels(8, block=4)
    index, _ = built(few, held)
    c = call(held)
    scores = np.asarray(few.score(index, c)[0])
    assert ((scores[0] > -np.inf).sum(-1) <= 8).all()  # two coarse blocks were opened
    for chosen in (np.zeros((B, H, N // 4), bool), np.arange(B * H * (N // 4)).reshape(B, H, -1) % 3 == 0):
        out, _ = few.estimate(index, c, jnp.asarray(chosen))
        np.testing.assert_allclose(np.asarray(out), 2.0, rtol=1e-5)


def test_llsa_weighs_means_by_what_is_not_read():
    """With equal keys the mass is the number of entries that are not read; with overlap it counts all, on both levels."""
    held = entries(LENGTHS, N, k=np.zeros((B, H, N, D)))
    chosen = np.zeros((B, H, N // 4), bool)
    chosen[..., :2] = True
    for overlap in (False, True):
        s = PooledLevels(8, block=4, overlap=overlap)
        index, _ = built(s, held)
        _, lse = s.estimate(index, call(held), jnp.asarray(chosen))
        for b in range(B):
            want = LENGTHS[b] - 8 if not overlap else LENGTHS[b] + min(LENGTHS[b], 32)
            np.testing.assert_allclose(np.exp(np.asarray(lse)[b]), want, rtol=1e-5)


def test_sentencekv_scores_sentences_by_mean_query_and_mean_key():
    s = Sentences(12, stops=(7,), room=4, over="max")
    held = entries(LENGTHS, N)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 7, (B, N))
    for b, n in enumerate(LENGTHS):
        ids[b, N - n + np.asarray([5, 12, 20])] = 7  # the call's tokens stand at the right
    index, c = built(s, held, token_ids=ids)
    bounds = [0, 6, 13, 21]
    for b, n in enumerate(LENGTHS):
        assert np.asarray(index["starts"])[b, :4].tolist() == bounds
        for h in range(H):
            for j, (lo, hi) in enumerate(zip(bounds, [*bounds[1:], n])):
                np.testing.assert_allclose(
                    np.asarray(index["keys"])[b, h, j],
                    np.asarray(held.k)[b, h, lo:hi].mean(0),
                    rtol=1e-4,
                    atol=1e-5,
                )
    # A generated sentence: the mean runs over its queries, and a stop token starts anew.
    queries = []
    for step, token in enumerate([1, 2, 7, 3, 4]):
        held, new = later(held, seed=60 + step)
        c = call(held, seed=70 + step, token_ids=np.full((B, 1), token))
        index = s.append(index, new, c)
        queries.append(np.asarray(c.q, np.float64)[:, :, 0])
        if step == 3:  # one token after the boundary says nothing yet: all other sentences count alike
            first = np.asarray(s.score(index, c)[0])
            for b, n in enumerate(LENGTHS):
                assert (first[b, :, : n + 3] == 0).all() and np.isposinf(first[b, :, n + 3]).all()
    mean = np.asarray(index["query"]) / np.asarray(index["queries"])[:, None, None]
    np.testing.assert_allclose(mean, (queries[3] + queries[4]) / 2, rtol=1e-4, atol=1e-5)
    scores = np.asarray(s.score(index, c)[0])
    for b, n in enumerate(LENGTHS):
        assert np.isposinf(scores[b, :, n + 3 : n + 5]).all()  # the sentence being written
        for h in range(H):
            key = np.asarray(held.k, np.float64)[b, h, 6:13].mean(0)
            want = (mean[b, h * G : h * G + G] @ key).max()
            np.testing.assert_allclose(scores[b, h, 6:13], want, rtol=1e-3, atol=1e-4)


def test_longcache_does_not_depend_on_where_the_context_stands():
    s = Spans(16, 2, 2, span=4, top=2)
    held = entries(LENGTHS, N)
    c = call(held)
    want = np.asarray(s.score({}, c)[0])
    plain = np_rope(np.asarray(held.k, np.float64), -np.maximum(np.asarray(held.pos), 0))
    moved = held.replace(
        k=jnp.asarray(np_rope(plain, np.asarray(held.pos) + 1000), jnp.float32),
        pos=jnp.where(held.pos >= 0, held.pos + 1000, -1),
    )
    q = np_rope(np.asarray(c.q, np.float64), 1000 * np.ones((B, H * G, 1)))
    after = call(held, q=q).replace(q_pos=c.q_pos + 1000, stored=lambda: moved)
    np.testing.assert_allclose(np.asarray(s.score({}, after)[0]), want, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(want[:, 0], want[:, 1])
    for b, n in enumerate(LENGTHS):
        votes = np.zeros(N // 4)
        at = int(np.asarray(c.q_pos)[b, -1])
        for h in range(H):
            for g in range(G):
                q1 = np_rope(np.asarray(c.grouped, np.float64)[b, h, g], -at)
                logits = plain[b, h, :n] @ q1
                logits[:2] = logits[n - 2 :] = -np.inf
                votes[np.argsort(-logits)[:2] // 4] += 0
                for j in np.argsort(-logits)[:2]:
                    votes[j // 4] += 1
        np.testing.assert_array_equal(np.floor(np.where(np.isfinite(want[b, 0]), want[b, 0], 0)), votes)


@pytest.mark.parametrize("name", ["quest", "pq_refined"])
def test_a_million_positions(name):
    """Tables stay int32, nothing overflows, and a longer context in the same bucket compiles nothing."""
    slots = 1 << 20
    shape = ModelShape(1, 2, 1, 8, (None,), "float32", 1 << 21)
    s = (
        PageBounds(64, page=16, over="max")
        if name == "quest"
        else RefinedCodes(64, parts=2, bits=4, fine_parts=4, fine_bits=2, shortlist=0.001, over="max")
    )
    index = arrays.init(s.specs(1, slots, shape))
    if name == "pq_refined":
        index = {
            **index,
            "books": draw(*index["books"].shape),
            "fine_books": draw(*index["fine_books"].shape),
        }
    traces = []

    @jax.jit
    def step(index, k, slot, q):
        traces.append(1)
        from kvjax.policies.selectors.base import Call, Entries

        c = Call(q=q, q_pos=slot[:, 0], fill=slot[..., 0] + 1, stored=lambda: None, scale=1.0)
        index = s.append(index, Entries(k, k, slot, slot), c)
        scores, index = s.score(index, c)
        return jax.lax.top_k(scores, 4)[1], index

    for slot in (slots - 2, slots - 1):
        k = jnp.full((1, 1, 1, 8), 50.0)
        at = jnp.full((1, 1, 1), slot, jnp.int32)
        found, index = step(index, k, at, jnp.ones((1, 2, 1, 8)))
        assert found.dtype == jnp.int32
        assert slot // s.unit in np.asarray(found)[0, 0].tolist()
    assert len(traces) == 1 and SHAPE.layers == 1
