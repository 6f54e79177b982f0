"""Approximate logits of keys that are stored as product codes, for a choice among them."""

from __future__ import annotations

import jax

from pallas_kernels.code_scores import gpu
from pallas_kernels.code_scores.reference import code_scores_xla
from pallas_kernels.platform import check_dtype, check_shape, choose_implementation, require_hopper

Array = jax.Array


def code_scores(
    tables: Array,
    codes: Array,
    lengths: Array,
    *,
    bits: int,
    block: int = 1,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Largest logit of each block of slots, and the log-sum-exp over all slots, for every query of a group.

    The logit of a slot is the sum of one entry of each part's table. The softmax over all slots of a block's best entry is
    exp(best - lse), so that `best - lse` ranks blocks as it does.

    Args:
      tables: f32 [batch, kv_heads, group, parts, words], logits of every codeword; finite, words at most 2**bits.
      codes: uint8 [batch, kv_heads, slots, parts * bits / 8], neighbours in a byte, the first in the low bits. Codes of
        slots in use are below `words`.
      lengths: int32 [batch, kv_heads], slots in use; the first ones.
      bits: 1, 2, 4 or 8 bits a code.
      block: consecutive slots that share a score; divides the slots.
      implementation: "xla", "mosaic_gpu" (Hopper; 4 and 8 bits; logits in steps of their range / 65,535), or None for
        the best here.

    Returns: best f32 [batch, kv_heads, group, slots / block], -inf where a block is empty, and lse f32 [batch, kv_heads,
      group], -inf where a head is.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an `implementation` that cannot run.
    """
    op = "code_scores"
    if tables.ndim != 5 or codes.ndim != 4:
        raise ValueError(
            f"{op}: tables must be [batch, kv_heads, group, parts, words] and codes [batch, kv_heads, slots, bytes], "
            f"not {tables.shape}, {codes.shape}"
        )
    batch, kv_heads, _, parts, words = tables.shape
    if bits not in (1, 2, 4, 8) or parts * bits % 8 or not 1 <= words <= 2**bits:
        raise ValueError(f"{op}: {parts} codes of {bits} bits with {words} words do not fill whole bytes")
    check_shape(op, "codes", codes.shape, (batch, kv_heads, None, parts * bits // 8))
    check_shape(op, "lengths", lengths.shape, (batch, kv_heads))
    check_dtype(op, "tables", tables.dtype, ("float32",))
    check_dtype(op, "codes", codes.dtype, ("uint8",))
    check_dtype(op, "lengths", lengths.dtype, ("int32",))
    if block < 1 or codes.shape[2] % block:
        raise ValueError(f"{op}: blocks of {block} slots do not divide {codes.shape[2]} slots")
    unsupported = {"mosaic_gpu": _refused(tables, codes, bits, block), "xla": None}
    chosen = choose_implementation(op, implementation, unsupported, ("mosaic_gpu", "xla"))
    run = gpu.code_scores_gpu if chosen == "mosaic_gpu" else code_scores_xla
    return run(tables, codes, lengths, bits=bits, block=block)


def has_kernel(tables: Array, codes: Array, *, bits: int, block: int = 1) -> bool:
    """True when `code_scores` runs a kernel on such operands by default; else XLA may fuse a choice better from logits."""
    return _refused(tables, codes, bits, block) is None


def _refused(tables: Array, codes: Array, bits: int, block: int) -> str | None:
    return require_hopper() or gpu.unsupported(tables, codes, bits=bits, block=block)
