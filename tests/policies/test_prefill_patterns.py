"""Prefill patterns against float64 loops: tables, what attention then computes, static shapes, whole prompts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies.prefill_patterns.flexprefill import FlexPrefill
from kvjax.policies.prefill_patterns.static import AShape, Streaming
from kvjax.policies.prefill_patterns.vertical_slash import MInference, VerticalSlash
from kvjax.policies.prefill_patterns.xattention import XAttention
from kvjax.sparse_prefill import sparse_attention
from tests.policies.observations import Q_HEADS
from tests.policies.pattern_cases import BLOCK, GATES, LENGTHS, PATTERNS, SLOTS, case, causal, exact, mask_of
from tests.toy import Toy, ragged, steps

QUICK = ("a_shape", "xattention")  # of the tests that compile a pattern for one question
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in PATTERNS]
)


@functools.partial(jax.jit, static_argnames=("pattern",))
def attend(pattern, obs):
    return sparse_attention(pattern, obs, aligned=True, implementation="xla")


@EVERY
def test_attention_reads_exactly_the_blocks_of_the_table(name):
    obs, pattern = case(), PATTERNS[name]
    keep = mask_of(pattern, obs)
    out, lse = attend(pattern, obs)
    want, want_lse, _ = exact(obs, keep)
    np.testing.assert_allclose(np.asarray(out), want, rtol=1e-4, atol=1e-4)
    valid = np.asarray(obs.q_pos) >= 0
    np.testing.assert_allclose(
        np.asarray(lse).swapaxes(0, 1)[:, valid], want_lse.swapaxes(0, 1)[:, valid], rtol=1e-4, atol=1e-4
    )


@EVERY
def test_a_table_is_causal_and_holds_the_diagonal_and_the_first_block(name):
    obs, pattern = case(1), PATTERNS[name]
    table = pattern.blocks(obs, aligned=True)
    n = -(-SLOTS // BLOCK)
    assert table.indices.shape == (2, Q_HEADS, n, n) and table.indices.dtype == jnp.int32
    rows = np.asarray(table.indices)
    for row in rows.reshape(-1, n):
        used = row[row >= 0]
        assert (np.diff(used) > 0).all() and (row[len(used) :] == -1).all()
    keep, seen = mask_of(pattern, obs), causal(obs)
    assert not (keep & ~seen).any()
    assert keep.sum() < np.broadcast_to(seen, keep.shape).sum()  # it is sparse
    for b, length in enumerate(LENGTHS):
        for i in range(-(-length // BLOCK)):
            assert keep[b, :, i, i].all() and keep[b, :, i, 0].all()


@EVERY
def test_the_side_of_the_padding_changes_nothing(name):
    pattern = PATTERNS[name]
    obs = case(2)
    out, lse = attend(pattern, obs)
    shift = np.asarray([SLOTS - n for n in LENGTHS])
    turn = lambda x, axis: jnp.stack([jnp.roll(r, s, axis) for r, s in zip(x, shift)])  # noqa: E731
    left = obs.replace(
        q=turn(obs.q, 1), k=turn(obs.k, 1), v=turn(obs.v, 1), q_pos=turn(obs.q_pos, 0), pos=turn(obs.pos, 1)
    )
    got, got_lse = attend(pattern, left)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(turn(out, 1)))
    np.testing.assert_array_equal(np.asarray(got_lse), np.asarray(turn(lse, 1)))


@pytest.mark.parametrize(
    "pattern",
    [
        AShape(sink=0, window=SLOTS, block=BLOCK),
        AShape(sink=SLOTS, window=0, block=BLOCK),
        AShape(sink=0, window=0, last=SLOTS, block=BLOCK),
        Streaming(scores=GATES, sparsity=0.0, block=BLOCK),
        VerticalSlash(vertical=SLOTS, slash=0, first=0, nearest=0, block=BLOCK, min_recall=0),
        VerticalSlash(vertical=0, slash=SLOTS, first=0, nearest=SLOTS, block=BLOCK, min_recall=0),
        MInference(
            vertical=0, slash=0, first=0, nearest=0, tokens=SLOTS + 2, window=0, block=BLOCK, min_recall=1.0
        ),
        XAttention(stride=1, threshold=1.0, block=BLOCK, min_recall=0),
        FlexPrefill(gamma=1.0, min_budget=4, block=BLOCK, min_recall=0),
        AShape(sink=1, window=1, block=BLOCK, min_recall=1.0),
        AShape(sink=1, window=1, block=BLOCK, min_tokens=29),
    ],
    ids=lambda p: f"{type(p).__name__}",
)
def test_limits_that_are_dense(pattern):
    obs = case(3)
    keep = mask_of(pattern, obs)
    rows = slice(1, 2) if pattern.min_tokens else slice(None)  # only the row of 19 tokens is short
    np.testing.assert_array_equal(keep[rows], np.broadcast_to(causal(obs), keep.shape)[rows])


def test_a_short_prompt_has_no_table():
    obs = case(slots=8, lengths=(8, 5))
    assert AShape(sink=1, window=1, block=4).blocks(obs, aligned=True) is None
    assert AShape(sink=1, window=1, block=2).blocks(obs, aligned=True) is not None


def test_a_shape_is_its_tokens_in_blocks():
    obs, p = case(4), PATTERNS["tri_shape"]
    for pattern in (PATTERNS["a_shape"], p):
        keep = mask_of(pattern, obs)
        want = np.zeros_like(keep)
        for b, n in enumerate(LENGTHS):
            for t in range(n):
                for s in range(t + 1):
                    last = pattern.last and t >= n - pattern.last
                    if s < pattern.sink or s > t - pattern.window or last:
                        want[b, :, t // BLOCK, s // BLOCK] = True
        np.testing.assert_array_equal(keep, want)


def test_streaming_heads_follow_their_gates():
    obs, pattern = case(5), PATTERNS["streaming"]
    for layer in range(2):
        keep = mask_of(pattern, obs.replace(layer=layer))
        narrow = mask_of(AShape(sink=2, window=4, block=BLOCK), obs)
        for h in range(Q_HEADS):
            full = GATES[layer][h // 2] > 0.5
            want = np.broadcast_to(causal(obs), keep.shape) if full else narrow
            np.testing.assert_array_equal(keep[:, h], want[:, h])
    # A streaming head's output does not depend on the tokens between sinks and window.
    far = obs.replace(k=obs.k.at[:, :, 8:16].add(1.0), v=obs.v.at[:, :, 8:16].add(1.0))
    a, b = (np.asarray(attend(pattern, o)[0])[0, :, 28:] for o in (obs, far))
    np.testing.assert_array_equal(a[:2], b[:2])
    assert np.abs(a[2:] - b[2:]).max() > 1e-3


LM, PROMPT = Toy(layers=1), 48


def logits_of(spec, chunk=None, lengths=(48, 33)):
    plan = Plan(P.parse(spec), LM.shape, 2, PROMPT, 4, page_size=4)
    params = LM.init()
    tokens, positions = ragged(lengths, PROMPT)
    if chunk is None:
        logits, cache = engine.prefill(LM, plan, params, tokens, positions)
    else:
        cache = ops.empty(plan).replace(expected=jnp.asarray(lengths, jnp.int32))
        logits = None
        for at in range(0, PROMPT, chunk):
            part = slice(at, at + chunk)
            new, cache = engine.extend(
                LM, plan, params, cache, tokens[:, part], positions[:, part], compress=True
            )
            ends = np.any(positions[:, part] >= 0, axis=1, keepdims=True)
            logits = new if logits is None else jnp.where(ends, new, logits)
    after, _ = steps(LM, plan, params, cache, np.ones((2, 3), np.int64))
    return np.asarray(logits), np.asarray(after)


def test_chunks_follow_the_pattern_over_stored_entries():
    spec = "a_shape(sink=2, window=9, block=1)"
    whole, chunked = logits_of(spec), logits_of(spec, chunk=8)
    for a, b in zip(whole, chunked):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.abs(whole[0] - logits_of("full")[0]).max() > 1e-2


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("keydiff(budget=0.25)", marks=pytest.mark.slow),
        pytest.param("h2o(budget=0.5)", marks=pytest.mark.slow),
        pytest.param("kivi(bits=4, group=8, residual=128)", marks=pytest.mark.slow),
    ],
)
def test_a_pattern_composes(other):
    """Reading everything, a composition is the other method; reading less, its scores see the sparse attention."""
    want = logits_of(other)
    for spec in (
        f"xattention(block=4, stride=2, threshold=1.0) | {other}",
        f"{other} | a_shape(sink=48, block=4)",
    ):
        for a, b in zip(want, logits_of(spec)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    sparse = logits_of(
        f"minference(vertical=2, slash=3, first=1, nearest=1, block=4, min_recall=0.2) | {other}"
    )
    assert np.isfinite(sparse[1]).all() and np.abs(sparse[0] - want[0]).max() > 1e-3


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match="both set the prefill"):
        P.parse("a_shape | xattention")
    with pytest.raises(ValueError, match="stride=5 must divide block=128"):
        P.parse("xattention(stride=5)")
    with pytest.raises(ValueError, match="gamma=0"):
        P.parse("flexprefill(gamma=0)")
    with pytest.raises(ValueError, match="window must be at least 0"):
        P.parse("a_shape(window=-1)")
    with pytest.raises(ValueError, match="1 layers and"):
        Plan(P.parse("duo_prefill(heads=((0.5, 0.1, 0.3),), sparsity=0.5)"), LM.shape, 1, PROMPT, 0)
