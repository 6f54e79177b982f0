"""The loops: rows are independent, shapes are bucketed, sampling reproduces, the cache equals recomputation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.generation.buckets import bucket
from kvjax.generation.generator import Generator
from kvjax.generation.sampling import Sampling, batch_sampling, filter_logits
from tests.toy import VOCAB, Toy, ragged, steps

LM = Toy()
PARAMS = LM.init()


def prompts(lengths, seed=0):
    tokens, _ = ragged(lengths, max(lengths), seed)
    return [tokens[i, :n].tolist() for i, n in enumerate(lengths)]


def generator(spec="full", lm=LM, **kwargs):
    return Generator(lm, lm.init(), P.parse(spec), **kwargs)


def tokens_of(outputs):
    return [o.tokens for o in outputs]


EIGHT = (40, 3, 17, 64, 1, 33, 25, 50)


@pytest.mark.parametrize("spec", ["full", "streaming_llm(budget=12, sink=2)", "adakv(keydiff, budget=0.5)"])
def test_eight_ragged_rows_give_each_rows_own_tokens(spec):
    rows = prompts(EIGHT)
    together, _ = generator(spec).generate(rows, 12)
    for row, want in zip(rows, together):
        alone, _ = generator(spec).generate([row], 12)
        assert alone[0].tokens == want.tokens
        assert alone[0].prompt_tokens == len(row)


@pytest.mark.parametrize("window", [None, 8])
def test_decode_equals_recomputing_the_whole_sequence(window):
    """Greedy tokens from the cache equal the argmax of a fresh prefill of prompt + tokens so far."""
    lm = Toy(window=window)
    row = prompts((21,))[0]
    out, session = generator(lm=lm).generate([row], 9)
    so_far = list(row)
    for token in out[0].tokens:
        plan = Plan(P.parse("full"), lm.shape, 1, 64, 0)
        padded, positions = np.zeros((1, 64), np.int32), np.full((1, 64), -1, np.int32)
        padded[0, : len(so_far)], positions[0, : len(so_far)] = so_far, np.arange(len(so_far))
        logits, _ = engine.prefill(lm, plan, lm.init(), padded, positions)
        assert int(jnp.argmax(logits[0])) == token
        so_far.append(token)
    if window:
        capacities = [p.pos.shape[2] for p in session.cache.pools]
        assert capacities == [128, window], "a sliding layer stores its window and nothing more"


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("chunk", [7, 16])
def test_chunked_prefill_equals_whole(chunk, window):
    lm = Toy(window=window)
    rows = prompts((40, 3, 17))
    whole, _ = generator(lm=lm).generate(rows, 8)
    chunked, _ = generator(lm=lm, chunk=chunk).generate(rows, 8)
    assert tokens_of(chunked) == tokens_of(whole)


@pytest.mark.parametrize("spec", ["full", "int8", "snapkv(budget=0.5, window=4)", "adakv(keydiff)"])
def test_extend_continues_the_sequence(spec):
    """Context, then question: the question's entries are appended at their true positions, uncompressed."""
    rows = prompts((30, 22))
    g = generator(spec)
    session = g.prefill([r[:-6] for r in rows], reserve=24)
    before = [int(x) for x in np.asarray(session.cache.layers[0].fill).sum(axis=1)]
    session.extend([rows[0][-6:], rows[1][-6:]])
    after = [int(x) for x in np.asarray(session.cache.layers[0].fill).sum(axis=1)]
    assert [a - b for a, b in zip(after, before)] == [12, 12]
    assert np.asarray(session.cache.length).tolist() == [30, 22]
    got = session.decode([5, 5])
    if spec == "full":
        whole, _ = g.generate(rows, 5)
        assert tokens_of(got) == tokens_of(whole)
    newest = np.asarray(ops.view(session.plan, session.cache, 0).pos).max(axis=(1, 2))
    assert newest.tolist() == [30 + 4 - 1, 22 + 4 - 1]  # the last token is chosen but not stored


