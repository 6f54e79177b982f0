"""Attention mass in XLA, blocked over queries: O(slots) memory beside one block of probabilities."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.prefill_attention.reference import (
    block_scores,
    causal_segments,
    map_query_blocks,
    pad_axis,
    query_block_size,
    visible,
)

Array = jax.Array


def block_probabilities(logits: Array, lse: Array | None) -> Array:
    """exp(logits - lse), 0 for rows that see nothing.

    Args:
      logits: f32 [batch, kv_heads, group, tokens, slots], -inf where masked.
      lse: f32 [batch, q_heads, tokens], or None to normalise over the slots at hand.

    Returns: f32 [batch, q_heads, tokens, slots].
    """
    batch, kv_heads, group, tokens, slots = logits.shape
    logits = logits.reshape(batch, kv_heads * group, tokens, slots)
    if lse is not None:
        return jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0.0))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def column_reduce_xla(
    fn: Callable[[Array, Array], Array],
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    lse: Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    q_segments: Array | None = None,
    k_segments: Array | None = None,
    causal_aligned: bool = False,
    block_q: int | None = None,
) -> Array:
    """See `ops.column_reduce`."""
    batch, q_heads, tokens, _ = q.shape
    slots = k.shape[2]
    block = block_q or query_block_size(batch, q_heads, tokens, slots)
    total = None
    with jax.named_scope("column_reduce_xla"):
        for start, stop in causal_segments(tokens, block) if causal_aligned else [(0, tokens)]:
            end = stop if causal_aligned else slots
            k_seg = None if k_segments is None else k_segments[:, :end]

            def one(index, q_b, pos_b, lse_b, seg_b, end=end, k_seg=k_seg):
                del index
                seen = visible(pos_b, k_positions[..., :end], window, seg_b, k_seg)
                logits = block_scores(q_b, k[:, :, :end], seen, scale=scale, softcap=softcap)
                return fn(block_probabilities(logits, lse_b), pos_b)

            part = slice(start, stop)
            arrays = (
                q[:, :, part],
                q_positions[:, part],
                None if lse is None else lse[:, :, part],
                None if q_segments is None else q_segments[:, part],
            )
            summed = _sum_query_blocks(one, arrays, block)
            summed = pad_axis(summed, summed.ndim - 1, slots)
            total = summed if total is None else total + summed
    return total


def _sum_query_blocks(one, arrays, block: int) -> Array:
    """Sum of `one` over query blocks, without keeping the blocks' results."""
    axes, fill = (2, 1, 2, 1), (0, -1, 0, -1)
    tokens = arrays[0].shape[2]
    if tokens <= block:
        return map_query_blocks(one, arrays, axes, fill, block)[0]
    count = -(-tokens // block)
    padded = [
        None if a is None else pad_axis(a, ax, count * block, f) for a, ax, f in zip(arrays, axes, fill)
    ]

    def cut(index):
        return [
            None if a is None else jax.lax.dynamic_slice_in_dim(a, index * block, block, ax)
            for a, ax in zip(padded, axes)
        ]

    def step(carry, index):
        return carry + one(index, *cut(index)), None

    first = one(jnp.int32(0), *cut(jnp.int32(0)))
    return jax.lax.scan(step, first, jnp.arange(1, count, dtype=jnp.int32))[0]


def window_probs_xla(
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lse: Array | None = None,
) -> Array:
    """See `ops.window_probs`."""
    with jax.named_scope("window_probs_xla"):
        seen = visible(q_positions, k_positions, window)
        return block_probabilities(block_scores(q, k, seen, scale=scale, softcap=softcap), lse)
