"""Entries in time order, whatever slots hold them: ranks, gathers and their inverse, masked moments, hashes.

A slot says nothing about time: rows may be padded in front, and decoding reuses freed slots. Methods that cut
the sequence in chunks or count neighbours work on ranks among the stored entries instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def time_order(pos: Array) -> Array:
    """int32 [..., slots]: slot of the i-th oldest entry; empty slots (pos -1) come last."""
    return jnp.argsort(jnp.where(pos >= 0, pos, jnp.iinfo(jnp.int32).max), axis=-1, stable=True)


def time_rank(pos: Array) -> Array:
    """int32 [..., slots]: how many entries are older; empty slots get ranks past all entries."""
    return jnp.argsort(time_order(pos), axis=-1).astype(jnp.int32)


def take(x: Array, index: Array) -> Array:
    """x [..., slots] or [..., slots, dim] gathered along slots by index [..., n]."""
    if x.ndim == index.ndim:
        return jnp.take_along_axis(x, index, axis=-1)
    return jnp.take_along_axis(x, index[..., None], axis=-2)


def split(x: Array, size: int, fill: float | bool = 0.0) -> Array:
    """[..., slots] -> [..., ceil(slots / size), size], the last part filled up."""
    parts = -(-x.shape[-1] // size)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, parts * size - x.shape[-1])]
    return jnp.pad(x, pad, constant_values=fill).reshape(*x.shape[:-1], parts, size)


def masked_softmax(x: Array, mask: Array) -> Array:
    """Softmax of f32 x over the last axis where mask holds; 0 elsewhere, and in rows without any."""
    x = jnp.where(mask, x, -jnp.inf)
    top = jnp.max(x, axis=-1, keepdims=True, initial=-1e30)
    weights = jnp.exp(x - top)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


def masked_zscore(x: Array, mask: Array, floor: float = 1e-6) -> Array:
    """(x - mean) / std (unbiased) over all but the first axis, where mask holds; 0 elsewhere."""
    axes = tuple(range(1, x.ndim))
    n = jnp.maximum(jnp.sum(mask, axis=axes, keepdims=True), 1)
    x = jnp.where(mask, x, 0.0)
    mean = jnp.sum(x, axis=axes, keepdims=True) / n
    centred = jnp.where(mask, x - mean, 0.0)
    std = jnp.sqrt(jnp.sum(centred**2, axis=axes, keepdims=True) / jnp.maximum(n - 1, 1))
    return centred / jnp.maximum(std, floor)


def hash_uniform(*parts: Array | int) -> Array:
    """f32 in (0, 1), the same for the same integers: noise that depends on positions and not on slots.

    The parts broadcast; each is mixed in with the murmur3 finaliser.
    """
    h = jnp.uint32(0x9E3779B9)
    for part in parts:
        h = (h ^ jnp.asarray(part).astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        h = (h ^ (h >> 16)) + jnp.uint32(0x27D4EB2F)
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    h = h ^ (h >> 14)
    return (h >> 8).astype(jnp.float32) * 2.0**-24 + 2.0**-25


def hash_gumbel(*parts: Array | int) -> Array:
    """Standard Gumbel noise from `hash_uniform`."""
    return -jnp.log(-jnp.log(hash_uniform(*parts)))
