"""Prefill attention for Hopper through Mosaic GPU: causal prompts, dense or by block table, and chunks.

One CTA holds a tile of 128 queries of one head: two compute warpgroups of 64 queries each and one that only
issues TMA loads of K and V into a ring. The compute warpgroups alternate (ping-pong): one runs its softmax
while the other has the tensor cores. Logits stay in log2 units, so that each probability costs one FMA and
one ex2.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.prefill_attention import aligned
from pallas_kernels.prefill_attention.block_table import BlockTable
from pallas_kernels.prefill_attention.reference import pad_axis

Array = jax.Array

LOG2E = math.log2(math.e)
# jax 0.10 demands an index beside the reference, which 0.11 deprecates.
_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()
_WARPGROUP_ROWS = 64
TILE_Q = 2 * _WARPGROUP_ROWS
_FLOOR = -1e30  # running maximum before any slot was seen; finite, so that no inf - inf arises


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tunables of the kernel: slots per step and steps in flight."""

    tile_k: int = 128
    stages: int = 2


def default_tiling(head_dim: int) -> Tiling:
    """Largest ring that fits into 227 KiB of shared memory beside the queries."""
    return {64: Tiling(128, 4), 128: Tiling(128, 2), 192: Tiling(64, 2), 256: Tiling(64, 2)}[head_dim]


def padded_head_dim(head_dim: int) -> int:
    """Head dimension that the kernel computes with: whole swizzle atoms of 64 elements."""
    return -(-head_dim // 64) * 64


def unsupported(
    q: Array, *, scale: float, causal_aligned: bool, blocks: BlockTable | None, q_segments: Array | None
) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    head_dim = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} (bfloat16 and float16 are supported)"
    if not causal_aligned and q_segments is not None:
        return "segments need causal_aligned=True (queries and keys are the same tokens)"
    if head_dim > 256 or head_dim % 8:
        return f"head_dim={head_dim} (multiples of 8 up to 256 are supported)"
    if scale <= 0:
        return f"scale={scale} (must be positive)"
    if blocks is not None:
        tile_k = default_tiling(padded_head_dim(head_dim)).tile_k
        if blocks.block_q % TILE_Q or blocks.block_k % tile_k:
            return (
                f"blocks of {blocks.block_q} x {blocks.block_k} "
                f"(multiples of {TILE_Q} x {tile_k} are supported)"
            )
    return None


