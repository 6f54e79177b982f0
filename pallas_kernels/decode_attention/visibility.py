"""Which slot each query token sees: one definition for every implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def visible_slots(
    slots: Array,  # int32 [batch, kv_heads, n] logical slot ids, -1 where there is none
    total: Array,  # int32 [batch, kv_heads] stored tokens: valid slots, then the residual window
    valid: Array,  # bool [batch, kv_heads, n] the slot holds a token
    positions: Array | None,  # int32 [batch, kv_heads, n] of these slots; None: a slot's id is its position
    q_positions: Array | None,  # int32 [batch, tokens]
    mask: Array | None,  # bool [batch, tokens, new_tokens], over the newest stored tokens
    window: int | None,
    tokens: int,
) -> Array:
    """bool [batch, kv_heads, tokens, n]; broadcast over tokens when nothing depends on the query."""
    seen = valid[:, :, None, :]
    if positions is not None:
        seen &= (positions >= 0)[:, :, None, :]
    if q_positions is not None:
        key = (slots if positions is None else positions)[:, :, None, :]
        query = q_positions[:, None, :, None]
        causal = key <= query
        if mask is not None:
            causal = causal | _in_tree(slots, total, mask.shape[-1])[:, :, None, :]
        seen = seen & causal & (query >= 0)
        if window is not None:
            seen &= key > query - window
    if mask is not None:
        new = mask.shape[-1]
        column = jnp.clip(slots - (total[..., None] - new), 0, new - 1)  # [batch, kv_heads, n]
        rows = jnp.take_along_axis(mask[:, None], column[:, :, None, :], axis=-1)
        seen &= rows | ~_in_tree(slots, total, new)[:, :, None, :]
    return jnp.broadcast_to(seen, (*seen.shape[:2], tokens, seen.shape[-1]))


def _in_tree(slots: Array, total: Array, new: int) -> Array:
    """bool [batch, kv_heads, n]: the slot is one of the newest `new` stored tokens."""
    return slots >= total[..., None] - new
