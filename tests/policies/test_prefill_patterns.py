"""Prefill patterns against float64 loops: which blocks they name, what they cover, and what attention then computes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies.prefill_patterns.blocks import Blocks, covering, largest
from kvjax.policies.prefill_patterns.flexprefill import FlexPrefill, divergence
from kvjax.policies.prefill_patterns.static import AShape, Streaming
from kvjax.policies.prefill_patterns.vertical_slash import MInference, VerticalSlash
from kvjax.policies.prefill_patterns.xattention import XAttention, antidiagonal_mass
from kvjax.sparse_prefill import sparse_attention
from pallas_kernels.prefill_attention import block_table
from tests.kernels.prefill.attention_oracle import attention
from tests.policies.observations import KV_HEADS, Q_HEADS, prompt
from tests.toy import Toy, ragged, steps

BLOCK, SLOTS = 4, 30
LENGTHS = (30, 19)
GATES = ((0.1, 0.9), (0.8, 0.2))
PATTERNS = {
    "a_shape": AShape(sink=2, window=5, block=BLOCK),
    "tri_shape": AShape(sink=2, window=5, last=3, block=BLOCK),
    "streaming": Streaming(scores=GATES, sink=2, recent=4, block=BLOCK),
    "vertical_slash": VerticalSlash(
        vertical=2, slash=3, first=1, nearest=1, block=BLOCK, sample=5, min_recall=0.0
    ),
    "minference": MInference(
        vertical=2,
        slash=3,
        first=1,
        nearest=1,
        sink=1,
        window=3,
        tokens=8,
        block=BLOCK,
        sample=5,
        min_recall=0.6,
    ),
    "xattention": XAttention(stride=2, threshold=0.7, block=BLOCK, min_recall=0.0),
    "flexprefill": FlexPrefill(gamma=0.6, tau=0.2, min_budget=4, block=BLOCK, sample=5, min_recall=0.0),
}
QUICK = ("a_shape", "xattention")  # of the tests that compile a pattern for one question
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in PATTERNS]
)


def case(seed=0, slots=SLOTS, lengths=LENGTHS, scale=3.0):
    """A ragged prompt, rows padded behind; garbage, NaN included, in the padding."""
    obs = prompt(seed, lengths=lengths, slots=slots, scale=scale)
    pos = np.full((len(lengths), slots), -1, np.int32)
    for i, n in enumerate(lengths):
        pos[i, :n] = np.arange(n)
    bad = jnp.asarray(pos < 0)[:, None, :, None]
    return obs.replace(
        q_pos=jnp.asarray(pos),
        pos=jnp.asarray(np.repeat(pos[:, None], KV_HEADS, 1)),
        k=jnp.where(bad, jnp.nan, obs.k),
        v=jnp.where(bad, jnp.nan, obs.v),
    )


@functools.partial(jax.jit, static_argnames=("pattern", "aligned"))
def _mask(pattern, obs, aligned):
    table = pattern.blocks(obs, aligned=aligned)
    return block_table.to_mask(table, -(-obs.k.shape[2] // pattern.block))


def mask_of(pattern, obs, aligned=True):
    return np.asarray(_mask(pattern, obs, aligned))


@functools.partial(jax.jit, static_argnames=("pattern",))
def attend(pattern, obs):
    return sparse_attention(pattern, obs, aligned=True, implementation="xla")


def exact(obs, keep=None):
    """(out, lse, probs) of the float64 oracle, restricted to the blocks of `keep`."""
    allowed = None if keep is None else lambda b, h, t, s: keep[b, h, t // BLOCK, s // BLOCK]
    return attention(
        obs.q, obs.k, obs.v, obs.q_pos, obs.pos, scale=obs.scale, softcap=obs.softcap, allowed=allowed
    )


def causal(obs):
    """bool [batch, 1, q_blocks, k_blocks]: some query of the block sees some key of the block."""
    n = -(-obs.k.shape[2] // BLOCK)
    out = np.zeros((obs.k.shape[0], 1, n, n), bool)
    for b, pos in enumerate(np.asarray(obs.q_pos)):
        for t in np.flatnonzero(pos >= 0):
            out[b, 0, t // BLOCK, : t // BLOCK + 1] = True
    return out


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


def test_xattention_with_stride_1_is_the_exact_mass_and_keeps_its_share():
    obs = case(6)
    x = Blocks(obs, BLOCK, 4, True)
    mass = np.asarray(antidiagonal_mass(x, 1))
    probs = exact(obs)[2]
    n = -(-SLOTS // BLOCK)
    pad = np.pad(probs, ((0, 0), (0, 0), (0, n * BLOCK - SLOTS), (0, n * BLOCK - SLOTS)))
    want = pad.reshape(2, Q_HEADS, n, BLOCK, n, BLOCK).sum((3, 5))
    np.testing.assert_allclose(mass, want, rtol=1e-4, atol=1e-5)
    for threshold in (0.5, 0.8, 0.95):
        keep = mask_of(XAttention(stride=1, threshold=threshold, block=BLOCK, min_recall=0), obs)
        assert ((want * keep).sum(-1) >= threshold * want.sum(-1) - 1e-5).all()
        # As few as possible: without its least block beside the forced ones, a row is short of the threshold.
        for at in np.ndindex(keep.shape[:3]):
            extra = [j for j in range(1, at[2]) if keep[(*at, j)]]
            if extra:
                less = (want[at] * keep[at]).sum() - min(want[(*at, j)] for j in extra)
                assert less < threshold * want[at].sum() + 1e-5


def test_xattention_strides_average_antidiagonals():
    obs = case(7, lengths=(30, 20)).replace(softcap=4.0)
    stride, n = 2, 30
    q, k = np.asarray(obs.q, np.float64)[0], np.asarray(obs.k, np.float64)[0]
    got = np.asarray(antidiagonal_mass(Blocks(obs, BLOCK, 4, True), stride))[0]
    tiles = n // stride
    for h in range(Q_HEADS):
        want = np.zeros((8, 8))
        for r in range(tiles):
            logit = np.asarray(
                [
                    sum(q[h, r * stride + stride - 1 - p] @ k[h // 2, c * stride + p] for p in range(stride))
                    for c in range(r + 1)
                ]
            )
            e = np.exp(4.0 * np.tanh(logit * obs.scale / stride / 4.0))
            for c in range(r + 1):
                want[r * stride // BLOCK, c * stride // BLOCK] += e[c] / e.sum()
        np.testing.assert_allclose(got[h], want, rtol=1e-4, atol=1e-5)


def test_recall_and_fallback_are_per_head():
    obs = case(8)
    pattern = PATTERNS["a_shape"]
    keep, probs = mask_of(pattern, obs), exact(obs)[2]
    want = np.zeros((2, Q_HEADS))
    for b, n in enumerate(LENGTHS):
        for h in range(Q_HEADS):
            seen = [keep[b, h, t // BLOCK, np.arange(SLOTS) // BLOCK] for t in range(n - 5, n)]
            want[b, h] = np.mean([probs[b, h, t] @ s for t, s in zip(range(n - 5, n), seen)])
    got = np.asarray(Blocks(obs, BLOCK, 5, True).recall(jnp.asarray(keep)))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    limit = float(np.median(want))
    mixed = mask_of(dataclasses.replace(pattern, sample=5, min_recall=limit), obs)
    for b, h in np.ndindex(2, Q_HEADS):
        expected = causal(obs)[b, 0] if want[b, h] < limit else keep[b, h]
        np.testing.assert_array_equal(mixed[b, h], expected)


def test_vertical_slash_takes_the_largest_sums():
    obs, sample = case(9), 5
    probs = exact(obs)[2]
    pattern = VerticalSlash(vertical=3, slash=3, first=1, nearest=1, block=BLOCK, sample=sample, min_recall=0)
    keep = mask_of(pattern, obs)
    for b, n in enumerate(LENGTHS):
        for h in range(Q_HEADS):
            last = probs[b, h, n - sample : n, :n]
            columns, apart = last.sum(0), np.zeros(n)
            for r in range(sample):
                for s in range(n - sample + r + 1):
                    apart[n - sample + r - s] += last[r, s]
            columns[0] = apart[0] = np.inf
            vertical, slash = np.argsort(-columns)[:3], np.argsort(-apart)[:3]
            want = np.zeros(keep.shape[2:], bool)
            for t in range(n):
                for s in [*vertical, *(t - slash), 0, t]:
                    if 0 <= s <= t:
                        want[t // BLOCK, s // BLOCK] = True
            for i in range(-(-n // BLOCK)):  # a column's block is read by every later query block
                want[i, [s // BLOCK for s in vertical if s // BLOCK <= i]] = True
            np.testing.assert_array_equal(keep[b, h], want)


def test_diagonal_sums_do_not_depend_on_how_they_are_found():
    obs = case(10)
    fast = np.asarray(Blocks(obs, BLOCK, 5, True).distance_mass)
    slow = np.asarray(Blocks(obs, BLOCK, 5, False).distance_mass)
    np.testing.assert_allclose(fast, slow, atol=1e-6)
    np.testing.assert_allclose(fast.sum(-1), 5.0, rtol=1e-5)


def test_minference_takes_the_cheapest_pattern_that_recalls_enough():
    obs, pattern = case(11, scale=6.0), PATTERNS["minference"]
    x = Blocks(obs, BLOCK, pattern.sample, True)
    keep = mask_of(pattern, obs)
    shape = AShape(sink=1, window=3, block=BLOCK)
    lines = VerticalSlash(vertical=2, slash=3, first=1, nearest=1, block=BLOCK, sample=5, min_recall=0)
    sparse = dataclasses.replace(pattern, vertical=0, slash=0, first=0, nearest=0, window=0, min_recall=0.999)
    options = [mask_of(shape, obs), mask_of(lines, obs)]
    recall = [np.asarray(x.recall(jnp.asarray(o))) for o in options]
    chosen = set()
    for b, h in np.ndindex(2, Q_HEADS):
        fits = [i for i in range(2) if recall[i][b, h] >= 0.6]
        cost = keep[b, h].sum()
        if fits:
            assert cost <= min(options[i][b, h].sum() for i in fits)
        chosen.add(next((i for i in range(2) if (options[i][b, h] == keep[b, h]).all()), 2))
    assert len(chosen) > 1
    assert (np.asarray(x.recall(jnp.asarray(keep))) >= 0.6).all()
    assert (mask_of(sparse, obs).sum((2, 3)) >= keep.sum((2, 3))).all()


@pytest.mark.slow
def test_flexprefill_chooses_by_divergence():
    p = np.asarray([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    q = np.asarray([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        np.asarray(divergence(jnp.asarray(p), jnp.asarray(q))), [0.0, np.log(2) ** 0.5], atol=1e-6
    )
    obs = case(12)
    aware = dataclasses.replace(PATTERNS["flexprefill"], tau=9.0, min_budget=0)
    keep = mask_of(aware, obs)
    # The query-aware map: softmax of pooled products per row, cut where its largest entries hold gamma.
    b, h, n = 0, 1, LENGTHS[0]
    q, k = np.asarray(obs.q, np.float64)[b, h], np.asarray(obs.k, np.float64)[b, 0]
    cut = [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
    rows = np.stack([q[c].mean(0) for c in cut]) @ np.stack([k[c].mean(0) for c in cut]).T * obs.scale
    rows = np.where(np.tril(np.ones(rows.shape, bool)), np.exp(rows), 0)
    rows /= rows.sum(1, keepdims=True)
    order = np.argsort(-rows.ravel())
    count = np.searchsorted(np.cumsum(rows.ravel()[order]), 0.6 * rows.sum()) + 1
    want = np.zeros(rows.size, bool)
    want[order[:count]] = True
    missing = want.reshape(rows.shape) & ~keep[b, h]
    assert not missing.any()
    more = {g: mask_of(dataclasses.replace(aware, gamma=g), obs).sum() for g in (0.3, 0.6, 0.9)}
    assert more[0.3] < more[0.6] < more[0.9]
    lines = mask_of(dataclasses.replace(PATTERNS["flexprefill"], tau=0.0), obs)
    assert (lines != keep).any()


def test_largest_and_covering_against_sorting():
    rng = np.random.default_rng(0)
    x = rng.random((5, 40)).astype(np.float32)
    x[0, :7] = 0.5
    for count in (1, 3, 39, 40):
        got = np.asarray(largest(jnp.asarray(x), count))
        edge = np.sort(x, axis=1)[:, -count][:, None]
        np.testing.assert_array_equal(got, x >= edge)
    assert not np.asarray(largest(jnp.asarray(x), 0)).any()
    for share in (0.1, 0.5, 0.99):
        got = np.asarray(covering(jnp.asarray(x), share * jnp.sum(jnp.asarray(x), -1)))
        for row, keep in zip(x.astype(np.float64), got):
            order = np.sort(row)[::-1]
            count = np.searchsorted(np.cumsum(order), share * row.sum() - 1e-6) + 1
            np.testing.assert_array_equal(keep, row >= order[count - 1])


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
    with pytest.raises(ValueError, match="window cannot be negative"):
        P.parse("a_shape(window=-1)")
    with pytest.raises(ValueError, match="1 layers and"):
        Plan(P.parse("duo_prefill(heads=((0.5, 0.1, 0.3),), sparsity=0.5)"), LM.shape, 1, PROMPT, 0)
