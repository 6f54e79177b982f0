"""Window mass for Hopper through Mosaic GPU: a few queries against every slot, one pass over the keys.

One warpgroup a CTA holds the queries of a KV head's whole group and streams tiles of 64 keys; it computes k q^T per query
head, so that slots are rows, and sums the probabilities along the queries. Neither logits nor probabilities are stored.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.prefill_attention.gpu import load, padded_head_dim, transposed
from pallas_kernels.prefill_attention.reference import pad_axis

Array = jax.Array

LOG2E = math.log2(math.e)
TILE = 64  # slots of one product
_MAX_TILES = 4  # of one CTA
_MAX_QUERY_BYTES = 1 << 16  # of a group, in shared memory
_MAX_QUERIES = 256  # columns of one product


def unsupported(q: Array, k: Array, *, lse: Array | None, scale: float) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    group, queries, head_dim = q.shape[1] // k.shape[1], q.shape[2], q.shape[3]
    if lse is None:
        return "it needs lse, as prefill_attention returns it"
    if scale <= 0:
        return f"scale={scale} (must be positive)"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} (bfloat16 and float16 are supported)"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim={head_dim} (multiples of 8 up to 256 are supported)"
    padded = -(-queries // 8) * 8
    if padded > _MAX_QUERIES or group * padded * padded_head_dim(head_dim) * 2 > _MAX_QUERY_BYTES:
        return f"{group} x {queries} queries of head_dim {head_dim} per KV head do not fit into shared memory"
    return None


def window_mass_gpu(
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    lse: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Array:
    """See `ops.window_mass`; operands as accepted by `unsupported`, and `lse` given.

    Returns: f32 [batch, q_heads, slots].
    """
    batch, q_heads, queries, _ = q.shape
    kv_heads, slots = k.shape[1:3]
    group = q_heads // kv_heads
    rows, columns = -(-slots // TILE) * TILE, -(-queries // 8) * 8
    valid = q_positions >= 0
    # +inf makes every probability of a padded query 0, provided that its logits are finite.
    shift = jnp.where(valid[:, None] & (lse > -jnp.inf), lse * LOG2E, jnp.inf)
    shift = pad_axis(shift, 2, columns, math.inf)
    q_positions = pad_axis(q_positions, 1, columns, -1)
    if k_positions.ndim == 2:
        k_positions = k_positions[:, None]
    k_positions = jnp.broadcast_to(k_positions, (batch, kv_heads, slots))
    k_positions = pad_axis(k_positions, 2, rows, -1)
    q = jnp.where(valid[:, None, :, None], q, 0)
    q, k = (pad_axis(x, 3, padded_head_dim(x.shape[3])) for x in (q, k))
    q, k = pad_axis(q, 2, columns), pad_axis(k, 2, rows)
    head_dim, tiles = q.shape[3], rows // TILE
    per = min(_MAX_TILES, tiles)

    def kernel(q_ref, k_ref, shift_ref, q_pos_ref, k_pos_ref, out_ref, scoped):
        q_smem, k_smem, out_smem, q_full, k_full = scoped
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        first = lax.axis_index("part") * per
        count = jnp.minimum(per, tiles - first)
        for g in range(group):
            plgpu.copy_gmem_to_smem(q_ref.at[b, h * group + g], q_smem.at[g], q_full)

        @pl.loop(0, count)
        def _(i):
            at = pl.ds((first + i) * TILE, TILE)
            plgpu.copy_gmem_to_smem(k_ref.at[b, h, at], k_smem.at[i], k_full.at[i])

        plgpu.barrier_wait(q_full)
        shape = (TILE, columns)
        by_query, by_slot = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
        newest = lax.broadcast_in_dim(load(q_pos_ref.at[b], by_query), shape, [1])

        @pl.loop(0, count)
        def _(i):
            at = pl.ds((first + i) * TILE, TILE)
            plgpu.barrier_wait(k_full.at[i])
            position = lax.broadcast_in_dim(load(k_pos_ref.at[b, h, at], by_slot), shape, [0])
            seen = (position >= 0) & (position <= newest)
            if window is not None:
                seen = seen & (position > newest - window)
            for g in range(group):

                def product(ref, g=g):
                    plgpu.wgmma(ref, k_smem.at[i], transposed(q_smem.at[g]))
                    return ref[...]

                logits = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
                unit = scale * LOG2E
                if softcap is not None:
                    logits = jnp.tanh(logits * (scale / softcap))
                    unit = softcap * LOG2E
                bias = load(shift_ref.at[b, h * group + g], by_query)
                probs = jnp.exp2(logits * unit - lax.broadcast_in_dim(bias, shape, [1]))
                out_smem[i, g] = jnp.where(seen, probs, 0.0).sum(axis=1)
            plgpu.commit_smem()
            for g in range(group):
                plgpu.copy_smem_to_gmem(out_smem.at[i, g], out_ref.at[b, h * group + g, at])

        plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        pl.run_scoped(
            lambda *scoped: kernel(*refs, scoped),
            plgpu.SMEM((group, columns, head_dim), q.dtype, transforms=transforms),
            plgpu.SMEM((per, TILE, head_dim), q.dtype, transforms=transforms),
            plgpu.SMEM((per, group, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=group),
            plgpu.Barrier(num_barriers=per),
        )

    mass = plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct((batch, q_heads, rows), jnp.float32),
        grid=(batch, kv_heads, -(-tiles // per)),
        grid_names=("batch", "heads", "part"),
        kernel_name="window_mass",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, shift, q_positions, k_positions)
    return mass[:, :, :slots]
