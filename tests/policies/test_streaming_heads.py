"""Streaming heads beside a selector: shares, bytes, the entries that are read, and what else they compose with."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import kvjax.policies as P
from kvjax import arrays, attend
from kvjax.attend import decode
from kvjax.cache import selecting, traffic
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.generation.generator import Generator
from kvjax.policies.selectors.head_reads import HeadReads
from tests.policies.test_selectors import LENGTHS, PROMPT, RESERVE, chosen_slots, query
from tests.toy import Toy, ragged, steps

LM = Toy()
MIXED = ((0.1, 0.4), (0.2, 0.3))  # two of four stream: one in each layer
WHOLE = ((0.1, 0.2), (0.3, 0.4))  # all of layer 0, none of layer 1
STEPS = np.random.default_rng(7).integers(0, 64, (3, 5))


def plan_of(spec, heads=MIXED, streaming=2, window=0.25, sink=2, beta=1.0):
    part = P.head_reads(heads=heads, beta=beta, streaming=streaming, window=window, sink=sink)
    return Plan(P.parse(spec) | part, LM.shape, 3, PROMPT, RESERVE)


def fill(plan):
    tokens, positions = ragged(LENGTHS, PROMPT)
    return engine.prefill(LM, plan, LM.init(), tokens, positions)[1]


def streams(n, window=0.25, sink=2, block=1):
    """Slots of [0, n) that a streaming head reads: the blocks of the sinks, and the newest blocks."""
    count = max(n * int(window * 1024) // 1024, sink + 1) - sink
    end, sinks = -(-n // block), -(-sink // block)
    blocks = {*range(sinks), *range(max(sinks, end - -(-count // block)), end)}
    return [s for s in range(n) if s // block in blocks]


def test_shares_by_hand():
    """4 heads, read 0.5: two stream a quarter each, 1.5 of a head is left to the others."""
    part = HeadReads(MIXED, 1.0, "", 2, 0.25)
    np.testing.assert_allclose(
        part.shares(0.5) / 1024, [[0.25, 0.75 + 0.75 / 7], [0.25, 0.75 - 0.75 / 7]], atol=1e-3
    )
    half = HeadReads(MIXED, 2.0, "", 0.5, 0.25).shares(0.5) / 1024  # half of it equally
    np.testing.assert_allclose(half, [[0.25, 0.375 + 3 / 7], [0.25, 0.375 + 2.25 / 7]], atol=1e-3)
    full = HeadReads(((9.0, 0.0), (1.0, 0.0)), 1.0, "", 2, 0.25).shares(0.7) / 1024  # what exceeds 1 goes on
    np.testing.assert_allclose(full, [[1.0, 0.25], [1.0, 0.25]], atol=1e-3)
    assert [part.retrieving(i) for i in (0, 1)] == [(1,), (1,)]
    assert [HeadReads(WHOLE, streaming=2).retrieving(i) for i in (0, 1)] == [(), (0, 1)]


def test_shares_never_exceed_what_may_be_read():
    rng = np.random.default_rng(0)
    for streaming, beta, read in itertools.product((0, 3, 7), (1.0, 1.5, 4.0), (0.02, 0.1, 0.6, 1.0)):
        scores = tuple(map(tuple, rng.random((4, 2)) ** 4))
        shares = HeadReads(scores, beta, "", streaming, 0.01).shares(read) / 1024
        assert shares.mean() <= read + 1e-9
        assert shares.max() <= 1.0
        assert (shares == 10 / 1024).sum() >= streaming


def test_layers_that_stream_hold_no_index():
    """quest: page bounds of 2 * 8 float32 a page; a layer of one retrieval head holds half of them."""
    alone = Plan(P.parse("quest(read=0.5, page=4, skip_layers=0)"), LM.shape, 3, PROMPT, RESERVE)
    pages, reads = 48 // 4 * 2 * 8 * 4, 3 * 2 * 4
    assert arrays.nbytes(alone.index_specs(0)) == 3 * 2 * pages + reads
    mixed = plan_of("quest(read=0.5, page=4, skip_layers=0)")
    assert [arrays.nbytes(mixed.index_specs(i)) for i in (0, 1)] == [3 * pages + reads] * 2
    whole = plan_of("quest(read=0.5, page=4, skip_layers=0)", WHOLE)
    assert [arrays.nbytes(whole.index_specs(i)) for i in (0, 1)] == [0, 3 * 2 * pages + reads]
    assert alone.nbytes() - whole.nbytes() == 3 * 2 * pages + reads
    cache = fill(whole)
    assert not cache.layers[0].index
    assert arrays.nbytes(cache) == whole.nbytes()


EXACT, QUEST = "exact_topk(read=0.5)", "quest(read=0.5, page=4, skip_layers=0)"
CODES = "pqcache(read=0.5, parts=2, bits=4, recent=1, sink=0)"


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        (QUEST, MIXED),
        (EXACT, WHOLE),
        (CODES.replace(")", ", page=4)"), MIXED),
        pytest.param(EXACT, MIXED, marks=pytest.mark.slow),
        pytest.param(QUEST, WHOLE, marks=pytest.mark.slow),
        pytest.param(CODES, MIXED, marks=pytest.mark.slow),
        pytest.param(CODES, WHOLE, marks=pytest.mark.slow),
    ],
)
def test_attention_is_that_of_the_named_entries(spec, heads):
    """float64 attention over each head's set: sinks and the newest, or as many blocks as the head's share names."""
    plan = plan_of(spec, heads)
    cache, block, reads = fill(plan), plan.block(0), plan.policy.head_reads
    for layer in range(LM.layers):
        x = query(cache, layer)
        slots, after = chosen_slots(plan, cache, x)
        out, _ = decode(plan)(x, cache)
        entries = selecting.stored_entries(plan, after, layer, None)
        k, v, q = (np.asarray(a, np.float64) for a in (entries.k, entries.v, x.q[:, :, 0]))
        for (b, h), got in slots.items():
            n = LENGTHS[b] + 1
            if h in reads.retrieving(layer):
                most = -(-max(1, n * int(reads.shares(0.5)[layer, h]) // 1024) // block) * block
                assert most - block < len(got) <= most
            else:
                assert got == streams(n, block=block)
            for g in (2 * h, 2 * h + 1):
                logits = k[b, h, got] @ q[b, g] * x.scale
                w = np.exp(logits - logits.max())
                np.testing.assert_allclose(out[b, g, 0], w @ v[b, h, got] / w.sum(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("spec", "scan", "heads"), [(EXACT, 32, MIXED), (CODES, 1, WHOLE)])
def test_read_fraction_by_hand(spec, scan, heads):
    """Entries of every head; the keys (32 bytes) or codes (1 byte, and a share of the books) that retrieval heads scan."""
    plan = plan_of(spec, heads)
    reads = plan.policy.head_reads
    before = fill(plan)
    _, after = steps(LM, plan, LM.init(), before, STEPS[:, :1])
    for cache, more in ((before, 0), (after, 1)):  # before the first step: what is planned
        want = 0.0
        lengths = [n + more for n in LENGTHS]
        for layer, h, n in itertools.product(range(2), range(2), lengths):
            if h in reads.retrieving(layer):
                want += max(1, n * int(reads.shares(0.5)[layer, h]) // 1024) * 64 + n * scan
                if spec == CODES:  # 2 * 16 words of 4 floats, and a count, for the filled part of 48 slots
                    want += (2 * 16 * 4 * 4 + 4) * sum(lengths) / (3 * 48)
            else:
                want += len(streams(n)) * 64
        np.testing.assert_allclose(traffic.read_bytes(plan, cache), want, rtol=1e-6)
        full = 2 * 2 * 64 * sum(lengths)
        np.testing.assert_allclose(traffic.read_fraction(plan, cache), want / full, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "heads"),
    [("kivi(bits=4, group=8, residual=64)", MIXED), pytest.param("int8", WHOLE, marks=pytest.mark.slow)],
)
def test_reading_everything_is_the_codec_alone(spec, heads):
    """150 tokens, so that the codec has encoded some of them."""
    part = P.head_reads(heads=heads, streaming=2, window=1.0, beta=1.0)
    logits = []
    for p in (P.parse(spec), P.parse(f"{spec} | quest(read=1.0, page=8, skip_layers=0)") | part):
        plan = Plan(p, LM.shape, 2, 160, RESERVE)
        _, cache = engine.prefill(LM, plan, LM.init(), *ragged((150, 9), 160))
        logits.append(steps(LM, plan, LM.init(), cache, STEPS[:2])[0])
    np.testing.assert_allclose(logits[1], logits[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("heads", [MIXED, pytest.param(WHOLE, marks=pytest.mark.slow)])
def test_offload_changes_nothing(heads):
    plan = plan_of("exact_topk(read=0.5, recent=4)", heads)
    far = Plan(plan.policy | P.parse("offload"), LM.shape, 3, PROMPT, RESERVE)
    want, _ = steps(LM, plan, LM.init(), fill(plan), STEPS)
    got, after = steps(LM, far, LM.init(), fill(far), STEPS)
    assert far.host_nbytes() > 0
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert 0 < traffic.moved_bytes(far, after) < traffic.read_bytes(far, after)


def test_chunks_change_nothing_and_nothing_compiles_again():
    p = plan_of(EXACT).policy
    tokens, _ = ragged(LENGTHS, PROMPT)
    prompts = [row[:n].tolist() for row, n in zip(tokens, LENGTHS)]
    answers, compiled = [], []
    for chunk, cut in ((None, 0), (None, 3), (16, 0)):
        out, _ = Generator(LM, LM.init(), p, chunk=chunk).generate([x[cut:] for x in prompts], 6)
        compiled.append(engine.decode._cache_size())
        answers.append([o.tokens for o in out])
    assert answers[0] == answers[2] != answers[1]
    assert compiled[0] == compiled[1] == compiled[2]


def test_kept_choices_are_of_retrieval_heads():
    """LouisKV reads the choice of an earlier step again; streaming heads move on with every token."""
    plan = plan_of("louiskv(read=0.5, trigger=-2.0, per=4, segments=2, sink=0, recent=1)")
    width = plan.index_specs(0)["chosen"].shape
    assert width[:2] == (3, 1)
    cache = fill(plan)
    kept = None
    for more in (1, 2):
        x = query(cache, 0, seed=more)
        cache = cache.replace(hidden=x.hidden)
        appended = attend._append(plan, cache, x)
        table, cache = selecting.choose(plan, appended, x)
        for b, n in enumerate(LENGTHS):
            assert sorted(np.asarray(table)[b, 0][np.asarray(table)[b, 0] >= 0]) == streams(n + more)
        for named in np.asarray(table).reshape(-1, table.shape[2]):
            used = (named >= 0).sum()
            assert (np.diff(named[:used]) > 0).all() and (named[used:] == -1).all()
        chosen = np.asarray(cache.layers[0].index["chosen"])
        assert kept is None or np.array_equal(chosen, kept)
        kept = chosen


@pytest.mark.slow
def test_what_is_summarised_is_of_retrieval_heads():
    """`tail` adds what retrieval heads do not read; streaming heads are as without it."""
    plain, tail = (plan_of(CODES.replace(")", f", tail={x})")) for x in (False, True))
    cache = fill(plain)
    x = query(cache, 0)
    outs = [np.asarray(jax.jit(decode(p))(x, c)[0]) for p, c in ((plain, cache), (tail, fill(tail)))]
    np.testing.assert_allclose(outs[0][:, :2], outs[1][:, :2], rtol=1e-5, atol=1e-6)
    assert np.abs(outs[0][:, 2:] - outs[1][:, 2:]).max() > 1e-4


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("exact_topk(read=0.1)", dict(window=0.3), "is below what 2 of 4 heads stream"),
        ("exact_topk(read=0.5)", dict(streaming=4), "leaves none of 4 heads"),
        ("exact_topk(read=0.5)", dict(streaming=1.0), r"streaming must be a fraction in \[0, 1\)"),
        ("exact_topk(read=0.5)", dict(streaming=-1), "streaming must be a fraction"),
        ("exact_topk(read=0.5)", dict(window=0.0), "window must be a fraction"),
        ("exact_topk(read=8)", {}, "fraction"),
        ("shadowkv(read=0.5)", {}, "rebuilds the keys of all heads together"),
        ("icecache(read=0.5)", {}, "moves entries"),
    ],
)
def test_errors_name_what_is_wrong(spec, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan_of(spec, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_missing_calibration_is_named():
    with pytest.raises(ValueError, match=r"launch\.calibrate"):
        P.parse("exact_topk(read=0.5) | head_reads(heads='nowhere.safetensors', streaming=0.5)")
