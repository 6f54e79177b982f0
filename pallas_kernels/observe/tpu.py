"""Column mass through Mosaic TPU: a second pass over q and k, given the log-sum-exp.

Grid (row, query head, slot tile, step over query tiles). A step computes k q^T, so that slots are rows and
the log-sum-exp lies along lanes as it is stored; probabilities add up in [slots, 128] and are reduced once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.observe.columns import column_plan
from pallas_kernels.platform import dot_precision
from pallas_kernels.prefill_attention import aligned
from pallas_kernels.prefill_attention.reference import pad_axis
from pallas_kernels.prefill_attention.tpu import LANES, VMEM_LIMIT, tile_of, to_column

Array = jax.Array


def unsupported(q: Array, *, lse: Array | None) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    if lse is None:
        return "it needs lse, as prefill_attention returns it"
    if q.dtype == jnp.float16:
        return "dtype float16 (bfloat16 and float32 are supported)"
    return None


def column_mass_tpu(
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    lse: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    q_segments: Array | None = None,
    k_segments: Array | None = None,
    causal_aligned: bool = False,
    interpret: Any = False,
) -> Array:
    """See `ops.column_mass`, with `lse` given. Returns f32 [batch, q_heads, slots]."""
    batch, q_heads, tokens, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group = q_heads // kv_heads
    tile = min(tile_of(tokens), tile_of(slots)) if causal_aligned else None
    tile_q, tile_k = tile or tile_of(tokens), tile or tile_of(slots)
    q_size, k_size = -(-tokens // tile_q) * tile_q, -(-slots // tile_k) * tile_k
    k_tiles = k_size // tile_k
    valid = q_positions >= 0
    # +inf makes every probability of a padded query 0, provided that its logits are finite.
    shift = jnp.where(valid[:, None] & (lse > -jnp.inf), lse, jnp.inf)
    shift = pad_axis(shift, 2, q_size, float("inf")).reshape(batch * q_heads, 1, q_size)
    q = pad_axis(jnp.where(valid[:, None, :, None], q, 0), 2, q_size)
    k_pos = k_positions if k_positions.ndim == 3 else k_positions[:, None]
    k_pos = jnp.broadcast_to(k_pos, (batch, kv_heads, slots))
    # Empty slots may hold NaN; they are masked, and 0 keeps 0 * NaN out of the products.
    k = pad_axis(jnp.where((k_pos >= 0)[..., None], k, 0), 2, k_size)

    def per_query(x, fill):
        return jnp.pad(x, ((0, 0), (0, q_size - tokens)), constant_values=fill).reshape(batch, 1, q_size)

    def per_slot(x, fill):
        return pad_axis(x, 2, k_size, fill).reshape(batch * kv_heads, 1, k_size)

    rows, columns = [], []
    if causal_aligned:
        low = aligned.lower_bounds(q_positions, window, q_segments)
        rows = [per_query(low, q_size)]
        first, ends = column_plan(rows[0][:, 0], tile_q, tile_k)
    else:
        rows, columns = [per_query(q_positions, -1)], [per_slot(k_pos, -1)]
        if q_segments is not None and k_segments is not None:
            rows.append(per_query(q_segments, -1))
            columns.append(per_slot(jnp.broadcast_to(k_segments[:, None], k_pos.shape), -2))
        first = jnp.zeros((k_tiles,), jnp.int32)
        ends = jnp.full((batch, k_tiles, 3), q_size // tile_q, jnp.int32)
    q_tiles = steps = q_size // tile_q
    if causal_aligned and window is not None:
        steps = min(steps, (window + tile_k - 2) // tile_q + 2)

    def counts(scalars, b, at):
        return tuple(scalars[1][(b * k_tiles + at) * 3 + i] for i in range(3))

    def query_block(scalars, b, at, step):
        last = jnp.maximum(counts(scalars, b, at)[2] - 1, 0)
        # Aligned rows that no query sees would start past the end.
        return jnp.minimum(scalars[0][at] + jnp.minimum(step, last), q_tiles - 1)

    def kernel(*refs):
        scalars, (q_ref, k_ref, shift_ref), refs = refs[:2], refs[2:5], refs[5:]
        row_refs, refs = refs[: len(rows)], refs[len(rows) :]
        column_refs, (out_ref, acc_ref, *saved) = refs[: len(columns)], refs[len(columns) :]
        b, at, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        near, full, count = counts(scalars, b, at)

        @pl.when(step == 0)
        def _init():
            acc_ref[...] = jnp.zeros_like(acc_ref)
            for source, target in zip(column_refs, saved):
                target[...] = jnp.broadcast_to(to_column(source[0]), target.shape)

        def add(masked: bool):
            logits = lax.dot_general(
                k_ref[0, 0], q_ref[0, 0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
                precision=dot_precision(q_ref.dtype),
            ) * scale  # fmt: skip
            if softcap is not None:
                logits = softcap * jnp.tanh(logits / softcap)
            probs = jnp.exp(logits - shift_ref[0])
            if masked and causal_aligned:
                lines = lax.broadcasted_iota(jnp.int32, probs.shape, 0) + at * tile_k
                cols = lax.broadcasted_iota(jnp.int32, probs.shape, 1)
                cols += query_block(scalars, b, at, step) * tile_q
                probs = jnp.where((lines <= cols) & (lines >= row_refs[0][0]), probs, 0.0)
            elif masked:
                slot, query = saved[0][:, :1], row_refs[0][0]
                seen = (slot >= 0) & (slot <= query)
                if window is not None:
                    seen &= slot > query - window
                if len(saved) > 1:
                    seen &= saved[1][:, :1] == row_refs[1][0]
                probs = jnp.where(seen, probs, 0.0)
            parts = [probs[:, i : i + LANES] for i in range(0, tile_q, LANES)]
            acc_ref[...] += functools.reduce(jnp.add, parts)

        plain = (step >= near) & (step < full)
        pl.when(plain)(lambda: add(False))
        pl.when((step < count) & jnp.logical_not(plain))(lambda: add(True))

        @pl.when(step == steps - 1)
        def _finish():
            total = acc_ref[...].sum(axis=1, keepdims=True)
            out_ref[0] = jnp.broadcast_to(total, acc_ref.shape).T[:1]

    def per_head(b, h, at, step, *scalars):
        return b * q_heads + h, 0, query_block(scalars, b, at, step)

    def row_index(b, h, at, step, *scalars):
        return b, 0, query_block(scalars, b, at, step)

    pairs = q_size * k_size // (2 if causal_aligned else 1)
    mass = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, q_heads, k_tiles, steps),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, tile_q, dim),
                    lambda b, h, at, step, *s: (b, h, query_block(s, b, at, step), 0),
                ),
                pl.BlockSpec((1, 1, tile_k, dim), lambda b, h, at, step, *_: (b, h // group, at, 0)),
                pl.BlockSpec((1, 1, tile_q), per_head),
                *[pl.BlockSpec((1, 1, tile_q), row_index) for _ in rows],
                *[
                    pl.BlockSpec(
                        (1, 1, tile_k), lambda b, h, at, step, *_: (b * kv_heads + h // group, 0, at)
                    )
                    for _ in columns
                ],
            ],
            out_specs=pl.BlockSpec((1, 1, tile_k), lambda b, h, at, step, *_: (b * q_heads + h, 0, at)),
            scratch_shapes=[
                pltpu.VMEM((tile_k, LANES), jnp.float32),
                *[pltpu.VMEM((tile_k, LANES), jnp.int32) for _ in columns],
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch * q_heads, 1, k_size), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * q_heads * pairs * dim,
            bytes_accessed=batch * q_heads * dim * q.dtype.itemsize * (k_size + pairs // tile_k),
            transcendentals=batch * q_heads * pairs,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
        name="column_mass",
    )(first, ends.reshape(-1), q, k, shift, *rows, *columns)
    return mass.reshape(batch, q_heads, k_size)[:, :, :slots]
