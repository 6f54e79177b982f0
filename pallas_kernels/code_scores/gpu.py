"""Scores of product codes on Hopper: one pass over the codes, tables in shared memory.

A thread scores two neighbouring slots at a time. Table entries are 16-bit fixed point, in steps of 1/65,535 of the range
that a query's logits can have, so that a sum over parts is an integer addition of two queries at once and cannot
overflow; four queries lie side by side. 16 codewords of four queries are 128 bytes, one for each bank: a lookup has no bank
conflicts, and shared memory delivers 8 bytes for each slot and part, which is what bounds the kernel. Warpgroups work
alone, each with tables of its own; a CTA has many so that the compiler gives a thread few registers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels import ptx
from pallas_kernels.inline import inline
from pallas_kernels.ptx import Reg, f32, i32

Array = jax.Array

LOG2E = math.log2(math.e)
_THREADS, _WARPS = 128, 4
_STEP = 2 * _THREADS  # slots of a step
_TOP = 65535  # of 16 bits
_SHIFT = 2.0**23  # a float whose low mantissa bits count ones
_ALIGN = 256  # of the tables in shared memory: a row's offset fills the low byte of its address
_GROUPS = 8  # warpgroups of a CTA: with 1,024 threads the compiler keeps to 64 registers a thread
_TABLES = 192 * 1024  # bytes of shared memory
_ITEMS = 132 * _GROUPS  # warpgroups of one wave


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static numbers of a call."""

    bits: int
    parts: int
    group: int
    slots: int
    block: int
    ahead: int  # steps whose codes are on their way

    @property
    def width(self) -> int:
        """Words (of two queries each) of one lookup."""
        return 1 if self.group <= 2 else 2

    @property
    def lookups(self) -> int:
        """Lookups for each slot and part."""
        return -(-self.group // (2 * self.width))

    @property
    def words(self) -> int:
        """Words that hold the group."""
        return self.width * self.lookups

    @property
    def part_bytes(self) -> int:
        """Bytes of one part's table for one lookup."""
        return 2**self.bits * self.width * 4

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables of a KV head."""
        return self.lookups * self.parts * self.part_bytes

    @property
    def table_stride(self) -> int:
        """Bytes from one warpgroup's tables to the next."""
        return -(-self.table_bytes // _ALIGN) * _ALIGN

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot's codes."""
        return self.parts * self.bits // 8

    @property
    def chunk(self) -> int:
        """Bytes of one load of codes: the alignment of two slots, at most 16."""
        return math.gcd(2 * self.slot_bytes, 16)


def unsupported(tables: Array, codes: Array, *, bits: int, block: int) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    (group, parts), slots = tables.shape[2:4], codes.shape[2]
    if bits not in (4, 8):
        return f"bits={bits} (4 and 8 are supported)"
    if not 1 <= group <= 8:
        return f"groups of {group} (1 to 8 queries are supported)"
    if block > 64 or block & (block - 1):
        return f"block={block} (powers of two up to 64 are supported)"
    if slots == 0 or slots % 2:
        return f"{slots} slots (an even number is supported)"
    plan = Plan(bits, parts, group, slots, block, ahead=1)
    if plan.table_bytes > 96 * 1024:
        return f"{plan.table_bytes} bytes of tables (96 KiB fit)"
    if slots * max(plan.slot_bytes, 4 * group) >= 2**31:
        return f"{slots} slots do not fit 32-bit offsets"
    return None


def fixed_point(tables: Array, rows: int, words: int) -> tuple[Array, Array, Array]:
    """Tables as the kernel reads them: (levels uint32 [..., parts, rows, words], step f32 [..., group], base).

    tables: f32 [..., group, parts, codewords]. An entry is low(part) + step * level, rounded to the nearest level, and base
    the sum of low over the parts; the levels of any codes sum to at most 65,535. A logit is off by parts / 2 steps
    at most, sqrt(parts / 12) steps in the mean square. Query 2 i is the low half of word i.
    """
    *lead, group, parts, count = tables.shape
    low = tables.min(-1, keepdims=True)
    span = (tables.max(-1, keepdims=True) - low).sum((-2, -1))
    step = jnp.maximum(span, 1e-30) / (_TOP - parts / 2)
    levels = jnp.round((tables - low) / step[..., None, None]).astype(jnp.uint32)
    none = [(0, 0)] * len(lead)
    levels = jnp.pad(levels, [*none, (0, 2 * words - group), (0, 0), (0, rows - count)])
    levels = jnp.moveaxis(levels, -3, -1)
    return levels[..., 0::2] | (levels[..., 1::2] << 16), step, low.sum((-2, -1))


def code_scores_gpu(
    tables: Array,
    codes: Array,
    lengths: Array,
    *,
    bits: int,
    block: int,
    ahead: int | None = None,
    splits: int | None = None,
) -> tuple[Array, Array]:
    """See `ops.code_scores`; operands as accepted by `unsupported`.

    ahead: steps whose codes are on their way while one is scored; None: 2, or 1 where their registers are needed. splits:
    warpgroups of a row and KV head; None fills the GPU.
    """
    batch, kv_heads, group, parts, _ = tables.shape
    rows, slots = batch * kv_heads, codes.shape[2]
    ahead = ahead or (2 if codes.shape[3] <= 16 else 1)
    plan = Plan(bits, parts, group, slots, block, ahead)
    with jax.named_scope("code_scores_gpu"):
        levels, step, base = fixed_point(tables, 2**bits, plan.words)
        levels = levels.reshape(rows, parts, 2**bits, plan.lookups, plan.width)
        levels = lax.bitcast_convert_type(jnp.moveaxis(levels, 3, 1), jnp.int32).reshape(rows, -1)
        steps = -(-slots // _STEP)
        splits = max(1, min(steps, splits or _ITEMS // rows))
        call = _kernel(plan, rows, steps, splits)
        best, lse = call(
            levels,
            codes.reshape(rows, -1),
            step.reshape(rows, group),
            base.reshape(rows, group),
            jnp.clip(lengths, 0, slots).reshape(rows),
        )
        lse = jax.nn.logsumexp(lse, axis=2)
        return best.reshape(batch, kv_heads, group, -1), lse.reshape(batch, kv_heads, group)


def _kernel(plan: Plan, rows: int, steps: int, splits: int):
    """The kernel: (levels, codes, step, base, lengths) -> (best [rows, group, blocks], lse [rows, group, splits * 4])."""

    total = rows * splits
    groups = max(1, min(_GROUPS, total, _TABLES // plan.table_stride))

    def body(levels, codes, step, base, lengths, best, lse, table):
        group = lax.axis_index("group")
        item = lax.axis_index("cta") * groups + group
        row, split = lax.div(item, splits), lax.rem(item, splits)

        @pl.when(item < total)
        def _():
            start, end = (lax.div(s * steps, splits) for s in (split, split + 1))
            inline(_scan(plan, splits * _WARPS), levels.at[row], codes.at[row], step.at[row], base.at[row], best.at[row],
                   lse.at[row], table, lengths[row], start, end, split, group)  # fmt: skip

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((rows, plan.group, plan.slots // plan.block), jnp.float32),
            jax.ShapeDtypeStruct((rows, plan.group, splits * _WARPS), jnp.float32),
        ],
        scratch_types=dict(table=plgpu.SMEM(((groups * plan.table_stride + _ALIGN) // 4,), jnp.int32)),
        grid=(-(-total // groups),),
        grid_names=("cta",),
        num_threads=groups,
        thread_name="group",
        kernel_name="code_scores",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=True,
            reduction_scratch_bytes=0,
        ),
    )


def _scan(plan: Plan, parts: int):
    """Inline function: a warpgroup's steps [start, end) of one row; writes block maxima, and each of `parts` warps' log-sum-exps."""
    queries = range(plan.group)

    def body(ctx, levels, codes, steps, bases, best, lse, table, length, start, end, split, group):
        thread = ptx.thread_index()
        lane = thread & 31
        length, start, end = map(ptx.scalar, (length, start, end))
        base = ((ptx.smem_address(table) + (_ALIGN - 1)) & -_ALIGN) + ptx.scalar(group) * plan.table_stride
        source, last = ptx.global_address(codes), plan.slots // 2 - 1
        target = ptx.global_address(best)

        def fetch(step: Reg) -> list[Reg]:
            pair = step * _THREADS + thread
            pair = ptx.select(pair > last, i32(last), pair)
            return _load_codes(plan, source + ptx.wide(pair * (2 * plan.slot_bytes)))

        held = [word for i in range(plan.ahead) for word in fetch(start + i)]
        _copy(ptx.global_address(levels), base, plan.table_bytes, thread)
        scale, origin = (
            [ptx.bits_to_float(ptx.load(at + 4 * g)[0]) for g in queries]
            for at in (ptx.global_address(steps), ptx.global_address(bases))
        )
        ptx.asm("bar.sync $0, 128;", "", [ptx.scalar(group) + 1])  # this warpgroup's own

        def one(step: Reg, carry: list[Reg], masked: bool) -> list[Reg]:
            codes, tops, sums = (
                carry[: -2 * plan.group],
                carry[-2 * plan.group : -plan.group],
                carry[-plan.group :],
            )
            size = len(codes) // plan.ahead
            held = [codes[i : i + size] for i in range(0, len(codes), size)] + [fetch(step + plan.ahead)]
            slot = (step * _THREADS + thread) * 2
            pair = [_look_up(plan, held[0], which, base) for which in (0, 1)]
            stored = [slot + which < length for which in (0, 1)] if masked else [None, None]
            for g in queries:
                at = [_as_float(words[g // 2], g % 2) for words in pair]
                at = [x if bit is None else ptx.select(bit, x, -math.inf) for x, bit in zip(at, stored)]
                top = ptx.maximum(ptx.maximum(tops[g], at[0]), at[1])
                old, *new = (ptx.ex2((x - top) * (scale[g] * LOG2E)) for x in (tops[g], *at))
                tops[g], sums[g] = top, ptx.fma(sums[g], old, new[0]) + new[1]
            if masked:
                pair = [[ptx.select(bit, w, 0) for w in words] for words, bit in zip(pair, stored)]
            _write_best(plan, pair, slot, lane, length if masked else None, scale, origin, target)
            return [*itertools.chain(*held[1:]), *tops, *sums]

        full = _least(end, length // _STEP)
        some = _least(end, (length + (_STEP - 1)) // _STEP)
        carry = [*held, *[f32(_SHIFT)] * plan.group, *[f32(0.0)] * plan.group]
        carry = _loop(start, full, carry, lambda i, c: one(i, c, False))
        carry = _loop(_most(start, full), some, carry, lambda i, c: one(i, c, True))

        def clear(step: Reg, carry: list[Reg]) -> list[Reg]:
            zeros = [[i32(0)] * plan.words] * 2
            slot = (step * _THREADS + thread) * 2
            _write_best(plan, zeros, slot, lane, length, scale, origin, target)
            return carry

        _loop(_most(start, some), end, [], clear)
        tops, sums = carry[-2 * plan.group : -plan.group], carry[-plan.group :]
        to = ptx.global_address(lse)
        warp = ptx.scalar(split) * _WARPS + (thread >> 5)
        for g in queries:
            top, total = tops[g], sums[g]
            for lanes in (1, 2, 4, 8, 16):
                other, more = ptx.shuffle_xor(top, lanes), ptx.shuffle_xor(total, lanes)
                new = ptx.maximum(top, other)
                mine, theirs = (ptx.ex2((x - new) * (scale[g] * LOG2E)) for x in (top, other))
                top, total = new, ptx.fma(total, mine, more * theirs)
            value = ptx.fma(ptx.lg2(total), 1 / LOG2E, ptx.fma(top - _SHIFT, scale[g], origin[g]))
            _store_if(lane.equals(0), to + ptx.wide((warp + parts * g) * 4), [value])

    return body


def _load_codes(plan: Plan, address: Reg) -> list[Reg]:
    """The bytes of two slots: registers of 4 bytes each, or of 2 where a slot has an odd number."""
    count, size = 2 * plan.slot_bytes // plan.chunk, plan.chunk
    if size < 4:
        return [ptx.load(address + i * size, size)[0] for i in range(count)]
    return [word for i in range(count) for word in ptx.load(address + i * size, words=size // 4)]


def _look_up(plan: Plan, held: list[Reg], which: int, base: Reg) -> list[Reg]:
    """Sums of levels of slot `which` of a pair, two queries a register."""
    per, shift = min(4, plan.chunk), 3 if plan.width == 2 else 2  # bytes of a register; log2 of a row's bytes
    total: list[Reg] = []
    spread: dict[tuple[int, int], Reg] = {}
    for part in range(plan.parts):
        byte, half = divmod(part * plan.bits, 8)
        index, place = divmod(which * plan.slot_bytes + byte, per)
        word = held[index]
        if (
            plan.bits == 4
        ):  # the offsets of four codes side by side; a byte of them completes the table's address
            if (index, half) not in spread:
                moved = word << shift if half == 0 else word >> (4 - shift)
                spread[index, half] = moved & (0x0F0F0F0F << shift)
            address = ptx.prmt(spread[index, half], base, 0x7650 | place)
        else:
            moved = word << shift if place == 0 else word >> (8 * place - shift)
            address = (moved & (0xFF << shift)) + base
        got = []
        for i in range(plan.lookups):
            got += _load_row(address, (i * plan.parts + part) * plan.part_bytes, plan.width)
        total = [a + b for a, b in zip(total, got)] if total else got
    return total


def _load_row(address: Reg, offset: int, words: int) -> list[Reg]:
    if words == 1:
        return ptx.asm(f"ld.shared.b32 $0, [$1+{offset}];", "r", [address], effects=True)
    return ptx.asm(f"ld.shared.v2.b32 {{$0, $1}}, [$2+{offset}];", "rr", [address], effects=True)


def _write_best(plan, pair, slot, lane, length, scale, origin, target) -> None:
    """Block maxima of a step, from the levels of each thread's two slots; blocks past `length` (if any) get -inf."""
    blocks, lanes = plan.slots // plan.block, max(1, plan.block // 2)
    shift = plan.block.bit_length() - 1
    if plan.block == 1:
        values = pair
    else:
        levels = [ptx.asm("max.u16x2 $0, $1, $2;", "r", [a, b])[0] for a, b in zip(*pair)]
        for by in (1, 2, 4, 8, 16):
            if by < lanes:
                others = [ptx.shuffle_xor(x, by) for x in levels]
                levels = [ptx.asm("max.u16x2 $0, $1, $2;", "r", [a, b])[0] for a, b in zip(levels, others)]
        values = [levels]
    writes = slot < plan.slots
    if lanes > 1:
        writes = ptx.both(writes, (lane & (lanes - 1)).equals(0))
    to = target + ptx.wide((slot >> shift) * 4)
    for g in range(plan.group):
        out = []
        for i, words in enumerate(values):
            x = ptx.fma(_as_float(words[g // 2], g % 2) - _SHIFT, scale[g], origin[g])
            out.append(x if length is None else ptx.select(slot + i < length, x, -math.inf))
        _store_if(writes, to + 4 * g * blocks, out)


def _as_float(word: Reg, half: int) -> Reg:
    """2**23 plus one half of a word, exactly."""
    return ptx.bits_to_float(ptx.prmt(word, 0x4B000000, 0x7632 if half else 0x7610))


def _store_if(bit: ir.Value, address: Reg, values: list[Reg]) -> None:
    """Store one or two floats to global memory where the bit is set; no branch."""
    flag = ptx.select(bit, i32(1), 0)
    if len(values) == 1:
        move, args = "@p st.global.b32 [$1], $2;", values
    else:
        move, args = "@p st.global.v2.b32 [$1], {$2, $3};", values
    ptx.asm(f"{{ .reg .pred p; setp.ne.b32 p, $0, 0; {move} }}", "", [flag, address, *args])


def _copy(source: Reg, target: Reg, size: int, thread: Reg) -> None:
    """`size` bytes, a multiple of 16, from global to shared memory, by all threads."""
    for start in range(0, size, 16 * _THREADS):

        def move(start=start):
            at = thread * 16 + start
            words = ptx.load(source + ptx.wide(at), words=4)
            ptx.asm("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "", [target + at, *words])
            return []

        ptx.if_(thread * 16 < size - start, move)


def _least(a: Reg, b: Reg) -> Reg:
    return ptx.select(a < b, a, b)


def _most(a: Reg, b: Reg) -> Reg:
    return ptx.select(a < b, b, a)


def _loop(start: Reg, end: Reg, carry: list[Reg], body) -> list[Reg]:
    """`body(i, carry)` for i in [start, end); the registers of the last one."""
    op: Any = scf.ForOp(start.value, end.value, i32(1).value, [r.value for r in carry])
    with ir.InsertionPoint(op.body):
        got = body(
            Reg(op.induction_variable, "r"), [Reg(v, r.kind) for v, r in zip(op.inner_iter_args, carry)]
        )
        scf.yield_([r.value for r in got])
    return [Reg(v, r.kind) for v, r in zip(op.results, carry)]
