"""Block-sparse prefill: the key blocks that each query block of each head reads, and published patterns."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["indices"], meta_fields=["block_q", "block_k", "ordered"]
)
@dataclasses.dataclass(frozen=True)
class BlockTable:
    """Key blocks read by each query block. Masks still apply inside a block, so a table may be a superset.

    A block may appear only once in a row of the table; -1 marks unused entries, which may stand anywhere.
    `ordered` promises rising blocks, then -1: kernels then need not sort.
    """

    indices: Array  # int32 [batch or 1, q_heads or 1, q_blocks, width]
    block_q: int  # queries per query block
    block_k: int  # slots per key block
    ordered: bool = False


def _pack(keep: Array, width: int) -> Array:
    """Bool [..., k_blocks] -> int32 [..., width]: indices of kept blocks in rising order, then -1."""
    blocks = keep.shape[-1]
    dtype = jnp.uint16 if blocks < 2**16 else jnp.int32  # what is sorted: half the bytes where it fits
    rank = jnp.where(keep, jnp.arange(blocks, dtype=dtype), jnp.array(blocks, dtype))
    order = jnp.sort(rank, axis=-1)[..., :width].astype(jnp.int32)
    pad = width - order.shape[-1]
    order = jnp.pad(order, [(0, 0)] * (order.ndim - 1) + [(0, max(pad, 0))], constant_values=blocks)
    return jnp.where(order < blocks, order, -1).astype(jnp.int32)


def _causal_blocks(q_blocks: int, k_blocks: int, block_q: int, block_k: int) -> Array:
    """Bool [q_blocks, k_blocks]: the key block holds at least one slot not after the query block's last."""
    last = (jnp.arange(q_blocks) + 1) * block_q - 1
    return jnp.arange(k_blocks)[None, :] * block_k <= last[:, None]


def from_mask(
    keep: Array, *, block_q: int, block_k: int, width: int | None = None, ordered: bool = False
) -> BlockTable:
    """Table of the blocks set in `keep` bool [batch or 1, q_heads or 1, q_blocks, k_blocks].

    `width` bounds the entries of a row (default: k_blocks); rows with more lose their last blocks, so give
    the true maximum. `ordered` passes on what is true here, that rows rise.
    """
    return BlockTable(_pack(keep, keep.shape[-1] if width is None else width), block_q, block_k, ordered)


def to_mask(table: BlockTable, k_blocks: int) -> Array:
    """Bool [..., q_blocks, k_blocks] of the blocks that a table names."""
    at = jnp.where(table.indices < 0, k_blocks, table.indices).reshape(-1, table.indices.shape[-1])
    put = jax.vmap(lambda i: jnp.zeros((k_blocks,), bool).at[i].set(True, mode="drop"))
    return put(at).reshape(*table.indices.shape[:-1], k_blocks)


def a_shape(tokens: int, *, sink: int, window: int, block_q: int = 64, block_k: int = 64) -> BlockTable:
    """A-shape: the first `sink` tokens and the last `window` ones before each query (StreamingLLM).

    Covers, at block granularity, every slot of causal aligned attention that the pattern allows.
    """
    q_blocks, k_blocks = -(-tokens // block_q), -(-tokens // block_k)
    rows, cols = jnp.arange(q_blocks)[:, None], jnp.arange(k_blocks)[None, :]
    near = (cols + 1) * block_k > rows * block_q - window + 1
    keep = (near | (cols * block_k < sink)) & _causal_blocks(q_blocks, k_blocks, block_q, block_k)
    width = min(k_blocks, -(-sink // block_k) + -(-(window + block_q) // block_k) + 1)
    return BlockTable(_pack(keep[None, None], width), block_q, block_k)


def vertical_slash(
    vertical: Array, slash: Array, tokens: int, *, width: int, block_q: int = 64, block_k: int = 64
) -> BlockTable:
    """Vertical-slash (MInference, arXiv 2407.02490): chosen columns and chosen distances to the diagonal.

    Args:
      vertical: int32 [batch, q_heads, n], slots that every later query reads; -1 is ignored.
      slash: int32 [batch, q_heads, m], distances (query minus key) that every query reads; -1 is ignored.
      tokens: length of the prompt.
      width: entries per row of the table, at least the most blocks that any row needs.
    """
    q_blocks, k_blocks = -(-tokens // block_q), -(-tokens // block_k)
    columns = jax.nn.one_hot(jnp.where(vertical < 0, -1, vertical // block_k), k_blocks, dtype=bool).any(-2)
    # Queries [i*bq, (i+1)*bq) at distance d read keys [i*bq - d, (i+1)*bq - 1 - d]: a run of key blocks.
    start = jnp.arange(q_blocks) * block_q
    first = (start - slash[..., None]) // block_k  # [batch, q_heads, m, q_blocks]
    last = (start + block_q - 1 - slash[..., None]) // block_k
    cols = jnp.arange(k_blocks)
    band = (cols >= first[..., None]) & (cols <= last[..., None]) & (slash >= 0)[..., None, None]
    keep = (columns[..., None, :] | band.any(-3)) & _causal_blocks(q_blocks, k_blocks, block_q, block_k)
    return BlockTable(_pack(keep, width), block_q, block_k)


def top_k(
    scores: Array, count: int, *, block_q: int, block_k: int, sink: int = 1, local: int = 1
) -> BlockTable:
    """The `count` best key blocks of every query block by `scores` f32 [batch, q_heads, q_blocks, k_blocks].

    The first `sink` blocks and the `local` blocks up to the diagonal are always among them. `count` is cut to
    the number of key blocks.
    """
    q_blocks, k_blocks = scores.shape[-2:]
    causal = _causal_blocks(q_blocks, k_blocks, block_q, block_k)
    diagonal = ((jnp.arange(q_blocks) + 1) * block_q - 1) // block_k
    cols = jnp.arange(k_blocks)
    forced = (cols[None, :] < sink) | (cols[None, :] > diagonal[:, None] - local)
    ranked = jnp.where(forced, jnp.inf, scores)
    ranked = jnp.where(causal, ranked, -jnp.inf)
    best, index = jax.lax.top_k(ranked, min(count, k_blocks))
    return BlockTable(jnp.where(best > -jnp.inf, index, -1).astype(jnp.int32), block_q, block_k)
