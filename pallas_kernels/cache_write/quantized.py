"""Writes to a quantized cache: quantize and append in one step, and flush whole groups of the residual window.

Every token is quantized once, when it is stored; nothing is decoded again to make room.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.cache_write.ops import append
from pallas_kernels.formats import (
    DENSE,
    EIGHT_BIT,
    PACKED_BITS,
    KVStore,
    pack_block,
    quantize_keys,
    quantize_tokens,
    quantize_values,
)
from pallas_kernels.platform import check_shape

Array = jax.Array


def append_tokens(store: KVStore, k: Array, v: Array, slots: Array) -> KVStore:
    """Store new tokens in chosen slots of a Dense cache, quantized to its format on the way.

    Args:
      store: dense or 8-bit format. Donate it.
      k: [batch, kv_heads, tokens, head_dim].
      v: [batch, kv_heads, tokens, head_dim].
      slots: int32 [batch, kv_heads, tokens]; -1 or past the end drops the token.

    Returns: the store with the tokens written.

    Raises:
      ValueError: shapes that do not fit, or int4 and int2, which quantize whole groups: `append_residual`.
    """
    check_shape("append_tokens", "k", k.shape, (*slots.shape, store.head_dim))
    check_shape("append_tokens", "v", v.shape, k.shape)
    if store.format == DENSE:
        return dataclasses.replace(store, k=append(store.k, k, slots), v=append(store.v, v, slots))
    if store.format not in EIGHT_BIT:
        raise ValueError(
            f"append_tokens: format {store.format!r} quantizes whole groups; use append_residual and "
            "flush_residual"
        )
    fields = {}
    with jax.named_scope("quantize"):
        for name, x in (("k", k), ("v", v)):
            scale = getattr(store, f"{name}_scale")
            codes, scales = quantize_tokens(x, store.format, scale.dtype)
            fields[name] = append(getattr(store, name), codes, slots)
            fields[f"{name}_scale"] = append(scale, scales, slots)
    return dataclasses.replace(store, **fields)


def append_residual(store: KVStore, k: Array, v: Array, active: Array | None = None) -> KVStore:
    """Append one token to the residual window of every (row, KV head).

    Args:
      store: any format with a residual window that has room. Donate it.
      k: [batch, kv_heads, 1, head_dim].
      v: [batch, kv_heads, 1, head_dim].
      active: bool [batch], rows that take part; None: all.

    Returns: the store with `res_lengths` one longer where active. A full window drops the token.

    Raises:
      ValueError: no residual window, or shapes that do not fit.
    """
    if not store.residual:
        raise ValueError("append_residual: the store has no residual window (k_res, v_res, res_lengths)")
    check_shape("append_residual", "k", k.shape, (*store.res_lengths.shape, 1, store.head_dim))
    check_shape("append_residual", "v", v.shape, k.shape)
    takes = jnp.ones(store.res_lengths.shape, bool) if active is None else active[:, None]
    takes = takes & (store.res_lengths < store.residual)
    slots = jnp.where(takes, store.res_lengths, -1)[..., None]
    return dataclasses.replace(
        store, k_res=append(store.k_res, k, slots), v_res=append(store.v_res, v, slots),
        res_lengths=store.res_lengths + takes.astype(jnp.int32),
    )  # fmt: skip


def flush_size(store: KVStore) -> int:
    """Tokens that `flush_residual` moves at once: whole groups and whole pack blocks."""
    return math.lcm(pack_block(store.format), store.group)


def flush_residual(store: KVStore, lengths: Array) -> tuple[KVStore, Array]:
    """Quantize the oldest group of the residual window where one is complete, and move it behind the slots.

    Args:
      store: int4 or int2, with a residual window of at least `flush_size` tokens. Donate it.
      lengths: int32 [batch, kv_heads], slots in use, multiples of `flush_size`.

    Returns: the store, and the lengths: `flush_size` longer where the window held that many tokens, else as
      they were. A (row, head) without room for the group keeps it in the window.

    Raises:
      ValueError: another format, or a window shorter than a group.
    """
    if store.format not in PACKED_BITS:
        raise ValueError(
            f"flush_residual: format {store.format!r} has no groups; supported: {list(PACKED_BITS)}"
        )
    size, bits = flush_size(store), PACKED_BITS[store.format]
    if store.residual < size:
        raise ValueError(f"flush_residual: a window of {store.residual} tokens never holds a group of {size}")
    check_shape("flush_residual", "lengths", lengths.shape, store.res_lengths.shape)
    ready = (store.res_lengths >= size) & (lengths + size <= store.slots)
    with jax.named_scope("flush_residual"):
        new = {}
        for name, quantize in (("k", quantize_keys), ("v", quantize_values)):
            group = getattr(store, f"{name}_res")[:, :, :size]
            scale = getattr(store, f"{name}_scale")
            codes = quantize(group, bits, store.group, scale.dtype)
            new |= dict(zip((name, f"{name}_scale", f"{name}_zero"), codes))
        fields = {}
        for name, (axis, per) in store.slot_fields().items():
            steps = jnp.arange(size // per, dtype=jnp.int32)
            slots = jnp.where(ready[..., None], lengths[..., None] // per + steps, -1)
            fields[name] = _write(getattr(store, name), new[name], slots, axis)
        for name in ("k_res", "v_res"):
            window = getattr(store, name)
            fields[name] = jnp.where(ready[..., None, None], jnp.roll(window, -size, axis=2), window)
    moved = jnp.where(ready, size, 0)
    store = dataclasses.replace(store, **fields, res_lengths=store.res_lengths - moved)
    return store, lengths + moved


def _write(cache: Array, new: Array, slots: Array, axis: int) -> Array:
    """`append` along `axis` -2 or -1 of [batch, kv_heads, ., .]."""
    if axis == -2:
        return append(cache, new, slots, implementation="xla")
    at = jnp.where(slots < 0, cache.shape[-1], slots)[:, :, None]
    b = jnp.arange(cache.shape[0])[:, None, None, None]
    h = jnp.arange(cache.shape[1])[None, :, None, None]
    j = jnp.arange(cache.shape[2])[None, None, :, None]
    return cache.at[b, h, j, at].set(new.astype(cache.dtype), mode="drop")
