"""Blocks by the copy engine of Hopper through Mosaic GPU: a few threads ask for them, and none waits in a load.

XLA's gather of the same blocks fills every SM with threads that wait for the link; kernels beside it find no place, and their
own loads queue behind those. Here one lane of a warp is a *line* that moves its share of the blocks through a ring of
slots in shared memory: bulk copies in (completion counted by a barrier of each slot), bulk copies out.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx, ptx_copy
from pallas_kernels.inline import inline
from pallas_kernels.ptx import Reg

Array = jax.Array

_WARPS, _LANES = 4, 32
_ALIGN = 16  # bytes, of what the copy engine moves
_PIECE = 4096  # bytes of a copy, at most
# 128 copies on their way. On an H200 half as many fetch at 30 GB/s of 45 (a copy of 2 KB takes some 4 us); twice as many
# begin with a burst that holds up every other kernel's memory for 18 us.
_CTAS = 8
_SLOTS = 4


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of a call."""

    blocks: int  # of a row of `far`
    width: int  # blocks of a row of the result
    items: int  # pieces of the whole result
    piece: int  # bytes
    pieces: int  # of a block
    slots: int
    ctas: int

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.piece * self.pieces

    @property
    def lines(self) -> int:
        return self.ctas * _WARPS


def _block_bytes(far: Array, source: Array) -> int:
    return math.prod(far.shape[source.ndim :]) * far.dtype.itemsize


def _piece(size: int) -> int:
    """Bytes of a copy: the largest that divides a block of `size` bytes."""
    return max(p for p in range(_ALIGN, min(size, _PIECE) + 1, _ALIGN) if size % p == 0)


def unsupported(far: Array, source: Array) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    size = _block_bytes(far, source)
    if size % _ALIGN or size == 0:
        return f"blocks of {size} bytes (a multiple of {_ALIGN} is supported)"
    if source.size == 0:
        return "there is nothing to fetch"
    if source.size * (size // _piece(size)) >= 2**31:
        return f"{source.size} blocks of {size} bytes (fewer than 2 ** 31 copies are supported)"
    return None


def fetch_blocks_gpu(
    far: Array, source: Array, *, ctas: int | None = None, slots: int | None = None
) -> Array:
    """See `ops.fetch_blocks`; operands as accepted by `unsupported`. slots: of a line's ring, at least 2."""
    size, axis = _block_bytes(far, source), source.ndim - 1
    piece = _piece(size)
    items = source.size * (size // piece)
    ctas = min(ctas or _CTAS, -(-items // _WARPS))
    plan = _Plan(far.shape[axis], source.shape[axis], items, piece, size // piece, slots or _SLOTS, ctas)
    words = (
        far
        if jnp.issubdtype(far.dtype, jnp.unsignedinteger)
        else lax.bitcast_convert_type(far, f"uint{8 * far.dtype.itemsize}")
    )
    out = jax.ShapeDtypeStruct((*source.shape, *far.shape[axis + 1 :]), words.dtype)
    moved = _kernel(plan, out)(words, source)
    return moved if moved.dtype == far.dtype else lax.bitcast_convert_type(moved, far.dtype)


def _kernel(plan: _Plan, out: jax.ShapeDtypeStruct):
    def body(far, source, out, ring, barriers):
        inline(_lines(plan), far, source, out, ring, barriers, lax.axis_index("cta"))

    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=dict(
            ring=plgpu.SMEM((_WARPS * plan.slots * plan.piece // 4,), jnp.int32),
            barriers=plgpu.SMEM((_WARPS * plan.slots * 2,), jnp.int32),
        ),
        grid=(plan.ctas,),
        grid_names=("cta",),
        kernel_name="fetch_blocks",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
    )


def _lines(plan: _Plan):
    """Inline function (far, source, out, ring, barriers, cta) of all threads of a CTA: the first lane of each warp works."""

    def body(ctx, far, source, out, ring, barriers, cta):
        thread = ptx.thread_index()
        warp = thread >> 5
        line = ptx.scalar(cta) * _WARPS + warp
        first, last = (_share(plan, line + i) for i in (0, 1))
        far, source, out = map(ptx.global_address, (far, source, out))
        ring = ptx.smem_address(ring) + warp * (plan.slots * plan.piece)
        ready = ptx.smem_address(barriers) + warp * (plan.slots * 8)

        def number(item: Reg) -> Reg:
            """The block of an item, or -1: nothing was asked for, or the item is another line's."""
            inside = item < last
            at = ptx.select(inside, item, ptx.i32(0))
            return ptx.select(inside, ptx.load(source + ptx.wide(at // plan.pieces) * 4)[0], -1)

        def ask(item: Reg, block: Reg, slot: Reg) -> list[Reg]:
            """Start the copy of an item into a slot."""
            row, part = item // (plan.width * plan.pieces), item % plan.pieces
            at = (ptx.wide(row) * plan.blocks + ptx.wide(block)) * plan.block + ptx.wide(part * plan.piece)
            ptx_copy.bulk_load(ring + slot * plan.piece, far + at, plan.piece, ready + slot * 8)
            return []

        def work() -> list[Reg]:
            for s in range(plan.slots):
                ptx_copy.barrier_init(ready + 8 * s)
            ptx_copy.fence_barrier_init()
            upcoming = [number(first + s) for s in range(plan.slots)]
            for s, block in enumerate(upcoming):
                ptx.if_(block >= 0, lambda s=s, block=block: ask(first + s, block, ptx.i32(s)))

            def one(item: Reg, carry: list[Reg]) -> list[Reg]:
                slot, phases, *blocks = carry
                again = item + plan.slots  # takes this item's slot
                blocks.append(number(again))

                def store() -> list[Reg]:
                    ptx_copy.barrier_wait(ready + slot * 8, (phases >> slot) & 1)
                    ptx_copy.bulk_store(
                        out + ptx.wide(item) * plan.piece, ring + slot * plan.piece, plan.piece
                    )
                    ptx_copy.bulk_wait()
                    return [phases ^ (ptx.i32(1) << slot)]

                (phases,) = ptx.if_(blocks[0] >= 0, store, [phases])
                ptx.if_(blocks[-1] >= 0, lambda: ask(again, blocks[-1], slot))
                slot = ptx.select(slot.equals(plan.slots - 1), ptx.i32(0), slot + 1)
                return [slot, phases, *blocks[1:]]

            ptx.for_(first, last, ptx.i32(1), one, [ptx.i32(0), ptx.i32(0), *upcoming])
            return []

        ptx.if_((thread & (_LANES - 1)).equals(0), work)

    return body


def _share(plan: _Plan, line: Reg) -> Reg:
    """First item of a line."""
    each, rest = divmod(plan.items, plan.lines)
    return line * each + ptx.select(line < rest, line, rest)
