"""Writes to a cache in XLA: scatters and gathers that run in place when the caller donates the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def append_xla(cache: Array, new: Array, slots: Array) -> Array:
    """See `ops.append`."""
    batch, heads, capacity = cache.shape[:3]
    # Negative indices would wrap around to the end of the cache: send them past it, where they are dropped.
    at = jnp.where(slots < 0, capacity, slots)
    b = jnp.arange(batch)[:, None, None]
    h = jnp.arange(heads)[None, :, None]
    with jax.named_scope("append_xla"):
        return cache.at[b, h, at].set(new.astype(cache.dtype), mode="drop")


def append_paged_xla(pool: Array, new: Array, pages: Array, offsets: Array) -> Array:
    """See `ops.append_paged`."""
    at = jnp.where((pages < 0) | (offsets < 0), pool.shape[0], pages)
    with jax.named_scope("append_paged_xla"):
        return pool.at[at, offsets].set(new.astype(pool.dtype), mode="drop")


def compact_xla(store: Array, index: Array) -> Array:
    """See `ops.compact`."""
    at = jnp.maximum(index, 0).reshape(*index.shape, *([1] * (store.ndim - 3)))
    with jax.named_scope("compact_xla"):
        taken = jnp.take_along_axis(store, at, axis=2)
        used = (index >= 0).reshape(at.shape)
        return jnp.where(used, taken, jnp.zeros((), store.dtype))


def copy_pages_xla(pool: Array, source: Array, target: Array) -> Array:
    """See `ops.copy_pages`."""
    at = jnp.where((target < 0) | (source < 0), pool.shape[0], target)
    with jax.named_scope("copy_pages_xla"):
        return pool.at[at].set(pool[jnp.maximum(source, 0)], mode="drop")
