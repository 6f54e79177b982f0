"""Codes of b bits, packed along the channels: exactly b bits each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take. ValueError when they do not fill whole bytes."""
    if not 1 <= bits <= 16:
        raise ValueError(f"codes of {bits} bits cannot be packed; use 1 to 16 bits")
    if count * bits % 8 or (8 % bits and count % 8):
        raise ValueError(f"{count} codes of {bits} bits do not fill whole bytes")
    return count * bits // 8


def pack(codes: Array, bits: int) -> Array:
    """Codes [..., count] in 0 .. 2**bits - 1 -> uint8 [..., count * bits / 8].

    1, 2, 4 and 8 bits: neighbours share a byte, the first in the low bits. Other widths: one plane of count / 8
    bytes for each bit, lowest first.
    """
    size = packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes.astype(jnp.uint8)
    codes = codes.astype(jnp.uint32)
    if 8 % bits == 0:
        parts = codes.reshape(*codes.shape[:-1], size, 8 // bits)
        return _join(parts, bits)
    planes = (codes[..., None, :] >> jnp.arange(bits, dtype=jnp.uint32)[:, None]) & 1
    return _join(planes.reshape(*codes.shape[:-1], size, 8), 1)


def _join(parts: Array, bits: int) -> Array:
    shifts = bits * jnp.arange(parts.shape[-1], dtype=jnp.uint32)
    return (parts << shifts).sum(-1, dtype=jnp.uint32).astype(jnp.uint8)


def unpack(packed: Array, bits: int, count: int) -> Array:
    """The inverse of `pack`: int32 codes [..., count]."""
    x = packed.astype(jnp.int32)
    if bits == 8:
        return x
    width = bits if 8 % bits == 0 else 1
    parts = (x[..., None] >> (width * jnp.arange(8 // width))) & (2**width - 1)
    if 8 % bits == 0:
        return parts.reshape(*x.shape[:-1], count)
    planes = parts.reshape(*x.shape[:-1], bits, count)
    return jnp.sum(planes << jnp.arange(bits)[:, None], axis=-2)
