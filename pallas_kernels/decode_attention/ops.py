"""Decode attention: one validated entry point over every implementation and storage format."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from pallas_kernels.decode_attention import gpu, gpu_limits, tpu
from pallas_kernels.decode_attention.reference import decode_attention_xla
from pallas_kernels.formats import DENSE, EIGHT_BIT, FORMATS, PACKED_BITS, KVStore, pack_block
from pallas_kernels.platform import (
    check_dtype,
    check_scale,
    check_shape,
    choose_implementation,
    require_hopper,
    require_platform,
)

Array = jax.Array
MAX_TOKENS = 16
_OP = "decode_attention"


class DecodeOut(NamedTuple):
    """What `decode_attention` returns when more than the output is asked for; None where not asked."""

    out: Array  # [batch, q_heads, tokens, head_dim]; f32 if lse was asked for (a partial), else q's dtype
    lse: Array | None  # f32 [batch, q_heads, tokens], -inf where nothing is visible
    mass: (
        Array | None
    )  # f32 [batch, q_heads or kv_heads, slots + residual], probability summed over the tokens


def decode_attention(
    q: Array,
    kv: KVStore,
    *,
    lengths: Array,
    positions: Array | None = None,
    q_positions: Array | None = None,
    mask: Array | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    table: Array | None = None,
    blocks: Array | None = None,
    block_size: int | None = None,
    blocks_ascend: bool = False,
    return_lse: bool = False,
    return_mass: bool = False,
    mass_per: str = "query",
    implementation: str | None = None,
) -> Array | DecodeOut:
    """Attention of 1 to 16 new tokens a row over everything stored, their own keys and values included.

    Stored tokens of (row, KV head) are slots 0 .. length-1, then the residual window's valid entries. What
    slots from the length on hold is ignored, NaN included; those below it must be finite, also where their
    position is -1. A query sees a stored token if

      - its position is >= 0 (given `positions`), and
      - position <= the query's position (given `q_positions`), and position > the query's - window, and
      - for the newest `new_tokens` stored tokens, given `mask`: mask[row, token, i] instead of the order of
        positions, i counting them from the oldest.

    Args:
      q: [batch, q_heads, tokens, head_dim]; query head h reads KV head h // (q_heads / kv_heads).
      kv: keys and values, any format. Ragged layout: pools, with `table`.
      lengths: int32 [batch, kv_heads], valid slots, residual window not counted; 0 gives output 0.
      positions: int32 [batch, kv_heads, slots + residual], -1 where empty. None: the n-th stored token of a
        (row, head) has position n.
      q_positions: int32 [batch, tokens], -1 for padding. Needed for `window` and for more than one token
        unless `mask` is given; None: every stored token is visible.
      mask: bool [batch, tokens, new_tokens], which of the newest stored tokens each query sees (draft trees).
      scale: logits = scale * q.k.
      window: a query sees itself and the window - 1 positions before.
      softcap: logits = cap * tanh(logits / cap).
      table: int32 [batch, kv_heads, pages]: slot s lives in page table[b, h, s // page_size] of the pools;
        only entries below the length are read.
      blocks: int32 [batch, kv_heads, n_blocks]: only these blocks of slots are read (block i: slots
        i * block_size ...), each at most once, -1 pads at the end. The residual window is always read.
      block_size: slots per block; with `table`, a multiple or a divisor of the page size.
      blocks_ascend: `blocks` is in ascending order, which saves the Hopper kernel a sort where blocks are small.
      return_lse: also return the log-sum-exp, and `out` in float32, to be merged with other parts.
      return_mass: also return the probability of every slot, summed over the tokens; 0 in blocks not read.
      mass_per: "query" for one row of mass per query head, "kv_head" for their sum over each group, which is
        cheaper: one row per KV head leaves the device's memory.
      implementation: "xla", "mosaic_gpu", "mosaic_tpu", or None for the best here.

    Returns: `out` in q's dtype, or a `DecodeOut` if lse or mass is asked for.

    Raises:
      ValueError: shapes, dtypes, formats or layouts that do not fit, or an `implementation` that cannot run.
      checkify.JaxRuntimeError: under `checkify.checkify`, lengths, pages or blocks out of range or order.
    """
    _validate(q, kv, lengths, positions, q_positions, mask, window, table, blocks, block_size)
    check_scale(_OP, scale, softcap)
    if mass_per not in ("query", "kv_head"):
        raise ValueError(f"{_OP}: mass_per={mass_per!r}; 'query' and 'kv_head' are supported")
    args = dict(
        lengths=lengths, positions=positions, q_positions=q_positions, mask=mask, scale=float(scale),
        window=window, softcap=softcap, table=table, blocks=blocks, block_size=block_size,
        return_mass=return_mass,
    )  # fmt: skip
    _debug_checks(kv, lengths, table, blocks, block_size, blocks_ascend)
    layout = dict(table=table, blocks=blocks, block_size=block_size)
    reasons = {
        "mosaic_gpu": require_hopper()
        or gpu_limits.unsupported(
            q,
            kv,
            lengths=lengths,
            positions=positions,
            mask=mask,
            **layout,
            order=q_positions is not None or return_mass,
        ),
        "mosaic_tpu": require_platform("tpu") or tpu.unsupported(q, kv, **layout),
        "xla": None,
    }
    chosen = choose_implementation(_OP, implementation, reasons, tuple(reasons))
    implementations: dict[str, Callable] = {
        "xla": decode_attention_xla,
        "mosaic_gpu": functools.partial(
            gpu.decode_attention_gpu, mass_per=mass_per, blocks_ascend=blocks_ascend
        ),
        "mosaic_tpu": tpu.decode_attention_tpu,
    }
    with jax.named_scope(_OP):
        out, lse, mass = implementations[chosen](q, kv, **args)
        if mass is not None and mass_per == "kv_head" and chosen != "mosaic_gpu":
            mass = mass.reshape(*lengths.shape, -1, mass.shape[-1]).sum(2)
    if not return_lse:
        out = out.astype(q.dtype)
    if not (return_lse or return_mass):
        return out
    return DecodeOut(out, lse if return_lse else None, mass)


def reads_blocks(
    q: Array, kv: KVStore, *, lengths: Array, table: Array | None, blocks: Array, block_size: int
) -> bool:
    """True when a kernel (not XLA) runs here on these operands with a block table; arguments as above."""
    layout = dict(table=table, blocks=blocks, block_size=block_size)
    gpu_reason = require_hopper() or gpu_limits.unsupported(
        q, kv, lengths=lengths, positions=None, mask=None, **layout
    )
    return gpu_reason is None or (require_platform("tpu") or tpu.unsupported(q, kv, **layout)) is None


def _debug_checks(kv, lengths, table, blocks, block_size, blocks_ascend) -> None:
    """Checks of values, which cost nothing unless the caller's function runs under `checkify.checkify`."""
    slots = kv.slots * (1 if table is None else table.shape[2])
    full = (lengths >= 0) & (lengths <= slots)
    checkify.debug_check(full.all(), f"{_OP}: lengths outside 0 to {slots} slots")
    if table is not None:
        used = jnp.arange(table.shape[2]) * kv.slots < lengths[..., None]
        known = (table >= 0) & (table < kv.k.shape[0])
        checkify.debug_check(
            (known | ~used).all(), f"{_OP}: table names pages outside the pool's {kv.k.shape[0]}"
        )
    if blocks is not None:
        known = (blocks >= -1) & (blocks < slots // block_size)
        checkify.debug_check(known.all(), f"{_OP}: blocks outside the {slots // block_size} of a row")
        if blocks_ascend:
            order = (blocks[..., 1:] > blocks[..., :-1]) | (blocks[..., 1:] < 0)
            checkify.debug_check(order.all(), f"{_OP}: blocks do not ascend")


def _validate(q, kv, lengths, positions, q_positions, mask, window, table, blocks, block_size) -> None:
    """One line for whatever does not fit."""
    if q.ndim != 4:
        raise ValueError(f"{_OP}: q has shape {q.shape}, expected [batch, q_heads, tokens, head_dim]")
    batch, q_heads, tokens, dim = q.shape
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(
            f"{_OP}: {tokens} query tokens; 1 to {MAX_TOKENS} are supported, more is prefill_attention"
        )
    check_dtype(_OP, "q", q.dtype, ("bfloat16", "float16", "float32"))
    check_shape(_OP, "lengths", lengths.shape, (batch, None))
    check_dtype(_OP, "lengths", lengths.dtype, ("int32",))
    kv_heads = lengths.shape[1]
    if q_heads % kv_heads:
        raise ValueError(f"{_OP}: {q_heads} query heads are not a multiple of {kv_heads} KV heads")
    if kv.format not in FORMATS:
        raise ValueError(f"{_OP}: unknown format {kv.format!r}; choose one of {list(FORMATS)}")
    lead = (batch, kv_heads) if table is None else (None,)
    check_shape(_OP, "kv.k", kv.k.shape, (*lead, None, dim))
    check_shape(_OP, "kv.v", kv.v.shape, kv.k.shape)
    slots = kv.slots
    _validate_format(kv, lead, slots, dim)
    if (kv.k_res is None) != (kv.res_lengths is None) or (kv.k_res is None) != (kv.v_res is None):
        raise ValueError(f"{_OP}: the residual window needs k_res, v_res and res_lengths together")
    if kv.k_res is not None:
        check_shape(_OP, "kv.k_res", kv.k_res.shape, (batch, kv_heads, None, dim))
        check_shape(_OP, "kv.v_res", kv.v_res.shape, kv.k_res.shape)
        check_shape(_OP, "kv.res_lengths", kv.res_lengths.shape, (batch, kv_heads))
    if table is not None:
        check_shape(_OP, "table", table.shape, (batch, kv_heads, None))
        check_dtype(_OP, "table", table.dtype, ("int32",))
        slots *= table.shape[2]
    if positions is not None:
        check_shape(_OP, "positions", positions.shape, (batch, kv_heads, slots + kv.residual))
        check_dtype(_OP, "positions", positions.dtype, ("int32",))
    if q_positions is not None:
        check_shape(_OP, "q_positions", q_positions.shape, (batch, tokens))
        check_dtype(_OP, "q_positions", q_positions.dtype, ("int32",))
    if mask is not None:
        check_shape(_OP, "mask", mask.shape, (batch, tokens, None))
        check_dtype(_OP, "mask", mask.dtype, ("bool",))
    if window is not None and (q_positions is None or window < 1):
        raise ValueError(f"{_OP}: window={window} must be at least 1 and needs q_positions")
    if tokens > 1 and q_positions is None and mask is None:
        raise ValueError(f"{_OP}: {tokens} query tokens need q_positions (causal order) or mask")
    if (blocks is None) != (block_size is None):
        raise ValueError(f"{_OP}: blocks and block_size go together")
    if blocks is not None:
        check_shape(_OP, "blocks", blocks.shape, (batch, kv_heads, None))
        check_dtype(_OP, "blocks", blocks.dtype, ("int32",))
        least = max(pack_block(kv.format), kv.group if kv.format in PACKED_BITS else 1)
        if block_size < 1 or slots % block_size or block_size % least:
            raise ValueError(
                f"{_OP}: block_size={block_size} must divide {slots} slots and be a multiple of {least}"
            )
        if table is not None and block_size % kv.slots and kv.slots % block_size:
            raise ValueError(
                f"{_OP}: block_size={block_size} and page_size={kv.slots} must divide one another"
            )


def _validate_format(kv: KVStore, lead: tuple[int | None, ...], slots: int, dim: int) -> None:
    """Dtypes and scale shapes of the format."""
    if kv.format == DENSE:
        check_dtype(_OP, "kv.k", kv.k.dtype, ("bfloat16", "float16", "float32"))
        check_dtype(_OP, "kv.v", kv.v.dtype, (kv.k.dtype.name,))
        return
    code = jnp.dtype(EIGHT_BIT.get(kv.format, jnp.uint8)).name
    check_dtype(_OP, "kv.k", kv.k.dtype, (code,))
    check_dtype(_OP, "kv.v", kv.v.dtype, (code,))
    if kv.format in EIGHT_BIT:
        wanted = {"k_scale": (slots,), "v_scale": (slots,)}
    else:
        if slots % pack_block(kv.format) or slots % kv.group or dim % kv.group:
            raise ValueError(
                f"{_OP}: {kv.format} with group={kv.group} needs slots (page size) in multiples of "
                f"{pack_block(kv.format)} and of the group, and head_dim in groups; got {slots} and {dim}"
            )
        keys, values = (slots // kv.group, dim), (dim // kv.group, slots)
        wanted = {"k_scale": keys, "k_zero": keys, "v_scale": values, "v_zero": values}
    for name, tail in wanted.items():
        field = getattr(kv, name)
        if field is None:
            raise ValueError(f"{_OP}: format {kv.format!r} needs {name}")
        check_shape(_OP, f"kv.{name}", field.shape, (*lead, *tail))
        check_dtype(_OP, f"kv.{name}", field.dtype, ("float32", "bfloat16", "float16"))
