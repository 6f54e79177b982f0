"""Which key blocks every query tile reads: how the kernels see padding, windows, packing and block tables.

In a `causal_aligned` call, query i of a row sees exactly the slots low[i] <= j <= i for one number low[i]:
the start of its segment or of the valid tokens, or i - window + 1. An invalid query has low[i] = i + 1.
So a kernel compares indices with one vector and never loads key positions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.prefill_attention.block_table import BlockTable

Array = jax.Array


def lower_bounds(q_positions: Array, window: int | None, q_segments: Array | None) -> Array:
    """First slot that each query sees, int32 [batch, tokens]; its own index + 1 for padded queries.

    Args:
      q_positions: int32 [batch, tokens], aligned: one run of rising positions per row and segment, -1
      padding. window: sliding window in tokens, or None. q_segments: int32 [batch, tokens], or None.
    """
    index = jnp.arange(q_positions.shape[1], dtype=jnp.int32)[None]
    valid = q_positions >= 0
    previous = jnp.pad(valid, ((0, 0), (1, 0)))[:, :-1]
    starts = valid & ~previous
    if q_segments is not None:
        same = jnp.pad(q_segments[:, 1:] == q_segments[:, :-1], ((0, 0), (1, 0)))
        starts = starts | (valid & ~same)
    low = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    if window is not None:
        low = jnp.maximum(low, index - window + 1)
    return jnp.where(valid, low, index + 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps of the key loop for every query tile. Steps run over key blocks in rising order.

    A step needs the mask unless it lies in [head, body): there every query of the tile sees the whole block.
    """

    first: Array | None  # int32 [batch, tiles]: first key block; the steps are consecutive. None: see `table`
    table: Array | None  # int32 [batch or 1, q_heads or 1, tiles, width]: key block of each step
    steps: Array  # int32 [batch, q_heads or 1, tiles, 3]: ends of head, body and tail


def dense_plan(low: Array, tile_q: int, tile_k: int) -> Plan:
    """Plan over all blocks between the first that any query of the tile sees and the diagonal.

    Args:
      low: int32 [batch, tokens], tokens a multiple of tile_q.
    """
    batch, tokens = low.shape
    tiles = tokens // tile_q
    by_tile = low.reshape(batch, tiles, tile_q)
    start = jnp.arange(tiles, dtype=jnp.int32) * tile_q
    end = start + tile_q
    first = by_tile.min(-1) // tile_k
    last = jnp.where(by_tile.min(-1) < end, -(-end // tile_k), first)
    head = -(-by_tile.max(-1) // tile_k)  # the first block that starts at or after every lower bound
    body = (start + 1) // tile_k  # the first block that reaches past the tile's first query
    steps = jnp.stack([jnp.clip(x, first, last) - first for x in (head, jnp.maximum(head, body), last)], -1)
    return Plan(first, None, steps[:, None].astype(jnp.int32))


def sparse_plan(low: Array, blocks: BlockTable, tile_q: int, tile_k: int) -> Plan:
    """Plan over the blocks of a table; `blocks.block_q` and `block_k` are multiples of the tiles."""
    batch, tokens = low.shape
    tiles = tokens // tile_q
    ratio = blocks.block_k // tile_k
    table = jnp.repeat(blocks.indices, blocks.block_q // tile_q, axis=2)[:, :, :tiles]
    table = table[..., None] * ratio + jnp.arange(ratio, dtype=jnp.int32)
    table = jnp.where(table >= 0, table, tokens).reshape(*table.shape[:3], -1)
    start = jnp.arange(tiles, dtype=jnp.int32) * tile_q
    # Blocks after the diagonal are dropped, the rest run in rising order.
    table = jnp.where(table * tile_k < (start + tile_q)[:, None], table, tokens)
    table = table if blocks.ordered else jnp.sort(table, axis=-1)
    low_tile = low.reshape(batch, 1, tiles, tile_q)
    count = jnp.broadcast_to((table < tokens).sum(-1), (batch, *table.shape[1:3]))
    count = jnp.where(low_tile.min(-1) < start + tile_q, count, 0)
    head = (table * tile_k < low_tile.max(-1)[..., None]).sum(-1)
    body = ((table + 1) * tile_k <= start[:, None] + 1).sum(-1)
    head = jnp.minimum(head, count)
    steps = jnp.stack([head, jnp.clip(body, head, count), count], axis=-1)
    return Plan(None, jnp.where(table < tokens, table, 0).astype(jnp.int32), steps.astype(jnp.int32))


def sparse_positions_plan(
    blocks: BlockTable, tokens: int, slots: int, batch: int, tile_q: int, tile_k: int
) -> Plan:
    """Plan over the blocks of a table for slots in any order: every step masks by position.

    `blocks.block_q` and `block_k` are multiples of the tiles, `tokens` and `slots` of them.
    """
    tiles, ratio = tokens // tile_q, blocks.block_k // tile_k
    table = jnp.repeat(blocks.indices, blocks.block_q // tile_q, axis=2)[:, :, :tiles]
    table = table[..., None] * ratio + jnp.arange(ratio, dtype=jnp.int32)
    end = slots // tile_k
    table = jnp.where((table >= 0) & (table < end), table, end).reshape(*table.shape[:3], -1)
    table = table if blocks.ordered else jnp.sort(table, axis=-1)
    count = jnp.broadcast_to((table < end).sum(-1), (batch, *table.shape[1:3]))
    steps = jnp.stack([count] * 3, axis=-1)
    return Plan(None, jnp.where(table < end, table, 0).astype(jnp.int32), steps.astype(jnp.int32))


def positions_plan(
    q_positions: Array, k_positions: Array, window: int | None, tile_q: int, tile_k: int
) -> Plan:
    """Plan for slots in any order: all blocks up to the last that any query of the tile sees.

    The leading blocks in which every query of the tile sees every slot of every KV head need no mask: those of
    an uncompressed cache before a chunk of new tokens.

    Args:
      q_positions: int32 [batch, tokens], tokens a multiple of tile_q; -1 padding.
      k_positions: int32 [batch, kv_heads, slots], slots a multiple of tile_k; -1 empty.
    """
    batch, tokens = q_positions.shape
    tiles, blocks = tokens // tile_q, k_positions.shape[2] // tile_k
    queries = q_positions.reshape(batch, tiles, 1, tile_q)
    keys = k_positions.reshape(batch, k_positions.shape[1], 1, blocks, tile_k)
    q_low, q_high = queries.min(-1), queries.max(-1)  # [batch, tiles, 1]
    k_low = keys.min(-1).min(1)  # [batch, 1, blocks], over the KV heads
    k_high = keys.max(-1).max(1)
    first = jnp.where(keys < 0, jnp.iinfo(jnp.int32).max, keys).min(-1).min(1)  # first filled position
    full = (k_low >= 0) & (k_high <= q_low)
    some = (k_high >= 0) & (first <= q_high)
    if window is not None:
        full &= k_low > q_high - window
        some &= k_high > q_low - window
    body = jnp.cumprod(full, axis=-1).sum(-1)
    count = jnp.where(some, jnp.arange(1, blocks + 1), 0).max(-1)
    steps = jnp.stack([jnp.zeros_like(count), jnp.minimum(body, count), count], axis=-1)
    return Plan(jnp.zeros((batch, tiles), jnp.int32), None, steps[:, None].astype(jnp.int32))
