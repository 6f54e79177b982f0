"""Writes to a cache against numpy loops, and their buffers: a donated cache is updated in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cache_write import append, append_paged, compact, copy_pages


def rng():
    return np.random.default_rng(np.random.SeedSequence().entropy)


@pytest.mark.parametrize("trailing", [(), (16,)], ids=str)
def test_append_drops_what_has_no_slot(trailing):
    r = rng()
    cache = r.normal(size=(2, 3, 8, *trailing)).astype(np.float32)
    new = r.normal(size=(2, 3, 4, *trailing)).astype(np.float32)
    slots = np.stack([r.permutation(12)[:4] for _ in range(6)]).reshape(2, 3, 4).astype(np.int32)
    slots[0, 0, 1] = -1
    have = jax.jit(append, donate_argnums=0)(jnp.asarray(cache), new, slots)
    want = cache.copy()
    for b in range(2):
        for h in range(3):
            for t in range(4):
                if 0 <= slots[b, h, t] < 8:
                    want[b, h, slots[b, h, t]] = new[b, h, t]
    np.testing.assert_array_equal(have, want)


def test_append_casts_to_the_cache_and_aliases_it():
    cache = jax.ShapeDtypeStruct((2, 4, 1024, 64), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((2, 4, 1, 64), jnp.float32)
    slots = jax.ShapeDtypeStruct((2, 4, 1), jnp.int32)
    compiled = jax.jit(append, donate_argnums=0).lower(cache, new, slots).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 4 * 1024 * 64 * 2
    have = jax.jit(append)(
        jnp.zeros(cache.shape, cache.dtype), jnp.full(new.shape, 1.001), jnp.zeros(slots.shape, int)
    )
    assert have.dtype == jnp.bfloat16 and float(have[0, 0, 0, 0]) == 1.0


def test_append_paged():
    r = rng()
    pool = r.normal(size=(5, 4, 8)).astype(np.float32)
    new = r.normal(size=(2, 3, 8)).astype(np.float32)
    pages = np.array([[4, -1, 0], [2, 9, 1]], np.int32)
    offsets = np.array([[3, 0, 0], [1, 0, -1]], np.int32)
    have = jax.jit(append_paged, donate_argnums=0)(jnp.asarray(pool), new, pages, offsets)
    want = pool.copy()
    want[4, 3], want[0, 0], want[2, 1] = new[0, 0], new[0, 2], new[1, 0]
    np.testing.assert_array_equal(have, want)


def test_compact_keeps_order_and_zeros_the_rest():
    r = rng()
    store = r.normal(size=(2, 2, 9, 5)).astype(np.float32)
    index = np.stack([r.permutation(9)[:4] for _ in range(4)]).reshape(2, 2, 4).astype(np.int32)
    index[1, 0, 2:] = -1
    have = np.asarray(jax.jit(compact)(store, index))
    for b in range(2):
        for h in range(2):
            for c in range(4):
                want = store[b, h, index[b, h, c]] if index[b, h, c] >= 0 else np.zeros(5)
                np.testing.assert_array_equal(have[b, h, c], want)
    positions = jax.jit(compact)(np.arange(36, dtype=np.int32).reshape(2, 2, 9), index)
    assert positions.shape == (2, 2, 4) and positions.dtype == jnp.int32


def test_copy_pages_reads_before_it_writes():
    pool = np.arange(12, dtype=np.float32).reshape(4, 3)
    have = jax.jit(copy_pages, donate_argnums=0)(
        jnp.asarray(pool), np.array([0, 1, 3], np.int32), np.array([1, 0, -1], np.int32)
    )
    np.testing.assert_array_equal(have, pool[[1, 0, 2, 3]])


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda z, i: append(z((1, 2, 8, 4)), z((1, 2, 3, 5)), i((1, 2, 3))), "append: new has shape"),
        (lambda z, i: append(z((1, 2, 8, 4)), z((1, 3, 3, 4)), i((1, 3, 3))), "append: slots has shape"),
        (
            lambda z, i: append_paged(z((4, 8, 4)), z((3, 4)), i((3,)), i((2,))),
            "append_paged: offsets has shape",
        ),
        (lambda z, i: compact(z((1, 2, 8, 4)), i((1, 2))), "compact: index has shape"),
        (lambda z, i: copy_pages(z((4, 8)), i((3,)), i((2,))), "copy_pages: target has shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda s: jnp.zeros(s), lambda s: jnp.zeros(s, jnp.int32))
