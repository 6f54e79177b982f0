"""Attention of many rows over a prefix that they share, stored once: one product for all their queries.

Hydragen (arXiv 2402.05099) and RelayAttention (arXiv 2402.14808): the queries of all rows are stacked, so that the
prefix is read once a step and not once a row; the result is merged with each row's own part by log-sum-exp.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.merge_partials import merge_partials
from pallas_kernels.platform import target_platform
from pallas_kernels.prefill_attention.ops import prefill_attention

Array = jax.Array

_TILE = 128  # queries and slots that a kernel handles at once
_SMS = 132  # of an H100 or H200; only the choice of splits depends on it
_LEAST = 512  # slots of a split, at least


def splits_of(slots: int, tiles: int) -> int:
    """Parts to cut a prefix of `slots` slots into when `tiles` programs attend to all of it: a power of two."""
    splits = 1
    while (
        slots % (2 * splits * _TILE) == 0 and slots // (2 * splits) >= _LEAST and 2 * splits * tiles <= _SMS
    ):
        splits *= 2
    return splits


def shared_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Partial attention of every row's queries over the prefix of its group, all of which precedes them.

    Args:
      q: [batch, q_heads, tokens, head_dim]; rows of a group are contiguous, batch / groups each.
      k: [groups, kv_heads, slots, head_dim], q's dtype.
      v: [groups, kv_heads, slots, head_dim], q's dtype.
      q_positions: int32 [batch, tokens], after the prefix; -1 marks padding, which sees nothing.
      k_positions: int32 [groups, kv_heads, slots]; -1 marks an empty slot.
      scale: logits are `scale * q.k`.
      window: sliding window in tokens, or None.
      softcap: logits become `softcap * tanh(logits / softcap)`, or None.
      implementation: of `prefill_attention`.

    Returns: out float32 [batch, q_heads, tokens, head_dim], lse float32 [batch, q_heads, tokens]: 0 and -inf where
    nothing is visible.

    Raises:
      ValueError: groups that do not divide the batch, or what `prefill_attention` refuses.
    """
    batch, q_heads, tokens, dim = q.shape
    groups, kv_heads, slots, _ = k.shape
    if batch % groups:
        raise ValueError(f"shared_attention: {batch} rows cannot be divided among {groups} prefixes")
    rows = batch // groups * (q_heads // kv_heads) * tokens
    # [groups, rows per group, kv_heads, queries per KV head, tokens, head_dim]: KV heads first, all queries stacked.
    stacked = q.reshape(groups, batch // groups, kv_heads, -1, tokens, dim).swapaxes(1, 2)
    stacked = stacked.reshape(groups, kv_heads, rows, dim)
    valid = q_positions >= 0
    # Without a window all of the prefix is visible to all queries; a late position says so without any mask.
    at = jnp.full_like(q_positions, jnp.iinfo(jnp.int32).max) if window is None else q_positions
    at = jnp.broadcast_to(
        at.reshape(groups, -1, 1, tokens), (groups, batch // groups, q_heads // kv_heads, tokens)
    )
    splits = 1
    if target_platform() == "gpu" and implementation != "xla":
        splits = splits_of(slots, groups * kv_heads * -(-rows // _TILE))
    # A split is one more KV head: slots of a head are contiguous, so that this moves nothing.
    cut = lambda x: x.reshape(groups, kv_heads * splits, slots // splits, *x.shape[3:])  # noqa: E731
    out, lse = prefill_attention(
        jnp.repeat(stacked, splits, axis=1),
        cut(k),
        cut(v),
        q_positions=at.reshape(groups, rows),
        k_positions=cut(k_positions),
        scale=scale,
        window=window,
        softcap=softcap,
        return_lse=True,
        partial=True,
        implementation=implementation,
    )
    if splits > 1:
        parts = out.reshape(groups, kv_heads, splits, rows, dim), lse.reshape(groups, kv_heads, splits, rows)
        out, lse = merge_partials(*(jnp.moveaxis(x, 2, 0) for x in parts))
    out = out.reshape(groups, kv_heads, batch // groups, -1, tokens, dim).swapaxes(1, 2)
    lse = lse.reshape(groups, kv_heads, batch // groups, -1, tokens).swapaxes(1, 2)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    return jnp.where(valid[:, None, :, None], out, 0.0), jnp.where(valid[:, None], lse, -jnp.inf)
