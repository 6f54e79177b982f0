"""Append of one token per (row, head) through Mosaic TPU, in place.

XLA's scatter runs over the updates one after the other. Here each (row, head) reads, changes and writes
back the one tile of rows that holds its slot: a tile, because 16-bit and 8-bit rows share words and cannot
be written alone. The cache is aliased to the output; blocks that no index names stay where they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array


def tile_rows(dtype: jnp.dtype) -> int:
    """Rows of a native tile: 8 of 4 bytes, 16 of 2, 32 of 1."""
    return 32 // jnp.dtype(dtype).itemsize


def unsupported(cache: Array, slots: Array) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    if cache.ndim != 4:
        return f"a cache of {cache.ndim} dimensions (4 are supported: [batch, kv_heads, slots, head_dim])"
    if slots.shape[2] != 1:
        return f"{slots.shape[2]} tokens at once (1 is supported: two could share a tile)"
    if cache.dtype == jnp.float16 or jnp.dtype(cache.dtype).itemsize not in (1, 2, 4):
        return f"dtype {cache.dtype} (bfloat16, float32 and 1-byte dtypes are supported)"
    rows = tile_rows(cache.dtype)
    if cache.shape[2] % rows:
        return f"{cache.shape[2]} slots (multiples of {rows} are supported for {cache.dtype})"
    return None


def append_tpu(cache: Array, new: Array, slots: Array, *, interpret: Any = False) -> Array:
    """See `ops.append`; operands as accepted by `unsupported`."""
    batch, heads, capacity, dim = cache.shape
    rows = tile_rows(cache.dtype)
    at = jnp.where((slots >= 0) & (slots < capacity), slots, -1).reshape(-1)
    flat = cache.reshape(batch * heads, capacity, dim)

    def kernel(at_ref, new_ref, old_ref, out_ref):
        slot = at_ref[pl.program_id(0)]
        line = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        hit = (line == slot % rows) & (slot >= 0)
        # Selects are 32 bits wide; the round trip is exact for every dtype of 1 or 2 bytes.
        wide = jnp.int32 if jnp.issubdtype(out_ref.dtype, jnp.integer) else jnp.float32
        picked = jnp.where(hit, new_ref[0].astype(wide), old_ref[0].astype(wide))
        out_ref[0] = picked.astype(out_ref.dtype)

    tile = pl.BlockSpec((1, rows, dim), lambda i, at: (i, jnp.maximum(at[i], 0) // rows, 0))
    moved = batch * heads * dim * cache.dtype.itemsize
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch * heads,),
            in_specs=[pl.BlockSpec((1, 1, dim), lambda i, at: (i, 0, 0)), tile],
            out_specs=tile,
        ),
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        input_output_aliases={2: 0},
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved * (2 * rows + 1), transcendentals=0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="append",
    )(at, new.astype(cache.dtype).reshape(batch * heads, 1, dim), flat)
    return out.reshape(cache.shape)
