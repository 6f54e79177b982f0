"""Chunked prefill of evicting policies with codecs of groups: every entry is encoded once, when the prompt ends."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import deferred, ops
from kvjax.generation.generator import Generator
from kvjax.policies import parse
from tests.toy import VOCAB, Toy

LM = Toy()
INV = 10000.0 ** (-jnp.arange(4) / 4)
CODEC = "kivi(bits=4, group=8, residual=64, sink=2)"
LENGTHS = (200, 143)


@functools.cache
def params():
    return LM.init()


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).tolist() for n in LENGTHS]


def filled(spec, chunk=48):
    return Generator(LM, params(), parse(spec), chunk=chunk).prefill(prompts(), 8)


@pytest.mark.parametrize(
    ("policy", "codec"),
    [
        ("keydiff(budget=0.6)", CODEC),
        ("keydiff(budget=0.6) | adakv", CODEC),
        ("keydiff(budget=0.6) | cake", CODEC),
        ("keydiff(budget=0.6)", "turboquant(bits=4, residual=8, sink=2)"),
        ("keydiff(budget=0.6)", "rotatekv(bits=4, group=8, residual=8, sink=2)"),
    ],
)
def test_what_the_chunks_kept_is_encoded_once(policy, codec):
    """Against the same chunks without a codec, whose entries are encoded here, in time order, directly."""
    plain, got = filled(policy), filled(f"{policy} | {codec}")
    np.testing.assert_array_equal(plain.logits, got.logits)
    for i in range(LM.layers):
        want, part = ops.view(plain.plan, plain.cache, i), got.plan.layers[i].policy.codec
        k, v, pos = deferred.decoded(got.plan, got.cache, i, INV)
        for row in range(2):
            for head in range(LM.kv_heads):
                at = np.asarray(want.pos[row, head])
                at = at[at >= 0]
                if row == 0:
                    assert len(at) > part.sink + part.residual  # something is encoded
                assert list(at) == sorted(at)
                mine = np.asarray(pos[row, head])
                order = np.argsort(np.where(mine >= 0, mine, 1 << 30))[: len(at)]
                np.testing.assert_array_equal(mine[order], at)
                whole = [np.array(want.store[n][row, head, : len(at)]) for n in ("k", "v")]
                count = int(part.encoded(len(at)))
                chosen = slice(part.sink, part.sink + count)
                if count:
                    ctx = ops.context(got.plan, i, jnp.asarray(at[chosen])[None, None], INV)
                    lead = [
                        jnp.broadcast_to(x[None, None, chosen], (1, LM.kv_heads, count, LM.head_dim))
                        for x in whole
                    ]
                    rounded = part.decode(part.encode(*lead, ctx), "float32", ctx)
                    for x, y in zip(whole, rounded):
                        x[chosen] = np.asarray(y[0, head])
                for x, y in zip(whole, (k, v)):
                    np.testing.assert_allclose(np.asarray(y)[row, head][order], x, atol=2e-5)


def test_where_chunks_do_not_matter_the_cache_is_that_of_the_whole_prompt():
    spec = f"streaming_llm(budget=0.6, sink=2, evict_decode=False) | {CODEC}"
    chunked, whole = filled(spec), filled(spec, chunk=None)
    for i in range(LM.layers):
        # Later layers saw inputs without what the first chunks evicted; positions agree, bits of the first layer do.
        for a, b in zip(
            deferred.positions(chunked.plan, chunked.cache, i), deferred.positions(whole.plan, whole.cache, i)
        ):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(chunked.cache.layers[i].limit, whole.cache.layers[i].limit)
    store = [c.cache.pools[0].store for c in (chunked, whole)]
    fill = int(whole.cache.layers[0].fill[0, 0])
    assert fill == 64
    np.testing.assert_allclose(
        store[0]["k_scale"][0, :, : fill // 8], store[1]["k_scale"][0, :, : fill // 8], rtol=2e-3
    )
    assert chunked.cache_bytes == whole.cache_bytes
    out = chunked.decode([4, 4])
    assert [len(o.tokens) for o in out] == [4, 4]
    assert np.all(np.asarray(chunked.cache.length) >= np.asarray(LENGTHS) + 3)


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv(budget=0.6, window=8) | zipcache(segment=10, residual=10)",
        f"keydiff(budget=0.6) | quest(read=0.5) | {CODEC}",
    ],
)
def test_what_needs_more_than_the_entries_is_refused(spec):
    with pytest.raises(ValueError, match="whole prompt at once"):
        filled(spec)


def test_a_codecs_exact_entries_are_not_those_that_eviction_protects():
    policy = parse("keydiff(budget=0.5, sink=3) | kivi(bits=4, sink=2)")
    assert (policy.sink, policy.codec.sink) == (3, 2)
    with pytest.raises(ValueError, match="exclude each other"):
        parse("keydiff(budget=0.5, sink=3) | streaming_llm(budget=0.5, sink=2)")
