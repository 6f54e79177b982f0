"""Forms of compression beyond 'once after the prompt': amortised eviction, decode room, re-rotation, probes."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies import parse
from kvjax.policies.base import Policy, Room
from kvjax.policies.probes import Repeat
from tests.toy import Toy, ragged, rope, steps

LM = Toy()
LENGTHS, PROMPT, RESERVE = (24, 15), 24, 24
NEXT = np.random.default_rng(7).integers(0, 64, (2, 12))


@functools.cache
def params():
    return LM.init()


def plan_of(p, **kwargs):
    return Plan(p, LM.shape, 2, PROMPT, RESERVE, **kwargs)


@functools.cache
def run(spec, n=0):
    """(prefill logits, cache after the prompt, decode logits, cache after n decoded tokens)."""
    plan = plan_of(parse(spec))
    tokens, positions = ragged(LENGTHS, PROMPT)
    logits, cache = engine.prefill(LM, plan, params(), tokens, positions)
    if n == 0:
        return np.asarray(logits), cache, None, cache
    after, later = steps(LM, plan, params(), cache, NEXT[:, :n])
    return np.asarray(logits), cache, np.asarray(after), later


def stored(spec, cache, layer=0):
    """[row][head] -> sorted positions."""
    pos = np.asarray(ops.view(plan_of(parse(spec)), cache, layer).pos)
    return [[sorted(x[x >= 0].tolist()) for x in row] for row in pos]


def test_amortised_eviction_returns_to_the_budget_every_interval():
    spec = "decoding(streaming_llm(budget=8, sink=2), interval=4)"
    assert parse(spec).interval == parse("streaming_llm(budget=8, interval=4)").interval
    sizes = []
    for n in (3, 4, 8, 11):
        cache = run(spec, n)[3]
        rows = stored(spec, cache)
        sizes.append([len(rows[0][0]), len(rows[1][0])])
        for row, length in zip(rows, LENGTHS):
            seen = length + n
            held = 8 + n % 4
            assert row[0] == row[1] == [0, 1, *range(seen - held + 2, seen)]
    assert sizes == [[11, 11], [8, 8], [8, 8], [11, 11]]
    lp = plan_of(parse(spec)).layers[0]
    assert lp.keep_capacity == 8 and 12 <= lp.capacity < 12 + 8


@pytest.mark.parametrize(
    "spec", ["h2o(budget=8, recent=2, interval=3)", "adakv(h2o(budget=8, recent=2, interval=3))"]
)
def test_amortised_scores_are_kept_up_to_date(spec):
    """Between evictions the state grows by every step's mass: all rows of attention sum to one per head."""
    _, cache, _, later = run(spec, 2)
    plan = plan_of(parse(spec))
    seen = [ops.view(plan, c, 0) for c in (cache, later)]
    before, grown = (np.where(x.pos >= 0, x.slot_state["mass"], 0).sum(-1) for x in seen)
    np.testing.assert_allclose(grown - before, 2.0, rtol=1e-4)
    counts = [[len(h) for h in row] for row in stored(spec, run(spec, 12)[3])]
    start = [[len(h) for h in row] for row in stored(spec, cache)]
    assert counts == start


