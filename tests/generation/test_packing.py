"""Packed prompts give what each gives in a row of its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax.policies as P
from kvjax.generation import engine
from kvjax.generation.generator import Generator
from kvjax.generation.packing import first_fit_decreasing, pack, packed_rows
from tests.kernels.prefill.attention_oracle import relative_error
from tests.toy import VOCAB, Toy

LM = Toy()
PARAMS = LM.init()
LENGTHS = (61, 20, 9, 30, 1)
PROMPTS = [np.random.default_rng([1, i]).integers(0, VOCAB, n).tolist() for i, n in enumerate(LENGTHS)]


def generator(spec="full", lm=LM, **kwargs):
    return Generator(lm, PARAMS, P.parse(spec), page_size=4, **kwargs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(50, 70))
def test_every_prompt_lies_in_one_row_once(lengths, width):
    rows = first_fit_decreasing(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= width for row in rows)
    assert len(rows) <= len(lengths) and len(rows) >= -(-sum(lengths) // width)
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > width, "two rows that fit into one are one"
    packed = pack([[i + 1] * n for i, n in enumerate(lengths)], width, start=3)
    assert packed.tokens.shape[0] == packed_rows(lengths, width) >= len(rows)
    for i, n in enumerate(lengths):
        at = packed.index[i]
        assert (at[n:] == -1).all()
        assert (packed.tokens.reshape(-1)[at[:n]] == i + 1).all()
        assert (packed.segments.reshape(-1)[at[:n]] == i).all()
        np.testing.assert_array_equal(packed.positions.reshape(-1)[at[:n]], 3 + np.arange(n))
    assert (packed.positions >= 0).sum() == sum(lengths) == (packed.segments >= 0).sum()


def test_a_prompt_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="70 tokens does not fit into a row of 64"):
        first_fit_decreasing([3, 70], 64)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param("full", marks=pytest.mark.slow),
        "snapkv(budget=8, window=4, kernel=3)",
        pytest.param("h2o(budget=0.9, recent=1)", marks=pytest.mark.slow),
        pytest.param("adakv(snapkv(window=4, kernel=3), budget=8)", marks=pytest.mark.slow),
        pytest.param("kivi(bits=4, group=8, residual=128)", marks=pytest.mark.slow),
    ],
)
def test_packed_equals_unpacked(spec):
    before = engine.prefill_packed._cache_size()
    a, b = generator(spec, packing=True).prefill(PROMPTS, 4), generator(spec).prefill(PROMPTS, 4)
    assert engine.prefill_packed._cache_size() == before + 1, "two rows instead of five"
    assert relative_error(a.logits, b.logits) < 1e-5
    assert a.cache_bytes == b.cache_bytes
    for x, y in zip(a.cache.layers, b.cache.layers):
        np.testing.assert_array_equal(np.asarray(x.fill), np.asarray(y.fill))
    for x, y in zip(a.cache.pools, b.cache.pools):
        if x.pos is not None:
            np.testing.assert_array_equal(np.asarray(x.pos), np.asarray(y.pos))
    assert [o.tokens for o in a.decode([4] * 5)] == [o.tokens for o in b.decode([4] * 5)]


@pytest.mark.slow
def test_order_of_prompts_permutes_the_results():
    order = [3, 1, 4, 0, 2]
    a = generator(packing=True).prefill(PROMPTS)
    b = generator(packing=True).prefill([PROMPTS[i] for i in order])
    assert relative_error(np.asarray(b.logits), np.asarray(a.logits)[order]) < 1e-6


@pytest.mark.slow
def test_sliding_windows_and_a_shared_prefix():
    lm = Toy(window=12)
    prefix = generator(lm=lm).share(PROMPTS[1])
    a = generator(lm=lm, packing=True).prefill(PROMPTS, 2, prefix)
    b = generator(lm=lm).prefill(PROMPTS, 2, prefix)
    assert relative_error(a.logits, b.logits) < 1e-5
    assert [o.tokens for o in a.decode([2] * 5)] == [o.tokens for o in b.decode([2] * 5)]


def test_it_is_used_only_where_rows_are_saved():
    before = engine.prefill_packed._cache_size()
    equal = [PROMPTS[0], PROMPTS[0][:50]]
    a, b = (generator(packing=p).prefill(equal).logits for p in (True, False))
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    sparse = generator("a_shape(sink=2, window=8, block=8)", packing=True).prefill(PROMPTS)
    chunked = generator(packing=True, chunk=16).prefill(PROMPTS)
    assert engine.prefill_packed._cache_size() == before
    assert relative_error(chunked.logits, generator().prefill(PROMPTS).logits) < 1e-5
    assert jnp.isfinite(sparse.logits).all()
