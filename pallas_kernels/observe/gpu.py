"""Column mass for Hopper through Mosaic GPU: a second pass over q and k, given the log-sum-exp.

One CTA holds 128 slots of one head, two compute warpgroups of 64 slots each; a third warpgroup streams
queries and their log-sum-exp. A warpgroup computes k q^T, so that slots are rows: probabilities add up
elementwise over query blocks and are reduced along the queries once, at the end. Half the products of the
flash pass.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.observe.columns import column_plan
from pallas_kernels.prefill_attention import aligned
from pallas_kernels.prefill_attention.gpu import load, padded_head_dim, transposed
from pallas_kernels.prefill_attention.reference import pad_axis

Array = jax.Array

LOG2E = math.log2(math.e)
_WARPGROUP_ROWS = 64
TILE_K = 2 * _WARPGROUP_ROWS
TILE_Q = 128


def unsupported(q: Array, *, lse: Array | None, scale: float, causal_aligned: bool) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    head_dim = q.shape[-1]
    if lse is None:
        return "it needs lse, as prefill_attention returns it"
    if scale <= 0:
        return f"scale={scale} (must be positive)"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} (bfloat16 and float16 are supported)"
    if not causal_aligned:
        return "it needs causal_aligned=True (queries and keys are the same tokens)"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim={head_dim} (multiples of 8 up to 256 are supported)"
    return None


def column_mass_gpu(
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    lse: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    q_segments: Array | None = None,
    stages: int = 3,
) -> Array:
    """See `ops.column_mass`; operands as accepted by `unsupported`, and `lse` given.

    Returns: f32 [batch, q_heads, tokens].
    """
    batch, q_heads, tokens, _ = q.shape
    group = q_heads // k.shape[1]
    padded = -(-tokens // TILE_K) * TILE_K
    tiles = padded // TILE_K
    valid = q_positions >= 0
    low = aligned.lower_bounds(q_positions, window, q_segments)
    low = jnp.pad(low, ((0, 0), (0, padded - tokens)), constant_values=padded)
    # +inf makes every probability of a padded query 0, provided that its logits are finite.
    shift = jnp.where(valid[:, None] & (lse > -jnp.inf), lse * LOG2E, jnp.inf)
    shift = pad_axis(shift, 2, padded, math.inf)
    q = jnp.where(valid[:, None, :, None], q, 0)
    q, k = (pad_axis(pad_axis(x, 2, padded), 3, padded_head_dim(x.shape[3])) for x in (q, k))
    head_dim = q.shape[3]
    if head_dim > 128:
        stages = 2
    first, steps = column_plan(low, TILE_Q, TILE_K)

    def kernel(q_ref, k_ref, shift_ref, low_ref, first_ref, steps_ref, out_ref, scoped):
        (k_smem, q_smem, shift_smem, out_smem), (k_full, q_full), q_free = scoped
        b, h, wg = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("wg")
        tile = lax.axis_index("tiles")  # early slots are seen by the most queries: the long tiles run first
        count = steps_ref[b, tile, 2]
        start = first_ref[tile]

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            base = tile * TILE_K + wg * _WARPGROUP_ROWS
            slots = pl.ds(base, _WARPGROUP_ROWS)
            kv_head = lax.div(h, jnp.array(group, h.dtype))
            plgpu.copy_gmem_to_smem(k_ref.at[b, kv_head, slots], k_smem.at[wg], k_full.at[wg])
            plgpu.barrier_wait(k_full.at[wg])
            zeros = jnp.zeros((_WARPGROUP_ROWS, TILE_Q), jnp.float32)
            acc = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

            def step(i, acc, masked):
                slot = lax.rem(i, jnp.array(stages, i.dtype))
                plgpu.barrier_wait(q_full.at[slot])

                def product(ref):
                    plgpu.wgmma(ref, k_smem.at[wg], transposed(q_smem.at[slot]))
                    return ref[...]

                logits = pl.run_scoped(product, plgpu.ACC((_WARPGROUP_ROWS, TILE_Q), jnp.float32))
                by_query = plgpu.Layout.WGMMA.reduce(0)
                bias = load(shift_smem.at[slot], by_query)
                plgpu.barrier_arrive(q_free.at[slot])
                unit = scale * LOG2E
                if softcap is not None:
                    logits = jnp.tanh(logits * (scale / softcap))
                    unit = softcap * LOG2E
                probs = jnp.exp2(logits * unit - lax.broadcast_in_dim(bias, logits.shape, [1]))
                if masked:
                    at = (start + i) * TILE_Q
                    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, logits.shape)
                    lines = iota(0, layout=plgpu.Layout.WGMMA) + base
                    cols = iota(1, layout=plgpu.Layout.WGMMA) + at
                    bound = load(low_ref.at[b, pl.ds(at, TILE_Q)], by_query)
                    seen = (lines <= cols) & (lines >= lax.broadcast_in_dim(bound, logits.shape, [1]))
                    probs = jnp.where(seen, probs, 0.0)
                return acc + probs

            near, full = steps_ref[b, tile, 0], steps_ref[b, tile, 1]
            acc = lax.fori_loop(0, near, functools.partial(step, masked=True), acc)
            acc = lax.fori_loop(near, full, functools.partial(step, masked=False), acc)
            acc = lax.fori_loop(full, count, functools.partial(step, masked=True), acc)
            out_smem[wg] = acc.sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, h, slots])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _(i):
                slot = lax.rem(i, jnp.array(stages, i.dtype))

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(q_free.at[slot])

                rows = pl.ds((start + i) * TILE_Q, TILE_Q)
                plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], q_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(shift_ref.at[b, h, rows], shift_smem.at[slot], q_full.at[slot])

    def entry(*refs):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        pl.run_scoped(
            lambda *scoped: kernel(*refs, scoped),
            (
                plgpu.SMEM((2, _WARPGROUP_ROWS, head_dim), q.dtype, transforms=transforms),
                plgpu.SMEM((stages, TILE_Q, head_dim), q.dtype, transforms=transforms),
                plgpu.SMEM((stages, TILE_Q), jnp.float32),
                plgpu.SMEM((2, _WARPGROUP_ROWS), jnp.float32),
            ),
            (plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_arrivals=2, num_barriers=stages)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            collective_axes="wg",
        )

    mass = plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct((batch, q_heads, padded), jnp.float32),
        grid=(batch, tiles, q_heads),
        grid_names=("batch", "tiles", "heads"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, shift, low, first, steps)
    # Keys of empty slots may be NaN; their rows never met the others.
    return jnp.where(valid[:, None], mass[:, :, :tokens], 0.0)