def test_stop_tokens_limits_and_streaming_agree():
    rows = prompts((20, 31, 8))
    free, _ = generator().generate(rows, [10, 4, 7])
    assert [len(o.tokens) for o in free] == [10, 4, 7]
    assert {o.finish for o in free} == {"length"}
    stop = free[0].tokens[3]
    first = free[0].tokens.index(stop)
    stopped, _ = generator().generate(rows, [10, 4, 7], stop_tokens=(stop,))
    assert stopped[0].tokens == free[0].tokens[:first] and stopped[0].finish == "stop"
    seen = {0: [], 1: [], 2: []}
    streamed, _ = generator().generate(
        rows, [10, 4, 7], stop_tokens=(stop,), on_tokens=lambda i, new: seen[i].extend(new)
    )
    assert tokens_of(streamed) == tokens_of(stopped)
    assert [seen[i] for i in range(3)] == tokens_of(stopped)


def test_a_stop_condition_on_text_ends_its_row_only():
    rows = prompts((20, 31))
    out, _ = generator().generate(rows, 40, stop=lambda i, row: i == 0 and len(row) >= 5)
    assert out[0].finish == "stop" and 5 <= len(out[0].tokens) < 40
    assert len(out[1].tokens) == 40


def test_sampling_reproduces_and_is_independent_of_the_batch():
    rows = prompts((20, 20))
    hot = Sampling(temperature=60.0, seed=3)
    a, _ = generator().generate(rows, 20, hot)
    b, _ = generator().generate(rows, 20, hot)
    assert tokens_of(a) == tokens_of(b)
    alone, _ = generator().generate(rows[1:], 20, dataclasses.replace(hot, seed=4))
    assert alone[0].tokens == a[1].tokens
    other, _ = generator().generate(rows, 20, dataclasses.replace(hot, seed=50))
    assert tokens_of(other) != tokens_of(a)


@pytest.mark.parametrize("kwargs", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_tight_filters_are_greedy(kwargs):
    rows = prompts((20,))
    greedy, _ = generator().generate(rows, 12)
    sampled, _ = generator().generate(rows, 12, Sampling(temperature=1.0, **kwargs))
    assert tokens_of(sampled) == tokens_of(greedy)


def test_filters_against_a_numpy_loop():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 50)).astype(np.float32) * 3
    rows = [
        Sampling(1.0, top_k=5),
        Sampling(0.7, top_p=0.8),
        Sampling(1.3, min_p=0.1),
        Sampling(1.0, top_k=20, top_p=0.9, min_p=0.02),
    ]
    got = np.asarray(filter_logits(jnp.asarray(logits), batch_sampling(rows)))
    for x, s, y in zip(logits.astype(np.float64), rows, got):
        x = x / s.temperature
        order = np.argsort(-x)
        keep = order[: s.top_k] if s.top_k else order
        p = np.exp(x[keep] - x[keep].max())
        p /= p.sum()
        before = np.cumsum(p) - p
        keep = keep[(before < s.top_p) & (p >= s.min_p * p[0])]
        assert set(np.flatnonzero(np.isfinite(y))) == set(keep)
        np.testing.assert_allclose(y[keep], x[keep], rtol=1e-5)


def test_sampled_frequencies_follow_the_softmax():
    from kvjax.generation.sampling import sample

    n, logits = 4000, jnp.asarray([[1.0, 0.0, 2.0, -1.0]])
    settings = batch_sampling([Sampling(temperature=1.0, seed=i) for i in range(n)])
    drawn = np.asarray(sample(jnp.repeat(logits, n, 0), settings, jnp.zeros(n, jnp.int32), None))
    want = np.exp([1.0, 0.0, 2.0, -1.0])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / n, want / want.sum(), atol=0.03)


def test_repetition_penalty_forbids_what_was_seen():
    row = list(range(0, 20))
    out, _ = generator().generate([row], 30, Sampling(repetition_penalty=1e9))
    new = out[0].tokens
    assert len(set(new)) == len(new) == 30 and not set(new) & set(row)


def test_programs_are_shared_within_a_bucket():
    g = generator("snapkv(budget=0.5, window=4)", lm=dataclasses.replace(LM, max_context=4095))
    g.generate(prompts((30, 44)), 5)
    counts = [f._cache_size() for f in (engine.prefill, engine.begin, engine.decode)]
    g.generate(prompts((64, 9), seed=1), 50, stop_tokens=(1, 2))
    g.generate(prompts((20, 21), seed=2), [3, 60], Sampling(seed=9))
    assert [f._cache_size() for f in (engine.prefill, engine.begin, engine.decode)] == counts


