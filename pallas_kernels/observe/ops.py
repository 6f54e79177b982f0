"""How much attention every slot received: window mass, column mass, and any sum over queries."""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.observe import gpu, gpu_window, tpu
from pallas_kernels.observe.reference import column_reduce_xla, window_probs_xla
from pallas_kernels.platform import (
    check_dtype,
    check_shape,
    choose_implementation,
    require_hopper,
    require_platform,
)

Array = jax.Array

_FLOATS = ("float32", "bfloat16", "float16")


def _validate(op: str, q: Array, k: Array, q_positions: Array, k_positions: Array, lse: Array | None) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q and k must be [batch, heads, tokens, head_dim], not {q.shape}, {k.shape}")
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    check_shape(op, "k", k.shape, (batch, None, None, head_dim))
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{op}: q_heads={q_heads} is not a multiple of kv_heads={kv_heads}")
    check_dtype(op, "q", q.dtype, _FLOATS)
    if k.dtype != q.dtype:
        raise ValueError(f"{op}: k has dtype {k.dtype}, q has {q.dtype}; cast one of them")
    check_shape(op, "q_positions", q_positions.shape, (batch, tokens))
    per_head = (batch, kv_heads, slots)
    check_shape(op, "k_positions", k_positions.shape, per_head if k_positions.ndim == 3 else (batch, slots))
    if lse is not None:
        check_shape(op, "lse", lse.shape, (batch, q_heads, tokens))
        check_dtype(op, "lse", lse.dtype, ("float32",))


def window_probs(
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lse: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention probabilities of a few queries on every slot, softmax over all slots each may see.

    Args:
      q: [batch, q_heads, queries, head_dim], usually the last `queries` ones of every row, already gathered.
      k: [batch, kv_heads, slots, head_dim], q's dtype.
      q_positions: int32 [batch, queries]; -1 marks padding, whose probabilities are 0.
      k_positions: int32 [batch, slots] or [batch, kv_heads, slots]; -1 marks an empty slot.
      scale: logits are `scale * q.k`.
      window: sliding window in tokens, or None.
      softcap: logits become `softcap * tanh(logits / softcap)`, or None.
      lse: f32 [batch, q_heads, queries], the log-sum-exp of these queries from `prefill_attention`, over the
        same slots; saves the passes of a softmax. None computes it.
      implementation: "xla", or None for the best here.

    Returns: f32 [batch, q_heads, queries, slots].

    Raises:
      ValueError: shapes or dtypes that do not fit, or an `implementation` that cannot run.
    """
    _validate("window_probs", q, k, q_positions, k_positions, lse)
    choose_implementation("window_probs", implementation, {"xla": None}, ("xla",))
    return window_probs_xla(
        q, k, q_positions=q_positions, k_positions=k_positions, scale=scale, window=window, softcap=softcap,
        lse=lse,
    )  # fmt: skip


def window_mass(
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    lse: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """`window_probs` summed over the queries: f32 [batch, q_heads, slots], never storing probabilities.

    implementation: "xla", "mosaic_gpu" (Hopper) and "mosaic_tpu", which need `lse`, or None for the best here.
    """
    _validate("window_mass", q, k, q_positions, k_positions, lse)
    unsupported = {
        "mosaic_gpu": require_hopper() or gpu_window.unsupported(q, k, lse=lse, scale=scale),
        "mosaic_tpu": require_platform("tpu") or tpu.unsupported(q, lse=lse),
        "xla": None,
    }
    chosen = choose_implementation(
        "window_mass", implementation, unsupported, ("mosaic_gpu", "mosaic_tpu", "xla")
    )
    common = dict(q_positions=q_positions, k_positions=k_positions, lse=lse, scale=scale, window=window,
                  softcap=softcap)  # fmt: skip
    if chosen == "mosaic_gpu":
        return gpu_window.window_mass_gpu(q, k, **common)
    return column_mass(q, k, **common, implementation=chosen)


def column_mass(
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    lse: Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    q_segments: Array | None = None,
    k_segments: Array | None = None,
    causal_aligned: bool = False,
    implementation: str | None = None,
) -> Array:
    """Attention every slot received from all queries, in O(slots) memory.

    Args: as `prefill_attention`, and
      lse: f32 [batch, q_heads, tokens], the log-sum-exp that `prefill_attention` returned for the same
        operands; saves the kernels a pass. None computes it.
      implementation: "xla", "mosaic_gpu" (Hopper) and "mosaic_tpu", which need `lse`, or None for the
        best here.

    Returns: f32 [batch, q_heads, slots], the sum over queries of their probability on the slot.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an `implementation` that cannot run.
    """
    _validate("column_mass", q, k, q_positions, k_positions, lse)
    refused = require_hopper() or gpu.unsupported(q, lse=lse, scale=scale, causal_aligned=causal_aligned)
    unsupported = {
        "mosaic_gpu": refused,
        "mosaic_tpu": require_platform("tpu") or tpu.unsupported(q, lse=lse),
        "xla": None,
    }
    chosen = choose_implementation(
        "column_mass", implementation, unsupported, ("mosaic_gpu", "mosaic_tpu", "xla")
    )
    if chosen == "mosaic_tpu":
        return tpu.column_mass_tpu(
            q, k, q_positions=q_positions, k_positions=k_positions, lse=lse, scale=scale, window=window,
            softcap=softcap, q_segments=q_segments, k_segments=k_segments, causal_aligned=causal_aligned,
        )  # fmt: skip
    if chosen == "mosaic_gpu":
        return gpu.column_mass_gpu(
            q, k, q_positions=q_positions, lse=lse, scale=scale, window=window, softcap=softcap,
            q_segments=q_segments,
        )  # fmt: skip
    return column_reduce_xla(
        lambda probs, _: probs.sum(2), q, k, q_positions=q_positions, k_positions=k_positions, scale=scale,
        lse=lse, window=window, softcap=softcap, q_segments=q_segments, k_segments=k_segments,
        causal_aligned=causal_aligned,
    )  # fmt: skip


def column_reduce(
    fn: Callable[[Array, Array], Array],
    q: Array,
    k: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    lse: Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    q_segments: Array | None = None,
    k_segments: Array | None = None,
    causal_aligned: bool = False,
) -> Array:
    """Sum over query blocks of `fn(probabilities, q_positions)`: squared mass, counts over a threshold, ...

    `fn` takes probs f32 [batch, q_heads, block, n] (0 where masked or padded) and q_positions int32
    [batch, block] (-1 for padding), and returns [..., n]; it must treat slots alike, map zero probabilities
    to zero, and add up over blocks. With `causal_aligned`, n is less than slots for early queries. Arguments
    and errors as `column_mass`; always XLA, since `fn` is the caller's.

    Returns: [..., slots] in fn's dtype.
    """
    _validate("column_reduce", q, k, q_positions, k_positions, lse)
    return column_reduce_xla(
        fn, q, k, q_positions=q_positions, k_positions=k_positions, scale=scale, lse=lse, window=window,
        softcap=softcap, q_segments=q_segments, k_segments=k_segments, causal_aligned=causal_aligned,
    )  # fmt: skip
