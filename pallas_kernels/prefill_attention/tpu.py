"""Prefill attention through Mosaic TPU: a flash kernel over a schedule of key blocks.

Grid (row, query head, query tile, step); the key block of a step comes from scalar-prefetched starts or
from a block table, and steps past a tile's last block repeat it, which fetches nothing. Aligned causal
prompts compare indices with one lower bound a query (see `aligned`) and only in the blocks that need it;
anything else compares positions and segments in every block. `splash_attention` of JAX builds its schedule
from masks that are known when tracing; here lengths, packing and block tables are data, so that one
compilation serves every request.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.platform import dot_precision
from pallas_kernels.prefill_attention import aligned
from pallas_kernels.prefill_attention.block_table import BlockTable
from pallas_kernels.prefill_attention.reference import pad_axis

Array = jax.Array

LOW = -1e30  # running maximum before any slot was seen; finite, so that no inf - inf arises
LANES = 128
VMEM_LIMIT = (
    48 << 20
)  # logits and probabilities of a 1024 x 1024 step, with room below the 64 MiB of a 7x core
_TILE = 1024
_SMEM_ENTRIES = 192 * 1024


def unsupported(q: Array, *, scale: float, causal_aligned: bool, blocks: BlockTable | None) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    if q.dtype == jnp.float16:
        return "dtype float16 (bfloat16 and float32 are supported)"
    if scale <= 0:
        return f"scale={scale} (must be positive)"
    if blocks is None:
        return None
    if not causal_aligned:
        return "block tables need causal_aligned=True (queries and keys are the same tokens)"
    if blocks.block_q % LANES or blocks.block_k % LANES:
        return f"blocks of {blocks.block_q} x {blocks.block_k} (multiples of 128 x 128 are supported)"
    if blocks.indices.size > _SMEM_ENTRIES:
        return f"a block table of {blocks.indices.size} entries (at most {_SMEM_ENTRIES}: use larger blocks)"
    return None


def tile_of(size: int) -> int:
    """Tile along queries or slots: 1024, or the size rounded up to lanes if that is less."""
    return min(_TILE, -(-size // LANES) * LANES)


def prefill_attention_tpu(
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
    k_segments: Array | None = None,
    causal_aligned: bool = False,
    blocks: BlockTable | None = None,
    partial: bool = False,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See `ops.prefill_attention`. Returns (out in q's dtype, lse f32 [batch, q_heads, tokens])."""
    batch, q_heads, tokens, _ = q.shape
    kv_heads, slots = k.shape[1:3]
    tile_q, tile_k = tile_of(tokens), tile_of(slots)
    if blocks is not None:
        tile_q, tile_k = min(tile_q, blocks.block_q), min(tile_k, blocks.block_k)
    q_size, k_size = -(-tokens // tile_q) * tile_q, -(-slots // tile_k) * tile_k
    filled = k_positions >= 0 if k_positions.ndim == 3 else (k_positions >= 0)[:, None]
    v = jnp.where(filled[..., None], v, 0)  # 0 * NaN would reach the output from empty slots
    q = pad_axis(q, 2, q_size)
    k, v = pad_axis(k, 2, k_size), pad_axis(v, 2, k_size)

    if causal_aligned:
        low = aligned.lower_bounds(q_positions, window, q_segments)
        low = jnp.pad(low, ((0, 0), (0, q_size - tokens)), constant_values=q_size)
        plan = (
            aligned.dense_plan(low, tile_q, tile_k)
            if blocks is None
            else aligned.sparse_plan(low, blocks, tile_q, tile_k)
        )
        columns, lanes = [low], []
        steps = k_size // tile_k if plan.table is None else plan.table.shape[-1]
        if blocks is None and window is not None:
            steps = min(steps, (window + tile_q - 2) // tile_k + 2)
    else:
        columns = [jnp.pad(q_positions, ((0, 0), (0, q_size - tokens)), constant_values=-1)]
        k_pos = k_positions if k_positions.ndim == 3 else k_positions[:, None]
        k_pos = jnp.broadcast_to(k_pos, (batch, kv_heads, slots)).reshape(-1, 1, slots)
        lanes = [pad_axis(k_pos, 2, k_size, -1)]
        plan = aligned.positions_plan(
            columns[0], lanes[0].reshape(batch, kv_heads, k_size), window, tile_q, tile_k
        )
        if q_segments is not None and k_segments is not None:
            columns.append(jnp.pad(q_segments, ((0, 0), (0, q_size - tokens)), constant_values=-1))
            k_seg = jnp.broadcast_to(k_segments[:, None], (batch, kv_heads, slots)).reshape(-1, 1, slots)
            lanes.append(pad_axis(k_seg, 2, k_size, -2))
            # Positions alone do not tell where a mask is needed.
            plan = dataclasses.replace(plan, steps=plan.steps.at[..., 1].set(0))
        steps = k_size // tile_k
    out, lse = _launch(
        q, k, v, [c.reshape(batch, 1, q_size) for c in columns], lanes, plan, steps, tile_q, tile_k,
        scale=scale, window=window, softcap=softcap, aligned_mode=causal_aligned, interpret=interpret,
        dtype=jnp.float32 if partial else q.dtype,
    )  # fmt: skip
    return out[:, :, :tokens], lse.reshape(batch, q_heads, q_size)[:, :, :tokens]


def plan_scalars(plan: aligned.Plan) -> tuple[list[Array], Any, Any]:
    """(prefetched arrays, block of (row, head, tile, step), step counts of (row, head, tile)) of a plan."""
    steps = plan.steps
    rows, heads, tiles, _ = steps.shape
    source = plan.table if plan.table is not None else plan.first

    def counts(scalars, b, h, tile):
        at = ((b if rows > 1 else 0) * heads + (h if heads > 1 else 0)) * tiles + tile
        return tuple(scalars[0][at * 3 + i] for i in range(3))

    def block(scalars, b, h, tile, step):
        last = jnp.maximum(counts(scalars, b, h, tile)[2] - 1, 0)
        step = jnp.minimum(step, last)
        if plan.table is None:
            return scalars[1][b * tiles + tile] + step
        t_rows, t_heads, _, width = plan.table.shape
        at = ((b if t_rows > 1 else 0) * t_heads + (h if t_heads > 1 else 0)) * tiles + tile
        return scalars[1][at * width + step]

    return [steps.reshape(-1), source.reshape(-1)], block, counts


def to_column(row: Array) -> Array:
    """[1, n] along lanes -> [n, 1] along sublanes."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _launch(
    q,
    k,
    v,
    columns,
    lanes,
    plan,
    steps,
    tile_q,
    tile_k,
    *,
    scale,
    window,
    softcap,
    aligned_mode,
    interpret,
    dtype,
):
    batch, q_heads, q_size, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    prefetch, block, counts = plan_scalars(plan)

    def kernel(*refs):
        scalars, (q_ref, k_ref, v_ref), refs = refs[:2], refs[2:5], refs[5:]
        column_refs, refs = refs[: len(columns)], refs[len(columns) :]
        lane_refs, (out_ref, lse_ref, top_ref, total_ref, acc_ref, *saved) = (
            refs[: len(lanes)],
            refs[len(lanes) :],
        )
        b, h, tile, step = (pl.program_id(i) for i in range(4))
        head_end, body_end, count = counts(scalars, b, h, tile)

        @pl.when(step == 0)
        def _init():
            top_ref[...] = jnp.full_like(top_ref, LOW)
            total_ref[...] = jnp.zeros_like(total_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)
            for source, target in zip(column_refs, saved):
                target[...] = jnp.broadcast_to(to_column(source[0]), target.shape)

        def attend(masked: bool):
            dot = functools.partial(
                lax.dot_general, preferred_element_type=jnp.float32, precision=dot_precision(q_ref.dtype)
            )
            logits = dot(q_ref[0, 0], k_ref[0, 0], (((1,), (1,)), ((), ()))) * scale
            if softcap is not None:
                logits = softcap * jnp.tanh(logits / softcap)
            if masked:
                bound = saved[0][:, :1]
                if aligned_mode:
                    cols = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
                    cols += block(scalars, b, h, tile, step) * tile_k
                    lines = lax.broadcasted_iota(jnp.int32, logits.shape, 0) + tile * tile_q
                    seen = (cols <= lines) & (cols >= bound)
                else:
                    at = lane_refs[0][0]
                    seen = (at >= 0) & (at <= bound)
                    if window is not None:
                        seen &= at > bound - window
                    if len(saved) > 1:
                        seen &= lane_refs[1][0] == saved[1][:, :1]
                logits = jnp.where(seen, logits, -jnp.inf)
            top = top_ref[:, :1]
            new_top = jnp.maximum(top, logits.max(axis=1, keepdims=True))
            weights = jnp.exp(logits - new_top)
            rescale = jnp.exp(top - new_top)
            total_ref[...] = total_ref[...] * rescale + weights.sum(axis=1, keepdims=True)
            top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
            pv = dot(weights.astype(v_ref.dtype), v_ref[0, 0], (((1,), (0,)), ((), ())))
            acc_ref[...] = acc_ref[...] * rescale + pv

        plain = (step >= head_end) & (step < body_end)
        pl.when(plain)(lambda: attend(False))
        pl.when((step < count) & jnp.logical_not(plain))(lambda: attend(True))

        @pl.when(step == steps - 1)
        def _finish():
            total = total_ref[...]
            empty = total <= 0.0
            safe = jnp.where(empty, 1.0, total)
            out_ref[0, 0] = (acc_ref[...] / safe[:, :1]).astype(out_ref.dtype)
            lse = jnp.where(empty, -jnp.inf, top_ref[...] + jnp.log(safe))
            lse_ref[0] = lse.T[:1]

    def key_spec():
        def index(b, h, tile, step, *scalars):
            return b, h // group, block(scalars, b, h, tile, step), 0

        return pl.BlockSpec((1, 1, tile_k, dim), index)

    def lane_spec():
        def index(b, h, tile, step, *scalars):
            return b * kv_heads + h // group, 0, block(scalars, b, h, tile, step)

        return pl.BlockSpec((1, 1, tile_k), index)

    by_tile = pl.BlockSpec((1, 1, tile_q, dim), lambda b, h, tile, step, *_: (b, h, tile, 0))
    column = pl.BlockSpec((1, 1, tile_q), lambda b, h, tile, step, *_: (b, 0, tile))
    pairs = q_size * k.shape[2] // (2 if aligned_mode else 1)
    if plan.table is not None:
        pairs = min(pairs, q_size * steps * tile_k)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, q_heads, q_size // tile_q, steps),
            in_specs=[by_tile, key_spec(), key_spec()]
            + [column] * len(columns)
            + [lane_spec() for _ in lanes],
            out_specs=[
                by_tile,
                pl.BlockSpec((1, 1, tile_q), lambda b, h, tile, step, *_: (b * q_heads + h, 0, tile)),
            ],
            scratch_shapes=[
                pltpu.VMEM((tile_q, LANES), jnp.float32),
                pltpu.VMEM((tile_q, LANES), jnp.float32),
                pltpu.VMEM((tile_q, dim), jnp.float32),
                *[pltpu.VMEM((tile_q, LANES), jnp.int32) for _ in columns],
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch * q_heads, 1, q_size), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * q_heads * pairs * dim,
            bytes_accessed=batch * q_heads * dim * q.dtype.itemsize * 2 * (q_size + pairs // tile_q),
            transcendentals=batch * q_heads * pairs,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
        name="prefill_attention",
    )(*prefetch, q, k, v, *columns, *lanes)