def test_the_cache_is_donated():
    g = generator()
    session = g.prefill(prompts((30,)), reserve=40)
    held = session.cache.pools[0].store["k"]
    session.extend([[1, 2, 3]])
    assert held.is_deleted()
    compiled = engine.decode.lower(
        LM,
        session.plan,
        PARAMS,
        engine.begin(session.cache, session.logits, batch_sampling([Sampling()]), np.full(8, -1, np.int32),
                     np.asarray([4], np.int32), None, room=64),
        batch_sampling([Sampling()]),
        np.full(8, -1, np.int32),
        np.asarray([4], np.int32),
        np.int32(4),
    ).compile()  # fmt: skip
    stored = sum(
        x.nbytes
        for x in jax.tree.leaves(
            session.plan.specs(), is_leaf=lambda s: hasattr(s, "fill") and hasattr(s, "axes")
        )
    )
    assert compiled.memory_analysis().alias_size_in_bytes >= stored


def test_positions_past_32768():
    """A cache whose newest token is at 40,000 attends, masks and evicts like one that starts at 0."""
    p = P.parse("streaming_llm(budget=12, sink=0)")
    plan = Plan(p, LM.shape, 2, 24, 8)
    tokens, positions = ragged((24, 15), 24)
    _near_logits, near = engine.prefill(LM, plan, PARAMS, tokens, positions)
    shift = 40_000
    far_positions = np.where(positions >= 0, positions + shift, -1)
    fn = engine.attend.prefill(plan, fresh=True)
    cache = ops.empty(plan).replace(
        length=jnp.full(2, shift, jnp.int32), next_position=jnp.full(2, shift, jnp.int32)
    )
    _hidden, cache = LM.hidden(PARAMS, jnp.asarray(tokens), jnp.asarray(far_positions), cache, fn)
    far = engine.finish(plan, cache, jnp.asarray(far_positions))
    for layer in range(LM.layers):
        a, b = (np.asarray(ops.view(plan, c, layer).pos) for c in (near, far))
        np.testing.assert_array_equal(np.where(a >= 0, a + shift, -1), b)
    more = np.random.default_rng(0).integers(0, VOCAB, (2, 4))
    want, _ = steps(LM, plan, PARAMS, near, more)
    got, after = steps(LM, plan, PARAMS, far, more)
    np.testing.assert_allclose(
        np.asarray(got), np.asarray(want), rtol=0.02, atol=0.3
    )  # f32 angles at 4e4 rad
    assert np.asarray(after.length).tolist() == [shift + 28, shift + 19]


def test_buckets_waste_at_most_a_quarter():
    assert [bucket(n) for n in (1, 64, 65, 80, 81, 4096, 4097)] == [64, 64, 80, 80, 96, 4096, 5120]
    for n in range(64, 20_000, 97):
        assert n <= bucket(n) <= 1.25 * n


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.generate([[]], 4), "prompt 0 is empty"),
        (lambda g: g.generate([], 4), "no prompt"),
        (lambda g: g.generate([[1] * 101], 4), "101 tokens, the model's context is 100"),
        (lambda g: g.generate([[1] * 98], 4), "at most 2 new tokens"),
        (lambda g: g.generate([[1, 2]], 0), "max_new_tokens must be at least 1"),
        (lambda g: g.generate([[1, 2]], -3), "max_new_tokens must be at least 1"),
        (lambda g: g.generate([[1] * 20], 4), "below the 32 that are always kept|keeps 10 of 20"),
    ],
)
def test_bad_requests_are_refused_in_one_line(call, message):
    lm = Toy(max_context=100)
    g = Generator(lm, PARAMS, P.parse("snapkv(budget=0.5)"))
    with pytest.raises(ValueError, match=message) as e:
        call(g)
    assert "\n" not in str(e.value)


def test_a_cache_that_does_not_fit_says_how_many_bytes():
    with pytest.raises(MemoryError, match=r"the cache needs [\d,]+ bytes .* 1,000 are available"):
        generator(memory_limit=1000).prefill([[1, 2, 3]])
