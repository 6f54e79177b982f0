"""What the TPU decode kernel fetches: arrays as pools, units per step, and which slots each token sees."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention.visibility import visible_slots
from pallas_kernels.formats import PACKED_BITS, KVStore, pack_block

Array = jax.Array

_TARGET = 1024  # slots a step in the Dense layout: a grid step costs some 0.3 us, as long as reading 256 KiB
_PAGED_TARGET = 512  # slots a step through a schedule, at most ...
_MAX_CHUNKS = 16  # ... this many separate fetches per array
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Fetch:
    """One stored array as the kernel reads it."""

    name: str
    array: Array  # [pages, ..., ...], or [all units, ...] if `whole`
    block: tuple[int, int]  # what one unit takes of the last two axes
    axis: int  # axis of the slots: 1 or 2
    whole: bool  # the leading axis counts units, not pages

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return math.prod(self.block) * self.array.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Everything one launch needs besides q. `heads` counts (row, KV head) pairs."""

    fetches: tuple[Fetch, ...]
    unit: int  # slots per fetch
    chunks: int  # fetches of each array per step
    steps: int
    max_units: int  # units per (row, head) in `units`
    units_per_page: int
    starts: Array  # int32 [heads], first unit to read
    counts: Array  # int32 [heads], end of the units to read
    bounds: Array  # int32 [heads * tokens * 2]: slots each token sees, [low, high); unused with `bits`
    units: Array | None  # int32 [heads, max_units]: pool unit of each logical unit; None: consecutive (Dense)
    bits: Array | None  # int32 [heads, 1, steps * chunks * unit] in the order read: bit t: token t sees it
    slots: Array | None  # int32 [batch, kv_heads, n]: slot of each entry read; None: entry i is slot i
    total_slots: int
    residual_seen: Array | None  # bool [batch, kv_heads, tokens, residual]
    tokens: int
    first_head: int = 0

    def rows(self, cut: slice) -> Schedule:
        """The same for a range of (row, head) pairs."""
        heads = self.starts.shape[0]
        start, stop, _ = cut.indices(heads)
        if (start, stop) == (0, heads):
            return self
        bounds = self.bounds.reshape(heads, -1)[cut].reshape(-1)
        take = lambda x: None if x is None else x[cut]  # noqa: E731
        return dataclasses.replace(
            self, starts=self.starts[cut], counts=self.counts[cut], bounds=bounds, units=take(self.units),
            bits=take(self.bits), first_head=self.first_head + start,
        )  # fmt: skip

    def to_slots(self, values: Array) -> Array:
        """Columns in the order read -> columns by slot: [batch, q_heads, total_slots]; others are 0."""
        if self.slots is None:
            return values[..., : self.total_slots]
        batch, q_heads = values.shape[:2]
        kv_heads, n = self.slots.shape[1:]
        target = jnp.where(self.slots < 0, self.total_slots, self.slots)
        target = jnp.repeat(target, q_heads // kv_heads, axis=1)
        b, h = jnp.arange(batch)[:, None, None], jnp.arange(q_heads)[None, :, None]
        out = jnp.zeros((batch, q_heads, self.total_slots), values.dtype)
        return out.at[b, h, target].add(values[..., :n], mode="drop")

    def cost(self, q: Array, keep_logits: bool) -> pl.CostEstimate:
        """Work if every unit is live: what the index maps fetch and write, and the two products."""
        heads, rows, dim = q.shape
        read = self.steps * self.chunks
        if self.max_units:
            read = min(read, self.max_units)
        n = read * self.unit
        stored = heads * read * sum(f.unit_bytes for f in self.fetches)
        edge = heads * rows * (dim * q.dtype.itemsize + dim * 4 + _LANES * 4)
        padded = heads * self.steps * self.chunks * self.unit * 4
        extra = (0 if self.bits is None else padded) + (padded * rows if keep_logits else 0)
        return pl.CostEstimate(
            flops=4 * heads * rows * n * dim,
            bytes_accessed=stored + edge + extra,
            transcendentals=heads * rows * n,
        )


def make_schedule(
    store: KVStore,
    tokens: int,
    *,
    lengths,
    positions,
    q_positions,
    mask,
    window,
    table,
    blocks,
    block_size,
    return_mass: bool,
) -> Schedule:
    """See `ops.decode_attention` for the arguments. With `return_mass` no slot before a window is skipped."""
    batch, kv_heads = lengths.shape
    heads = batch * kv_heads
    page = store.slots
    total = page if table is None else page * table.shape[2]
    unit, chunks = _sizes(store, page, table is not None, blocks is not None, block_size)
    units_per_page = -(-page // unit)
    available = -(-total // unit) if blocks is None else blocks.shape[2] * (block_size // unit)
    stored = lengths if store.res_lengths is None else lengths + store.res_lengths

    simple = positions is None and mask is None and blocks is None
    needed = available
    low, high = _bounds(lengths, q_positions, window, tokens)
    starts = jnp.zeros((heads,), jnp.int32)
    if simple:
        counts = -(-high.max(-1).reshape(heads) // unit)
        if window is not None and not return_mass:
            starts = jnp.minimum(low.min(-1).reshape(heads) // unit, counts)
            needed = min(available, (window + tokens - 2) // unit + 2)
    elif blocks is None:
        counts = -(-lengths.reshape(heads) // unit)
    else:
        counts = (blocks >= 0).sum(-1).reshape(heads) * (block_size // unit)
    steps = -(-needed // chunks)

    ids = None
    if blocks is not None:
        ids = blocks[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
        ids = jnp.where((blocks >= 0)[..., None], ids, -1).reshape(batch, kv_heads, -1)
    bits = None if simple else _bits(
        ids, total, lengths, stored, positions, q_positions, mask, window, tokens,
        steps * chunks * unit,
    )  # fmt: skip
    return Schedule(
        fetches=_fetches(store, heads, unit, units_per_page, paged=table is not None),
        unit=unit, chunks=chunks, steps=steps, max_units=available, units_per_page=units_per_page,
        starts=starts.astype(jnp.int32), counts=counts.astype(jnp.int32),
        bounds=jnp.stack([low, high], -1).reshape(-1).astype(jnp.int32),
        units=_units(heads, unit, units_per_page, table, blocks, block_size),
        bits=bits, slots=ids, total_slots=total,
        residual_seen=_residual_seen(store, lengths, stored, positions, q_positions, mask, window, tokens),
        tokens=tokens,
    )  # fmt: skip


def _sizes(store: KVStore, page: int, paged: bool, blocked: bool, block_size: int | None) -> tuple[int, int]:
    """(slots per fetch, fetches of each array per step)."""
    if not paged and not blocked:
        # Whole tiles of every array: lanes of the scales, 8 rows of group scales, pack blocks.
        rows = math.lcm(_LANES, pack_block(store.format))
        if store.format in PACKED_BITS:
            rows = math.lcm(rows, 8 * store.group)
        return (page, 1) if page <= max(rows, _TARGET) else (max(rows, _TARGET // rows * rows), 1)
    unit = math.gcd(block_size, page) if blocked else page
    chunks = max(1, min(_MAX_CHUNKS, _PAGED_TARGET // unit))
    if blocked and not paged and block_size > _PAGED_TARGET:
        chunks = 1
    # A step's columns of the mask are whole lane tiles.
    while chunks * unit % _LANES:
        chunks += 1
    return unit, chunks


def _fetches(store: KVStore, heads: int, unit: int, units_per_page: int, paged: bool) -> tuple[Fetch, ...]:
    """Every array of the store as a pool of units."""
    page = store.slots
    out = []
    for name, (axis, per) in store.slot_fields().items():
        array = getattr(store, name)
        if array.dtype == jnp.float16:  # scales and zeros: no TPU loads float16, so pass its bits
            array = jax.lax.bitcast_convert_type(array, jnp.int16)
        if not paged:
            array = array.reshape(heads, *array.shape[2:])
        if array.ndim == 2:  # one number per slot: slots along lanes
            array = array[:, None]
            axis = -1
        at = array.ndim + axis
        size = unit // per
        tile = 8 if at == 1 else _LANES
        block = (size, array.shape[2]) if at == 1 else (array.shape[1], size)
        whole = size % tile != 0 and unit != page
        if whole:  # Mosaic slices whole tiles only: make the unit the whole array, one relayout by XLA
            shape = (*array.shape[:at], units_per_page, size, *array.shape[at + 1 :])
            array = jnp.moveaxis(array.reshape(shape), at, 1).reshape(-1, *block)
        out.append(Fetch(name, array, block, at, whole))
    return tuple(out)


def _units(heads, unit, units_per_page, table, blocks, block_size) -> Array | None:
    """Pool unit of every logical unit, int32 [heads, n]; None where Dense slots are read in order."""
    if table is None and blocks is None:
        return None
    if blocks is None:  # a unit is a page
        return jnp.maximum(table, 0).reshape(heads, -1)
    ratio = block_size // unit
    logical = jnp.maximum(blocks, 0)[..., None] * ratio + jnp.arange(ratio, dtype=jnp.int32)
    logical = logical.reshape(heads, -1)
    if table is None:
        return jnp.arange(heads, dtype=jnp.int32)[:, None] * units_per_page + logical
    pages = jnp.take_along_axis(table.reshape(heads, -1), logical // units_per_page, axis=1, mode="clip")
    return jnp.maximum(pages, 0) * units_per_page + logical % units_per_page


def _bounds(lengths, q_positions, window, tokens) -> tuple[Array, Array]:
    """Slots [low, high) each token sees where a slot's index is its position: [batch, kv_heads, tokens]."""
    high = jnp.broadcast_to(lengths[..., None], (*lengths.shape, tokens))
    low = jnp.zeros_like(high)
    if q_positions is not None:
        high = jnp.minimum(high, q_positions[:, None, :] + 1)
        if window is not None:
            low = jnp.broadcast_to(jnp.maximum(q_positions[:, None, :] - window + 1, 0), high.shape)
    return low, jnp.maximum(high, 0)


def _bits(ids, total, lengths, stored, positions, q_positions, mask, window, tokens, width) -> Array:
    """int32 [heads, 1, width]: bit t of an entry: token t sees it."""
    if ids is None:
        ids = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (*lengths.shape, total))
        pos = None if positions is None else positions[..., :total]
    else:
        safe = jnp.clip(ids, 0, total - 1)
        pos = None if positions is None else jnp.take_along_axis(positions, safe, axis=-1)
    valid = (ids >= 0) & (ids < lengths[..., None])
    seen = visible_slots(ids, stored, valid, pos, q_positions, mask, window, tokens)
    weights = jnp.left_shift(jnp.int32(1), jnp.arange(tokens, dtype=jnp.int32))
    bits = (seen * weights[:, None]).sum(2, dtype=jnp.int32)
    bits = bits.reshape(-1, 1, bits.shape[-1])
    return jnp.pad(bits, ((0, 0), (0, 0), (0, width - bits.shape[-1])))


def _residual_seen(store, lengths, stored, positions, q_positions, mask, window, tokens) -> Array | None:
    """bool [batch, kv_heads, tokens, residual], None without a residual window."""
    if not store.residual:
        return None
    place = jnp.arange(store.residual, dtype=jnp.int32)
    ids = place + lengths[..., None]
    pos = None if positions is None else positions[..., -store.residual :]
    valid = jnp.broadcast_to(place < store.res_lengths[..., None], ids.shape)
    return visible_slots(ids, stored, valid, pos, q_positions, mask, window, tokens)