def prefill_attention_gpu(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    q_segments: Array | None = None,
    causal_aligned: bool = False,
    blocks: BlockTable | None = None,
    partial: bool = False,
    tiling: Tiling | None = None,
) -> tuple[Array, Array]:
    """See `ops.prefill_attention`; operands as accepted by `unsupported`. Returns (out, lse)."""
    batch, _, tokens, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    tiling = tiling or default_tiling(padded_head_dim(head_dim))
    k_pos = k_positions if k_positions.ndim == 3 else k_positions[:, None]
    # 0 * NaN would reach the output from empty slots of V; keys are masked after the product.
    v = jnp.where((k_pos >= 0)[..., None], v, 0)
    q_size = -(-tokens // TILE_Q) * TILE_Q
    k_tile = max(TILE_Q, tiling.tile_k) if causal_aligned else tiling.tile_k
    k_size = -(-slots // k_tile) * k_tile
    dim = padded_head_dim(head_dim)
    q = pad_axis(pad_axis(q, 2, q_size), 3, dim)
    k, v = (pad_axis(pad_axis(x, 2, k_size), 3, dim) for x in (k, v))
    if causal_aligned:
        bound = aligned.lower_bounds(q_positions, window, q_segments)
        bound = jnp.pad(bound, ((0, 0), (0, q_size - tokens)), constant_values=q_size)
        k_pos = None
        if blocks is None:
            plan = aligned.dense_plan(bound, TILE_Q, tiling.tile_k)
        else:
            plan = aligned.sparse_plan(bound, blocks, TILE_Q, tiling.tile_k)
    else:
        bound = jnp.pad(q_positions, ((0, 0), (0, q_size - tokens)), constant_values=-1)
        k_pos = pad_axis(jnp.broadcast_to(k_pos, (batch, kv_heads, slots)), 2, k_size, -1)
        if blocks is None:
            plan = aligned.positions_plan(bound, k_pos, window, TILE_Q, tiling.tile_k)
        else:
            plan = aligned.sparse_positions_plan(blocks, q_size, k_size, batch, TILE_Q, tiling.tile_k)
    out, lse = _call(q, k, v, bound, k_pos, plan, scale, window, softcap, tiling, partial)
    return out[:, :, :tokens, :head_dim], lse[:, :, :tokens]


def load(ref, layout) -> Array:
    """What `ref` holds as registers in `layout`."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def transposed(ref):
    """`ref` with its two axes swapped, without moving data."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def _call(q, k, v, bounds, k_pos, plan: aligned.Plan, scale, window, softcap, tiling: Tiling, partial: bool):
    """`bounds` are lower bounds by index if `k_pos` is None, else the queries' positions."""
    batch, q_heads, tokens, head_dim = q.shape
    group = q_heads // k.shape[1]
    tiles = tokens // TILE_Q
    tile_k, stages = tiling.tile_k, tiling.stages
    dtype = q.dtype
    blocks_ref = plan.table if plan.table is not None else plan.first

    def kernel(q_ref, k_ref, v_ref, bound_ref, block_ref, steps_ref, *refs):
        *k_pos_ref, out_ref, lse_ref, scoped = refs
        (q_smem, k_smem, v_smem, lse_smem), (k_full, v_full, q_full), (k_free, v_free), turn = scoped
        b, h, wg = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("wg")
        # Long rows first: causal tiles differ in work, and the last ones to start should be short.
        tile = tiles - 1 - lax.axis_index("tiles")
        step_head = h if plan.steps.shape[1] > 1 else 0
        count = steps_ref[b, step_head, tile, 2]
        kv_head = lax.div(h, jnp.array(group, h.dtype))

        def key_block(step):
            if plan.table is None:
                return block_ref[b, tile] + step
            table_b = b if plan.table.shape[0] > 1 else 0
            table_h = h if plan.table.shape[1] > 1 else 0
            return block_ref[table_b, table_h, tile, step]

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            q_own, lse_own = q_smem.at[wg], lse_smem.at[wg]
            base = tile * TILE_Q + wg * _WARPGROUP_ROWS
            rows = pl.ds(base, _WARPGROUP_ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], q_own, q_full.at[wg])
            plgpu.barrier_wait(q_full.at[wg])

            row = plgpu.Layout.WGMMA.reduce(1)
            top = plgpu.layout_cast(jnp.full((_WARPGROUP_ROWS,), _FLOOR, jnp.float32), row)
            total = plgpu.layout_cast(jnp.zeros((_WARPGROUP_ROWS,), jnp.float32), row)
            acc = plgpu.layout_cast(jnp.zeros((_WARPGROUP_ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA)
            bound = load(bound_ref.at[b, rows], row)

            @pl.when(count > 0)
            def _():
                plgpu.barrier_wait(k_full.at[0])

            pl.when(wg == 1)(take_turn)

            def step(i, carry, masked):
                acc, top, total = carry
                slot = lax.rem(i, jnp.array(stages, i.dtype))

                def products(ref):
                    plgpu.wgmma(ref, q_own, transposed(k_smem.at[slot]))
                    take_turn()
                    return ref[...]

                logits = pl.run_scoped(products, plgpu.ACC((_WARPGROUP_ROWS, tile_k), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                unit = scale * LOG2E
                if softcap is not None:
                    logits = jnp.tanh(logits * (scale / softcap))
                    unit = softcap * LOG2E
                if masked:
                    limit = lax.broadcast_in_dim(bound, logits.shape, [0])
                    if k_pos is None:
                        iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, logits.shape)
                        cols = iota(1, layout=plgpu.Layout.WGMMA) + key_block(i) * tile_k
                        lines = iota(0, layout=plgpu.Layout.WGMMA) + base
                        seen = (cols <= lines) & (cols >= limit)
                    else:
                        slots = pl.ds(key_block(i) * tile_k, tile_k)
                        at = load(k_pos_ref[0].at[b, kv_head, slots], plgpu.Layout.WGMMA.reduce(0))
                        at = lax.broadcast_in_dim(at, logits.shape, [1])
                        seen = (at >= 0) & (at <= limit)
                        if window is not None:
                            seen = seen & (at > limit - window)
                    logits = jnp.where(seen, logits, -jnp.inf)
                new_top = jnp.maximum(top, logits.max(axis=1) * unit)
                rescale = jnp.exp2(top - new_top)
                weights = jnp.exp2(logits * unit - lax.broadcast_in_dim(new_top, logits.shape, [0]))
                acc *= lax.broadcast_in_dim(rescale, acc.shape, [0])
                total *= rescale
                weights_16 = weights.astype(dtype)
                total += weights.sum(axis=1)
                # Keeps the softmax on this side of the hand-over of the tensor cores.
                acc, total, new_top, weights_16 = lax.optimization_barrier((acc, total, new_top, weights_16))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)

                def accumulate(ref):
                    plgpu.wgmma(ref, weights_16, v_smem.at[slot])
                    following = i + 1

                    @pl.when(following < count)
                    def _():
                        plgpu.barrier_wait(k_full.at[lax.rem(following, jnp.array(stages, i.dtype))])

                acc = pl.run_state(accumulate)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_top, total

            carry = (acc, top, total)
            head_end = steps_ref[b, step_head, tile, 0]
            body_end = steps_ref[b, step_head, tile, 1]
            carry = lax.fori_loop(0, head_end, functools.partial(step, masked=True), carry)
            carry = lax.fori_loop(head_end, body_end, functools.partial(step, masked=False), carry)
            acc, top, total = lax.fori_loop(body_end, count, functools.partial(step, masked=True), carry)
            pl.when(wg == 0)(take_turn)

            empty = total <= 0.0
            acc /= lax.broadcast_in_dim(jnp.where(empty, 1.0, total), acc.shape, [0])
            lse = jnp.where(empty, -jnp.inf, (top + jnp.log2(total)) * (1 / LOG2E))
            if partial:  # float32 would not fit beside the ring: written straight from registers
                out_ref.at[b, h, rows][...] = acc
            else:
                q_own[...] = acc.astype(dtype)
            lse_own[...] = lse
            plgpu.commit_smem()
            if not partial:
                plgpu.copy_smem_to_gmem(q_own, out_ref.at[b, h, rows])
            plgpu.copy_smem_to_gmem(lse_own, lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _(i):
                slot = lax.rem(i, jnp.array(stages, i.dtype))
                slots = pl.ds(key_block(i) * tile_k, tile_k)

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])

                plgpu.copy_gmem_to_smem(k_ref.at[b, kv_head, slots], k_smem.at[slot], k_full.at[slot])

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(v_free.at[slot])

                plgpu.copy_gmem_to_smem(v_ref.at[b, kv_head, slots], v_smem.at[slot], v_full.at[slot])

    def entry(*refs):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        ring = plgpu.SMEM((stages, tile_k, head_dim), dtype, transforms=transforms)
        pl.run_scoped(
            lambda *scoped: kernel(*refs, scoped),
            (
                plgpu.SMEM((2, _WARPGROUP_ROWS, head_dim), dtype, transforms=transforms),
                ring,
                ring,
                plgpu.SMEM((2, _WARPGROUP_ROWS), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=2),
            ),
            (plgpu.Barrier(num_arrivals=2, num_barriers=stages),) * 2,
            plgpu.Barrier(num_arrivals=2),
            collective_axes="wg",
        )

    return plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, jnp.float32 if partial else dtype),
            jax.ShapeDtypeStruct((batch, q_heads, tokens), jnp.float32),
        ),
        grid=(batch, tiles, q_heads),
        grid_names=("batch", "tiles", "heads"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, v, bounds, blocks_ref, plan.steps, *([] if k_pos is None else [k_pos]))
