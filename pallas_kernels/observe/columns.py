"""Which query blocks see each tile of slots in an aligned causal prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def column_plan(low: Array, tile_q: int, tile_k: int) -> tuple[Array, Array]:
    """Query blocks that see each key tile: (first int32 [tiles], steps int32 [batch, tiles, 3]).

    Blocks run from the diagonal on. `steps` holds the ends of the diagonal part, of the part that needs no
    mask and of the rest. Lower bounds rise along a row (padding, packed prompts and windows all do), so that
    each part is one run.

    Args:
      low: int32 [batch, tokens] of `aligned.lower_bounds`, tokens a multiple of both tiles.
      tile_q: queries per block.
      tile_k: slots per tile.
    """
    batch, tokens = low.shape
    by_block = low.reshape(batch, 1, tokens // tile_q, tile_q)
    start = jnp.arange(tokens // tile_k, dtype=jnp.int32) * tile_k
    first = start // tile_q
    full = (lax.cummax(by_block.max(-1), axis=2) <= start[:, None]).sum(-1)
    some = (by_block.min(-1) < (start + tile_k)[:, None]).sum(-1)
    diagonal = -(-(start + tile_k - 1) // tile_q)
    ends = (jnp.minimum(diagonal, some), jnp.minimum(jnp.maximum(diagonal, full), some), some)
    steps = [jnp.broadcast_to(jnp.maximum(end - first, 0), (batch, start.shape[0])) for end in ends]
    return first, jnp.stack(steps, -1).astype(jnp.int32)
