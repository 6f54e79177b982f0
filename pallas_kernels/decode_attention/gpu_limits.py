"""Which shapes the Hopper decode kernel covers, and how it is cut for a shape."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.gpu_blocks import are_pages
from pallas_kernels.formats import DENSE, EIGHT_BIT, PACKED_BITS, KVStore

Array = jax.Array
_SMS = 132  # of an H100 or H200; only the choice of splits depends on it
_MAX_COLUMNS = 64  # queries per KV head: more would spill registers
_MAX_PACKED = {128: {32: 16, 64: 16, 128: 32}, 256: {32: 2, 64: 4, 128: 8}}  # the same by head_dim and group
_MAX_TREE = 32


def unsupported(
    q: Array, store: KVStore, *, lengths, positions, mask, table, blocks, block_size, order: bool = False
) -> str | None:
    """Why the kernel cannot run on these operands, or None if it can.

    order: the order of slots matters, or their mass is asked for.
    """
    _, q_heads, tokens, dim = q.shape
    columns = q_heads // lengths.shape[1] * tokens
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype.name}; bfloat16 and float16 are supported"
    if store.format == DENSE and store.k.dtype != q.dtype:
        return f"k is {store.k.dtype.name} and q {q.dtype.name}; they must be equal"
    dims = (64, 128, 192, 256) if store.format == DENSE else (128, 256)
    if dim not in dims:
        return f"head_dim={dim}; format {store.format!r} supports {dims}"
    if store.format in PACKED_BITS and store.group not in _MAX_PACKED[dim]:
        return f"group={store.group}; {tuple(_MAX_PACKED[dim])} are supported"
    most = _MAX_PACKED[dim][store.group] if store.format in PACKED_BITS else _MAX_COLUMNS
    if columns > most:
        return f"{columns} queries per KV head (group x tokens); at most {most} are supported"
    if mask is not None and mask.shape[2] > _MAX_TREE:
        return f"a mask over {mask.shape[2]} new tokens; at most {_MAX_TREE} are supported"
    least = least_block(store)
    slots = store.slots if table is None else store.slots * table.shape[2]
    if table is not None and store.slots % least and (store.format != DENSE or least % store.slots):
        return f"page_size={store.slots}; format {store.format!r} needs multiples of {least}"
    if table is not None and store.format == DENSE and store.slots % 8:
        return f"page_size={store.slots}; multiples of 8 are supported"
    if table is None and lengths.size * slots < least:
        return f"{slots} slots; too few to fill one step of {least}"
    if positions is not None and slots % 4:
        return f"positions of {slots} slots; multiples of 4 are supported"
    if table is None and slots % 8:
        return f"{slots} slots; multiples of 8 are supported, since heads start at tiles of 8 rows"
    if store.format != DENSE and table is None and slots % least:
        return f"{slots} slots; format {store.format!r} needs multiples of {least}"
    if blocks is not None and block_size % least:
        if not are_pages(store, table, block_size):
            return f"block_size={block_size}; format {store.format!r} needs multiples of {least}"
        if order or positions is not None or mask is not None:
            return (
                f"block_size={block_size} with positions, a mask or the mass; it needs multiples of {least}"
            )
    if table is not None and blocks is not None and store.slots % least:
        return f"a block table with page_size={store.slots}; it needs multiples of {least}"
    return None


def least_block(store: KVStore) -> int:
    """Slots per step."""
    return 128 if store.format == "int2" else 64


def preferred_block(store: KVStore, unit: int, columns: int) -> int:
    """Slots per step: 8 bits take 128 where pages, blocks and registers allow."""
    wide = store.format in EIGHT_BIT and unit % 128 == 0 and columns <= 16 and store.head_dim == 128
    return 128 if wide else least_block(store)


def choose_splits(rows: int, slots: int, block: int, resident: int) -> int:
    """Parts to cut every row's slots into, so that the GPU is full and a part is not too short.

    Args:
      rows: (sequence, KV head) pairs.
      slots: slots of a row.
      block: slots per step.
      resident: CTAs that fit on one multiprocessor.
    """
    places = resident * _SMS
    most = max(1, slots // (4 * block))
    if resident == 3:  # two rounds: with one, rows rarely divide the places
        return min(max(1, 2 * places // rows), most)
    wanted = 2 ** max(0, round(math.log2(places / rows)))
    return min(wanted, 2 ** int(math.log2(most)))


def resident_ctas(fmt: str, group: int) -> int:
    """CTAs that fit on one multiprocessor, by registers and shared memory."""
    return {"int4": 4, "int2": 4 if group >= 64 else 3}.get(fmt, 2)


def choose_stages(fmt: str, dim: int, block: int, group: int) -> int:
    """Steps in flight: enough bytes to cover the latency of memory, few enough for several CTAs.

    Packed formats need 3 at least: the next step's key scales are awaited one step early.
    """
    if fmt in PACKED_BITS:
        return 4 if dim == 128 and fmt == "int4" and group >= 64 else 3
    row = 2 * dim * (2 if fmt == "half" else 1)
    return max(2, min(6, 65_536 // (row * block) + 1))


def choose_parts(fmt: str, dim: int, group: int) -> tuple[int, int]:
    """64-channel parts of K and 16-slot parts of V in registers at a time: fewer where another CTA then fits."""
    if dim == 128:
        return (1, 4) if fmt == "int2" or (fmt == "int4" and group < 64) else (2, 8)
    return dim // 64, 4
