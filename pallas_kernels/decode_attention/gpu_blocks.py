"""Small blocks of dense storage as pages: how the Hopper decode kernel reads blocks shorter than its step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import DENSE, KVStore

Array = jax.Array
_STEP, _ROWS = 64, 8  # slots of a step, and the fewest that the copy engine moves into their place


def are_pages(store: KVStore, table: Array | None, block_size: int) -> bool:
    """Whether blocks of this size can be read as pages of a pool that the rows and heads share: dense storage only."""
    return store.format == DENSE and table is None and block_size % _ROWS == 0 and _STEP % block_size == 0


def as_pages(
    store: KVStore, lengths: Array, blocks: Array, block_size: int, ascend: bool = False
) -> tuple[KVStore, Array, Array]:
    """The same slots as pages: store of pools, lengths int32 [batch, kv_heads] and table int32 [batch, kv_heads, n].

    Nothing is copied: a row's blocks lie side by side already. They are put in ascending order unless they have it, since
    the row's newest block may end early and must be the last page; attention itself does not mind their order.

    Args:
      store: dense, [batch, kv_heads, slots, head_dim].
      lengths: int32 [batch, kv_heads], valid slots.
      blocks: int32 [batch, kv_heads, n], each block at most once, -1 pads at the end.
      block_size: slots per block, which divides the slots.
      ascend: the blocks are in ascending order already.
    """
    batch, kv_heads, slots, dim = store.k.shape
    per_row, none = slots // block_size, np.int32(2**31 - 1)
    # Blocks past the end hold nothing; they would count as pages otherwise.
    used = (blocks >= 0) & (blocks * block_size < lengths[..., None])
    if not ascend:
        blocks = jnp.sort(jnp.where(used, blocks, none), axis=-1)
        used = blocks < none
    valid = jnp.clip(lengths[..., None] - jnp.where(used, blocks, 0) * block_size, 0, block_size)
    kept = jnp.sum(jnp.where(used, valid, 0), axis=-1)
    first = jnp.arange(batch * kv_heads, dtype=jnp.int32).reshape(batch, kv_heads, 1) * per_row
    table = first + jnp.where(used, blocks, 0)
    pool = (-1, block_size, dim)
    pages = dataclasses.replace(store, k=store.k.reshape(pool), v=store.v.reshape(pool))
    return pages, kept, table
