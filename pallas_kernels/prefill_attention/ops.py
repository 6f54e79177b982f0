"""Prefill attention: one validated entry point over every implementation."""

from __future__ import annotations

import jax

from pallas_kernels.platform import (
    check_dtype,
    check_shape,
    choose_implementation,
    require_hopper,
    require_platform,
)
from pallas_kernels.prefill_attention import gpu, tpu
from pallas_kernels.prefill_attention.block_table import BlockTable
from pallas_kernels.prefill_attention.reference import prefill_attention_xla

Array = jax.Array

_OP = "prefill_attention"
_FLOATS = ("float32", "bfloat16", "float16")


def prefill_attention(
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
    return_lse: bool = False,
    partial: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of many queries over filled slots, accumulated in float32.

    A query sees a slot iff the slot is filled (position >= 0), its position is not after the query's and less
    than `window` before it, and both are of one segment. Positions, not indices, decide: slots may lie in any
    order, and a prefix shared by the rows is simply part of the slots.

    Args:
      q: [batch, q_heads, tokens, head_dim], float32, bfloat16 or float16.
      k: [batch, kv_heads, slots, head_dim], q's dtype; kv_heads divides q_heads.
      v: [batch, kv_heads, slots, head_dim], q's dtype. Slots with position -1 may hold anything, even NaN.
      q_positions: int32 [batch, tokens]; -1 marks padding.
      k_positions: int32 [batch, slots] or [batch, kv_heads, slots]; -1 marks an empty slot.
      scale: logits are `scale * q.k`.
      window: sliding window in tokens (a query sees itself and the window - 1 before), or None.
      softcap: logits become `softcap * tanh(logits / softcap)`, or None.
      q_segments: int32 [batch, tokens] ids of packed prompts; given together with `k_segments`.
      k_segments: int32 [batch, slots].
      causal_aligned: a promise that queries and keys are the same tokens (tokens == slots, equal positions
        and segments) and that the valid positions of a row and segment are one run rising by 1. Lets every
        implementation skip the upper triangle and the keys before the window.
      blocks: key blocks that each query block of each head reads; None reads all.
      return_lse: also return the log-sum-exp.
      partial: give `out` in float32, not rounded to q's dtype, to be merged with other parts.
      implementation: "xla", "mosaic_gpu" (Hopper), "mosaic_tpu", or None for the best that supports the operands on the
        platform being traced for.

    Returns: out [batch, q_heads, tokens, head_dim] in q's dtype (float32 if `partial`), 0 for queries that see nothing; with
    `return_lse` also lse f32 [batch, q_heads, tokens], the natural log of the sum of exp(logits), -inf for
    queries that see nothing.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an `implementation` that cannot run.
    """
    _validate(
        q, k, v, q_positions, k_positions, window, softcap, q_segments, k_segments, causal_aligned, blocks
    )
    described = dict(scale=scale, causal_aligned=causal_aligned, blocks=blocks)
    unsupported = {
        "mosaic_gpu": require_hopper() or gpu.unsupported(q, q_segments=q_segments, **described),
        "mosaic_tpu": require_platform("tpu") or tpu.unsupported(q, **described),
        "xla": None,
    }
    chosen = choose_implementation(_OP, implementation, unsupported, ("mosaic_gpu", "mosaic_tpu", "xla"))
    shared = dict(
        q_positions=q_positions, k_positions=k_positions, scale=scale, window=window, softcap=softcap,
        q_segments=q_segments, causal_aligned=causal_aligned, blocks=blocks, partial=partial,
    )  # fmt: skip
    if chosen == "mosaic_gpu":
        out, lse = gpu.prefill_attention_gpu(q, k, v, **shared)
    else:
        run = tpu.prefill_attention_tpu if chosen == "mosaic_tpu" else prefill_attention_xla
        out, lse = run(q, k, v, k_segments=k_segments, **shared)
    return (out, lse) if return_lse else out


def _validate(
    q, k, v, q_positions, k_positions, window, softcap, q_segments, k_segments, causal_aligned, blocks
) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{_OP}: q and k must be [batch, heads, tokens, head_dim], not {q.shape}, {k.shape}")
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    check_shape(_OP, "k", k.shape, (batch, None, None, head_dim))
    check_shape(_OP, "v", v.shape, k.shape)
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{_OP}: q_heads={q_heads} is not a multiple of kv_heads={kv_heads}")
    check_dtype(_OP, "q", q.dtype, _FLOATS)
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise ValueError(f"{_OP}: {name} has dtype {array.dtype}, q has {q.dtype}; cast one of them")
    check_shape(_OP, "q_positions", q_positions.shape, (batch, tokens))
    per_head = (batch, kv_heads, slots)
    check_shape(_OP, "k_positions", k_positions.shape, per_head if k_positions.ndim == 3 else (batch, slots))
    check_dtype(_OP, "q_positions", q_positions.dtype, ("int32",))
    check_dtype(_OP, "k_positions", k_positions.dtype, ("int32",))
    if (q_segments is None) != (k_segments is None):
        raise ValueError(f"{_OP}: give both q_segments and k_segments, or neither")
    if q_segments is not None:
        check_shape(_OP, "q_segments", q_segments.shape, (batch, tokens))
        check_shape(_OP, "k_segments", k_segments.shape, (batch, slots))
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window={window} must be at least 1, or None for no window")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{_OP}: softcap={softcap} must be positive, or None for no cap")
    if causal_aligned and tokens != slots:
        raise ValueError(f"{_OP}: causal_aligned needs tokens == slots, have {tokens} and {slots}")
    if blocks is not None:
        rows = -(-tokens // blocks.block_q)
        table = blocks.indices
        if (
            table.ndim != 4
            or table.shape[0] not in (1, batch)
            or table.shape[1] not in (1, q_heads)
            or table.shape[2] != rows
        ):
            raise ValueError(
                f"{_OP}: blocks.indices has shape {table.shape}, expected "
                f"[1 or {batch}, 1 or {q_heads}, {rows}, width] for block_q={blocks.block_q}"
            )
        check_dtype(_OP, "blocks.indices", table.dtype, ("int32",))