def test_corm_drops_while_decoding_what_no_recent_query_found_important():
    """Layer 0, whose operands follow from the tokens alone, against a loop in float64."""
    window, recent, interval, n = 6, 3, 3, 12
    spec = f"corm(window={window}, recent={recent}, interval={interval})"
    layer = params()["layers"][0]
    tokens, _ = ragged(LENGTHS, PROMPT)
    sizes = []
    for b, prompt in enumerate(LENGTHS):
        ids = np.concatenate([tokens[b, :prompt], NEXT[b]])
        x = params()["embed"][ids].astype(np.float64)
        h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        positions = np.arange(len(ids))[None]
        freq = 10000.0 ** (-np.arange(LM.head_dim // 2) / (LM.head_dim // 2))
        q, k = (
            np.asarray(rope(jnp.einsum("te,ehd->htd", h, layer[m])[None], positions, freq))[0] for m in "qk"
        )
        for head in range(LM.kv_heads):
            last = np.zeros(len(ids), int)  # 1 + position of the last query that found the entry important
            held = np.arange(prompt)

            mine, theirs = q[head * LM.q_heads // LM.kv_heads :][: LM.q_heads // LM.kv_heads], k[head]

            def look(at, held, mine=mine, theirs=theirs, last=last):
                logits = mine[:, at] @ theirs[held].T * LM.head_dim**-0.5
                a = np.exp(logits - logits.max(-1, keepdims=True))
                a = (a / a.sum(-1, keepdims=True)).max(0)
                last[held[a >= 1 / len(held)]] = at + 1

            def kept(length, held, limit, last=last):
                score = np.where(held >= length - recent, np.inf, last[held] - (length - window))
                most = np.argsort(-score, kind="stable")[:limit]
                return np.sort(held[most[score[most] >= 1]])

            for at in range(prompt - window, prompt):
                look(at, np.arange(at + 1))
            held = kept(prompt, held, None)
            limit = len(held)
            for t in range(n):
                held = np.append(held, prompt + t)
                look(prompt + t, held)
                if (t + 1) % interval == 0 or len(held) >= limit + interval:
                    held = kept(prompt + t + 1, held, limit)
                if t + 1 in (3, 5, 12):
                    assert stored(spec, run(spec, t + 1)[3])[b][head] == held.tolist(), (b, head, t)
                    sizes.append(len(held) - limit)
    assert min(sizes) < 0  # a head holds less than the prompt left it


@pytest.mark.parametrize("strategy", ["slide", "adaptive", "discontinuous"])
def test_scope_keeps_the_prompt_and_bounds_what_is_generated(strategy):
    spec = f"scope(snapkv(budget=8, window=3, kernel=3), strategy={strategy}, room=6, recent=2, horizon=10)"
    _, cache, _, _ = run(spec)
    prompt = stored(spec, cache)
    for n in (1, 5, 12):
        later = stored(spec, run(spec, n)[3])
        for b, h in np.ndindex(2, 2):
            new = [p for p in later[b][h] if p >= LENGTHS[b]]
            assert [p for p in later[b][h] if p < LENGTHS[b]] == prompt[b][h]
            assert set(range(LENGTHS[b] + n - min(n, 2), LENGTHS[b] + n)) <= set(new)
            open_ = 6 if strategy == "slide" else min(6, 2 + n // 2)
            slack = 2 if strategy == "discontinuous" else 0
            assert min(n, open_) <= len(new) <= min(n, open_ + slack)


def test_scope_with_room_for_all_that_is_generated_evicts_none_of_it():
    inner = "snapkv(budget=8, window=3, kernel=3)"
    _, _, want, kept = run(inner, 12)
    spec = f"scope({inner}, room=12, recent=2)"
    _, _, got, cache = run(spec, 12)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for layer in range(LM.layers):
        assert stored(spec, cache, layer) == stored(inner, kept, layer)


def test_finch_rerotates_keys_to_compact_positions():
    spec = "finch(budget=9, window=3)"
    plain, moved = run("finch(budget=9, window=3, rerotate=False)")[1], run(spec)[1]
    a, b = (ops.view(plan_of(parse(spec)), c, 0) for c in (plain, moved))
    full = ops.view(plan_of(parse("full")), run("full")[1], 0)
    inv_freq = 10000.0 ** (-np.arange(4) / 4)
    for row in range(2):
        np.testing.assert_array_equal(np.asarray(b.pos)[row, :, :9], [np.arange(9)] * 2)
        for h in range(2):
            old = np.asarray(a.pos)[row, h, :9]
            raw = rope(
                np.asarray(full.store["k"])[row : row + 1, h : h + 1, old], jnp.zeros((1, 9), int), inv_freq
            )
            undone = _rotate(np.asarray(raw)[0, 0], -old[:, None] * inv_freq)
            want = _rotate(undone, np.arange(9)[:, None] * inv_freq)
            np.testing.assert_allclose(np.asarray(b.store["k"])[row, h, :9], want, atol=1e-5)
            np.testing.assert_array_equal(np.asarray(b.store["v"])[row, h], np.asarray(a.store["v"])[row, h])
    np.testing.assert_array_equal(moved.next_position, [9, 9])
    np.testing.assert_array_equal(moved.length, LENGTHS)
    later = run(spec, 2)[3]
    np.testing.assert_array_equal(later.next_position, [11, 11])


def _rotate(x, angle):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def test_rerotation_without_eviction_is_the_identity():
    _, _, want, _ = run("full", 2)
    _, _, got, _ = run("finch(budget=48, window=3)", 2)
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=2e-4)


def test_streaming_llm_with_rerotation_is_the_papers_form():
    """Positions are always 0..K-1, before and after evictions while decoding."""
    spec = "streaming_llm(budget=8, sink=2, rerotate=True)"
    later = run(spec, 5)[3]
    np.testing.assert_array_equal(later.next_position, [8, 8])
    assert stored(spec, later, 1) == [[list(range(8))] * 2] * 2


def test_a_probe_leaves_no_trace_but_the_choice():
    """With room for everything the probed cache is the plain one, bit for bit in its positions and logits."""
    _, full, want, _ = run("full", 2)
    for spec in ("dapq(budget=48, count=3)", "citrus(budget=48, instruction=(3, 5), recent=2)"):
        logits, cache, got, _ = run(spec, 2)
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(cache.length, LENGTHS)
        np.testing.assert_array_equal(cache.next_position, LENGTHS)
        np.testing.assert_array_equal(logits, run("full", 2)[0])
        for i in range(2):
            k = np.asarray(ops.view(plan_of(parse(spec)), cache, i).store["k"])
            np.testing.assert_array_equal(k[0, :, :24], np.asarray(full.pools[i].store["k"])[0, :, :24])


def test_a_probe_beside_sliding_layers():
    """Sliding layers keep their window, whatever the probe; with room for all the rest nothing changes."""
    lm = Toy(window=6)
    tokens, positions = ragged(LENGTHS, PROMPT)
    logits = []
    for spec in ("full", "kvzip(budget=48, chunk=10, overlap=2)"):
        plan = Plan(parse(spec), lm.shape, 2, PROMPT, RESERVE)
        _, cache = engine.prefill(lm, plan, params(), tokens, positions)
        after, cache = steps(lm, plan, params(), cache, NEXT[:, :2])
        pos = np.asarray(ops.view(plan, cache, 1).pos)
        for b, n in enumerate(LENGTHS):
            assert sorted(pos[b, 0][pos[b, 0] >= 0]) == list(range(n + 2 - 5, n + 2))
        logits.append(np.asarray(after))
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-4, rtol=2e-4)


def test_the_instruction_decides_and_pseudo_tokens_hardly_do():
    def kept(spec):
        cache = run(spec)[1]
        rows = [(i, b, row) for i in (0, 1) for b, row in enumerate(stored(spec, cache, i))]
        return {(i, b, h): tuple(x) for i, b, row in rows for h, x in enumerate(row)}

    a, b = (kept(f"citrus(budget=8, recent=2, instruction=({x}, {x}))") for x in (3, 40))
    assert a != b
    one = kept("citrus(budget=8, recent=2, instruction=(3, 3))")
    assert all(one[i, b, 0] == one[i, b, 1] for i in (0, 1) for b in (0, 1))


def test_kvzip_repeats_the_prompt_in_chunks():
    tokens, positions = ragged(LENGTHS, PROMPT, left=True)
    passes = Repeat(chunk=10, overlap=2, prefix=(7,)).passes(jnp.asarray(tokens), jnp.asarray(positions))
    assert passes.tokens.shape == (3, 2, 13)
    np.testing.assert_array_equal(passes.start, [[0, 0], [10, 10], [20, 15]])
    np.testing.assert_array_equal(passes.end, [[10, 10], [20, 15], [24, 15]])
    for row, n in enumerate(LENGTHS):
        own = tokens[row][positions[row] >= 0]
        for p in range(3):
            want = [] if p * 10 >= n else [7, *own[max(p * 10 - 2, 0) : min(p * 10 + 10, n)]]
            live = np.asarray(passes.offsets)[p, row]
            np.testing.assert_array_equal(live[: len(want)], np.arange(len(want)))
            assert (live[len(want) :] == -1).all()
            np.testing.assert_array_equal(np.asarray(passes.tokens)[p, row, : len(want)], want)


def test_shots_end_at_separator_tokens():
    """Through the engine: every segment before the window is kept whole or not at all."""
    spec = "shotkv(budget=14, window=3, separators=(1, 7, 20, 33, 41, 50, 62))"
    tokens, _ = ragged(LENGTHS, PROMPT)
    for b, n in enumerate(LENGTHS):
        stops = np.flatnonzero(np.isin(tokens[b, :n], (1, 7, 20, 33, 41, 50, 62)))
        first = [0, *(stops + 1)]
        segments = [set(range(s, e)) for s, e in zip(first, [*first[1:], n]) if s < e]
        kept = set(stored(spec, run(spec)[1])[b][0])
        assert kept >= set(range(n - 3, n)) and 3 < len(kept) <= 14
        for segment in segments:
            free = segment & set(range(n - 3))
            assert not free & kept or free <= kept


def test_windowkv_layers_of_a_group_share_their_choice():
    spec = "windowkv(budget=10, suffix=4, size=2, group=2)"
    cache = run(spec)[1]
    assert stored(spec, cache, 0) == stored(spec, cache, 1)
    alone = "windowkv(budget=10, suffix=4, size=2, group=1)"
    assert stored(alone, run(alone)[1], 0) != stored(alone, run(alone)[1], 1)


def test_rerotation_in_chunked_prefill_keeps_positions_compact():
    plan = plan_of(parse("finch(budget=9, window=3)"))
    tokens, positions = ragged(LENGTHS, PROMPT)
    cache = ops.empty(plan).replace(expected=jnp.asarray(LENGTHS, jnp.int32))
    for at in range(0, PROMPT, 8):
        part = slice(at, at + 8)
        _, cache = engine.extend(
            LM, plan, params(), cache, tokens[:, part], positions[:, part], compress=True
        )
    np.testing.assert_array_equal(cache.next_position, [9, 9])
    np.testing.assert_array_equal(cache.length, LENGTHS)
    for i in range(2):
        np.testing.assert_array_equal(
            np.asarray(ops.view(plan, cache, i).pos)[..., :9], [[np.arange(9)] * 2] * 2
        )


def test_bad_combinations():
    with pytest.raises(ValueError, match="rerotate needs the same number"):
        parse("adakv(finch(budget=9, window=3))")
    with pytest.raises(ValueError, match="interval"):
        parse("h2o(interval=0)")
    with pytest.raises(ValueError, match="scores prompts only"):
        parse("decoding(criticalkv(expected_attention()))")
    with pytest.raises(ValueError, match="decode room"):
        Room(4, 5)
    sliding = dataclasses.replace(LM, window=4).shape
    with pytest.raises(ValueError, match="sliding windows"):
        Plan(parse("finch(budget=9, window=3)"), sliding, 1, 24, 0)
    with pytest.raises(ValueError, match="decides layer by layer"):
        Policy(interval=2, allocator=parse("kvzip").allocator)
