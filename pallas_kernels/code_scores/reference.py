"""Scores of product codes in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def look_up(tables: Array, codes: Array) -> Array:
    """f32 [batch, kv_heads, group, slots]: sum over parts of the table's entries that the codes name.

    tables: f32 [batch, kv_heads, group, parts, words]. codes: int32 [batch, kv_heads, slots, parts].
    """
    look = jax.vmap(jax.vmap(lambda t, c: t[:, c]))
    return sum(look(tables[:, :, :, j], codes[..., j]) for j in range(codes.shape[-1]))


def unpack(codes: Array, bits: int) -> Array:
    """int32 [..., count * 8 / bits] of bytes [..., count] that hold codes of 1, 2, 4 or 8 bits, the first one lowest."""
    x = codes.astype(jnp.int32)[..., None] >> (bits * jnp.arange(8 // bits))
    return (x & (2**bits - 1)).reshape(*codes.shape[:-1], -1)


def code_scores_xla(
    tables: Array, codes: Array, lengths: Array, *, bits: int, block: int
) -> tuple[Array, Array]:
    """See `ops.code_scores`."""
    with jax.named_scope("code_scores_xla"):
        logits = look_up(tables, unpack(codes, bits))
        stored = jnp.arange(codes.shape[2]) < lengths[..., None]
        logits = jnp.where(stored[:, :, None], logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        if block == 1:
            return logits, lse
        return logits.reshape(*logits.shape[:3], -1, block).max(-1), lse
