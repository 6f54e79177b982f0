"""Quantized appends and group flushes: a cache built token by token equals one encoded at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats
from pallas_kernels.cache_write import append_residual, append_tokens, flush_residual, flush_size


def tokens(n, dim=64, heads=(2, 2)):
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    return jnp.asarray(rng.normal(size=(2, *heads, n, dim)), jnp.float32)


@pytest.mark.parametrize("fmt", ["dense", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_appended_tokens_equal_those_encoded_at_once(fmt):
    k, v = tokens(6)
    want = formats.encode(k, v, fmt)
    store = jax.tree.map(jnp.zeros_like, want)
    step = jax.jit(append_tokens, donate_argnums=0)
    order = np.random.default_rng(0).permutation(6)
    for t in order:
        slots = jnp.full((2, 2, 1), t, jnp.int32)
        store = step(store, k[:, :, t : t + 1], v[:, :, t : t + 1], slots)
    store = step(store, k[:, :, :1], v[:, :, :1], jnp.full((2, 2, 1), -1, jnp.int32))
    for name in store.slot_fields():
        np.testing.assert_array_equal(
            np.asarray(getattr(store, name), np.float32), np.asarray(getattr(want, name), np.float32)
        )


@pytest.mark.parametrize("fmt,group", [("int4", 32), ("int4", 64), ("int2", 32)])
def test_a_cache_built_by_flushes_equals_one_encoded_at_once(fmt, group):
    """Two rows, one of which starts later: flushes happen at different steps, residuals differ."""
    bits_block = formats.pack_block(fmt)
    size = int(np.lcm(bits_block, group))
    total, late = 2 * size + 5, 7
    k, v = tokens(total, heads=(2, 1))
    want = formats.encode(k[:, :, : 2 * size], v[:, :, : 2 * size], fmt, group=group)
    residual = size + 3
    window = jnp.zeros((2, 1, residual, 64))
    empty = jax.tree.map(jnp.zeros_like, want)
    store = dataclasses.replace(empty, k_res=window, v_res=window, res_lengths=jnp.zeros((2, 1), jnp.int32))
    assert flush_size(store) == size

    @jax.jit
    def run(store, k, v):
        def step(carry, t):
            store, lengths, fed = carry
            active = jnp.array([True, False]) | (t >= late)
            at = jnp.minimum(fed, total - 1)
            one = lambda x: jax.vmap(lambda r, i: jax.lax.dynamic_slice_in_dim(r, i, 1, 1))(x, at)  # noqa: E731
            store = append_residual(store, one(k), one(v), active & (fed < total))
            fed = fed + (active & (fed < total))
            store, lengths = flush_residual(store, lengths)
            return (store, lengths, fed), None

        start = (store, jnp.zeros((2, 1), jnp.int32), jnp.zeros((2,), jnp.int32))
        return jax.lax.scan(step, start, jnp.arange(total + late))[0]

    store, lengths, fed = run(store, k, v)
    np.testing.assert_array_equal(fed, [total, total])
    np.testing.assert_array_equal(lengths, [[2 * size], [2 * size]])
    np.testing.assert_array_equal(store.res_lengths, [[5], [5]])
    np.testing.assert_array_equal(store.k_res[:, :, :5], k[:, :, 2 * size :])
    np.testing.assert_array_equal(store.v_res[:, :, :5], v[:, :, 2 * size :])
    for name in store.slot_fields():
        np.testing.assert_array_equal(
            np.asarray(getattr(store, name), np.float32), np.asarray(getattr(want, name), np.float32)
        )


def test_a_full_cache_keeps_its_window():
    k, v = tokens(64, heads=(1, 1))
    store = formats.encode(k, v, "int4", group=32)
    store = dataclasses.replace(store, k_res=k, v_res=v, res_lengths=jnp.full((1, 1), 64, jnp.int32))
    after, lengths = flush_residual(store, jnp.full((1, 1), 64, jnp.int32))
    assert int(lengths[0, 0]) == 64 and int(after.res_lengths[0, 0]) == 64
    np.testing.assert_array_equal(after.k, store.k)
    full = append_residual(after, k[:, :, :1] + 1, v[:, :, :1])
    np.testing.assert_array_equal(full.k_res, after.k_res)


def test_bad_input():
    k, v = tokens(64, heads=(1, 1))
    slots = jnp.zeros((1, 1, 64), jnp.int32)
    with pytest.raises(ValueError, match="append_tokens: format 'int4' quantizes whole groups"):
        append_tokens(formats.encode(k, v, "int4"), k, v, slots)
    with pytest.raises(ValueError, match="append_residual: the store has no residual window"):
        append_residual(formats.encode(k, v, "int4"), k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match="flush_residual: format 'int8' has no groups"):
        flush_residual(formats.encode(k, v, "int8"), slots[..., 0])
