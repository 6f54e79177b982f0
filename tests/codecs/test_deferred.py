"""Residual windows, flushes and layouts, over every codec that defers encoding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import attend, compress
from kvjax.arrays import nbytes
from kvjax.cache import deferred, ops
from kvjax.policies import parse
from tests.codecs.harness import Layer, oracle

SPECS = [
    "kivi(bits=4, group=32, residual=64)",
    "kivi(bits=2, group=32, residual=128, sink=3)",
    "kivi(bits=4, group=64, residual=64, sink=4, hadamard=True)",
]


def encoded_fields(plan, cache):
    """The layer's dense fields, cut to what is filled (rows of one length)."""
    view = ops.view(plan, cache, 0)
    fields = plan.layers[0].policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)
    fill = int(cache.layers[0].fill[0, 0])
    out = {}
    for name, x in view.store.items():
        axis, per = 2 + len(fields[name].before), fields[name].per
        out[name] = np.asarray(jax.lax.slice_in_dim(x, 0, fill // per, axis=axis))
    return out


@pytest.mark.parametrize("spec", SPECS)
def test_filled_by_decode_by_chunks_or_by_prefill_is_the_same(spec):
    layer = Layer(spec, 200, (200, 200))
    plan = layer.plan(200, 8)
    caches = [layer.fill(plan, 200)[1], layer.fill(plan, 168)[1], layer.fill(plan, 200, chunk=50)[1]]
    codec = plan.layers[0].policy.codec
    expected = 0
    while 200 - expected > codec.sink + codec.residual:
        expected += codec.group
    for cache in caches:
        assert np.all(np.asarray(cache.layers[0].fill) == expected)
        assert np.all(np.asarray(cache.layers[0].residual.count) == 200 - expected)
    first = encoded_fields(plan, caches[0])
    assert expected and first
    for cache in caches[1:]:
        other = encoded_fields(plan, cache)
        for name, x in first.items():
            np.testing.assert_array_equal(other[name], x, err_msg=name)
        count = 200 - expected
        for name in ("k", "v"):
            a, b = (np.asarray(getattr(c.layers[0].residual, name))[:, :, :count] for c in (caches[0], cache))
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec", SPECS)
def test_decode_is_attention_over_what_is_stored(spec):
    layer = Layer(spec, 200, (200, 143), q_heads=6)
    plan = layer.plan(192, 32)
    out, cache = layer.fill(plan, 192)
    k, v, pos = layer.stored(plan, cache)
    for row, n in enumerate(layer.lengths):
        for head in range(2):
            kept = np.sort(pos[row, head][pos[row, head] >= 0])
            np.testing.assert_array_equal(kept, np.arange(n))  # every token once
            # The window and the sinks are exact.
            res = cache.layers[0].residual
            where = np.asarray(ops_positions(plan, cache))[row, head]
            for i in range(int(res.count[row, head])):
                np.testing.assert_array_equal(
                    np.asarray(res.k)[row, head, i], np.asarray(layer.k)[row, head, where[i]]
                )
    want = oracle(layer.q[:, :, 199], k, v, pos, layer.dim**-0.5)
    np.testing.assert_allclose(np.asarray(out)[0, :, 0], want[0], atol=2e-4)


def ops_positions(plan, cache):
    return deferred.positions(plan, cache, 0)[1]


@pytest.mark.parametrize("spec", SPECS[:2])
def test_ragged_equals_dense(spec):
    dense = Layer(f"snapkv(budget=0.9, window=8) | {spec}", 270, (270, 200))
    ragged = Layer(f"adakv(budget=0.9, scorer=snapkv(window=8), alpha=1.0) | {spec}", 270, (270, 200))
    outs = []
    for layer in (dense, ragged):
        plan = layer.plan(256, 24)
        out, cache = layer.fill(plan, 256)
        outs.append(np.asarray(out)[:, :, 0])
        k, v, pos = layer.stored(plan, cache)
        assert (pos[0, 0] >= 0).sum() == 230 + 14  # int(256 * 0.9) kept, then appended
        np.testing.assert_allclose(
            outs[-1][0], oracle(layer.q[:, :, 269], k, v, pos, layer.dim**-0.5)[0], atol=2e-4
        )
    np.testing.assert_allclose(outs[0][0], outs[1][0], atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dim", [64, 128])
def test_bits_are_the_allocated_bytes(spec, dim):
    layer = Layer(spec, 8, (8, 8), dim=dim)
    plan = layer.plan(1280, 0)
    cache = ops.empty(plan)
    lp = plan.layers[0]
    elements = 2 * 2 * 2 * lp.capacity * dim  # k and v, rows, heads, slots, channels
    assert sum(x.nbytes for x in jax.tree.leaves(cache.pools[0])) * 8 == pytest.approx(
        lp.policy.codec.bits_per_element(dim, "float32") * elements
    )
    assert plan.nbytes() == sum(x.nbytes for x in jax.tree.leaves(cache)) == nbytes(cache)


def test_flushes_at_positions_up_to_128k():
    """Row positions start near the end of a 128k context; what is stored and when does not depend on them."""
    layer = Layer("snapkv(budget=400, window=8) | kivi(bits=4, group=32, residual=64)", 140, (140,))
    first = 131072 - 140
    plan = layer.plan(100, 40)
    out, cache = layer.fill(plan, 100, first=first)
    k, v, pos = layer.stored(plan, cache)
    np.testing.assert_array_equal(np.sort(pos[0, 0][pos[0, 0] >= 0]), np.arange(first, 131072))
    assert int(cache.layers[0].fill[0, 0]) == 128
    np.testing.assert_allclose(
        np.asarray(out)[:, :, 0], oracle(layer.q[:, :, -1], k, v, pos, layer.dim**-0.5), atol=2e-4
    )


@pytest.mark.parametrize("group", [1, 32, 128])
@pytest.mark.parametrize("entries", [0, 1, 127, 128, 129, 4096, 131071, 131072])
def test_encoded_count_counts_one_flush_at_a_time(group, entries):
    from kvjax.codecs.kivi import Kivi

    class Some(Kivi):
        group = 1

    Some.group = group
    codec = Some(4, 32, 128, 4)
    held = encoded = 0
    window = max(entries - 4, 0)
    encoded = 0 if window <= 128 else -(-(window - 128) // group) * group
    assert codec.encoded(entries) == encoded
    assert int(codec.encoded(jnp.int32(entries))) == encoded
    assert held <= 128 and 0 <= window - encoded <= 128


@pytest.mark.parametrize(
    "spec, match",
    [
        ("kivi(bits=3)", "bits must be 2 or 4"),
        ("kivi(bits=2, residual=64)", "128 tokens are encoded at once"),
        ("h2o(budget=0.5) | kivi", "cannot be evicted one by one"),
        ("kivi(group=48, residual=192)", "not whole groups of 48"),
    ],
)
def test_bad_input_is_named(spec, match):
    with pytest.raises(ValueError, match=match):
        Layer(spec, 8, (8,)).plan(8, 8)


def test_a_second_chunk_cannot_evict_what_is_encoded():
    layer = Layer("snapkv(budget=0.5, window=8) | kivi", 64, (64,))
    with pytest.raises(ValueError, match="prefill the whole prompt at once"):
        layer.fill(layer.plan(64, 8), 64, chunk=32)


def test_constant_keys_and_values_decode_to_themselves():
    policy = parse("kivi(bits=2, group=32, residual=128)")
    x = jnp.full((1, 2, 128, 64), 0.75)
    store = policy.codec.encode(x, -x)
    k, v = policy.codec.decode(store, "float32")
    np.testing.assert_array_equal(k, x)
    np.testing.assert_array_equal(v, -x)


@pytest.mark.parametrize(
    "spec", ["kivi(bits=4, group=32, residual=96, sink=3)", "turboquant(bits=3, residual=8)"]
)
def test_layers_that_flush_under_one_branch_store_what_each_stores_alone(spec):
    """Two layers, ragged rows: the second layer's window is flushed when the first one appends."""
    alone = [Layer(spec, 150, (150, 131), seed=s) for s in (0, 1)]
    wanted = [layer.fill(layer.plan(64, 96), 64)[1] for layer in alone]
    one = alone[0].plan(64, 96)
    plan = dataclasses.replace(one, shape=dataclasses.replace(one.shape, layers=2, windows=(None, None)))
    until, cache = np.asarray(alone[0].lengths), ops.empty(plan)

    @functools.partial(jax.jit, static_argnames="fresh")
    def call(both, cache, fresh):
        fn = attend.prefill(plan, fresh=True) if fresh else attend.decode(plan)
        for i, x in enumerate(both):
            _, cache = fn(dataclasses.replace(x, layer=i), cache)
        return compress.finish(plan, cache, both[0].positions)

    for at, end in [(0, 64), *((t, t + 1) for t in range(64, 150))]:
        cache = call([layer.inputs(at, end, until) for layer in alone], cache, fresh=at == 0)
    for i, want in enumerate(wanted):
        got = cache.layers[i]
        np.testing.assert_array_equal(got.fill, want.layers[0].fill)
        np.testing.assert_array_equal(got.residual.count, want.layers[0].residual.count)
        assert got.residual.pos is None
        for row in range(2):
            n, width = int(got.fill[row, 0]), int(got.residual.count[row, 0])
            for name in ("k", "v"):
                a, b = (getattr(x.residual, name)[row, :, :width] for x in (got, want.layers[0]))
                np.testing.assert_array_equal(a, b)
            fields = plan.layers[0].policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)
            for name, field in fields.items():
                a, b = (c.store[name][row] for c in (cache.pools[i], want.pools[0]))
                cut = (slice(None),) * (1 + len(field.before)) + (slice(0, n // field.per),)
                np.testing.assert_array_equal(a[cut], b[cut], err_msg=name)
        assert int(got.fill[0, 0]) > int(codec_encoded(plan, 64))  # it did flush while decoding


def codec_encoded(plan, entries):
    return plan.layers[0].policy.codec.encoded(entries)


def test_a_branch_and_a_loop_flush_the_same(monkeypatch):
    """GPUs take the branch, other platforms the loop."""
    layer, caches = Layer(SPECS[0], 150, (150, 120)), []
    plan = layer.plan(150, 8)
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(deferred, "target_platform", lambda platform=platform: platform)
        jax.clear_caches()
        caches.append(layer.fill(plan, 80)[1])
    assert np.all(np.asarray(caches[0].layers[0].fill) >= 64)
    for a, b in zip(*map(jax.tree.leaves, caches)):
        np.testing.assert_array_equal(a, b)
