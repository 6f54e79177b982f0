"""Radix selection for Hopper through Mosaic GPU: one CTA a row, which stays in the L2 cache between the passes.

Scores become integers of the same order, and the threshold is found from the top, 11 bits a pass: a pass counts the digits of
the scores that share the threshold's leading bits, and the histogram's running sum from the largest digit names the next
ones. Then every warp counts what it will keep of its part of the row, and in a last pass writes those numbers behind the
parts before it. Nothing is sorted.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.inline import inline
from pallas_kernels.ptx import Reg

Array = jax.Array

_LANES, _WARPGROUP, _MAX_THREADS = 32, 128, 1024
_VECTOR = 4  # scores of a load of 16 bytes
_LOADS = 4  # loads in flight per thread: one byte each of a packed register of counts
_PASSES = ((21, 11), (10, 11), (0, 10))  # lowest bit and bits of every digit of a score, from the top
_BINS = 2048
_NEVER = 0xFF800000  # bits of -inf
_EVERY = 0x7FFFFFFF  # larger than any number


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of a call."""

    size: int  # scores of a row, a multiple of _VECTOR
    width: int
    threads: int
    copies: int  # histograms, shared by the warps in turn: fewer updates meet

    @property
    def vectors(self) -> int:
        return self.size // _VECTOR

    @property
    def warps(self) -> int:
        return self.threads // _LANES

    @property
    def part(self) -> int:
        """Vectors of a warp's part of the row."""
        return -(-self.vectors // (self.warps * _LANES)) * _LANES


def unsupported(scores: Array, width: int) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    if width == 0 or scores.shape[0] * scores.shape[1] == 0:
        return "there is nothing to select"
    if scores.shape[2] > 2**30:
        return f"{scores.shape[2]} scores in a row (up to 2 ** 30 are supported)"
    return None


def default_threads(size: int) -> int:
    """Threads of a CTA: four loads each, at least (64 rows of 8,192 on an H200: 7.4 us, 9.8 with two)."""
    wanted = 2 ** math.ceil(math.log2(max(1, size / (4 * _VECTOR))))
    return min(max(wanted, 2 * _WARPGROUP), _MAX_THREADS)


def select_top_gpu(
    scores: Array,  # f32 [batch, heads, n]
    counts: Array,  # int32 [batch, heads]
    width: int,
    threads: int | None = None,
    copies: int = 4,
) -> Array:
    """See `ops.select_top`; operands as accepted by `unsupported`. threads: a power of two from 128 to 1024."""
    batch, heads, n = scores.shape
    rows, extra = batch * heads, -n % _VECTOR
    if extra:
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, extra)), constant_values=-jnp.inf)
    plan = _Plan(n + extra, width, threads or default_threads(n), copies)
    numbers = _kernel(plan, rows)(scores.reshape(rows, -1), counts.reshape(rows))
    return numbers.reshape(batch, heads, width)


def _kernel(plan: _Plan, rows: int):
    def body(scores, counts, out, histogram, totals, found):
        row = lax.axis_index("row")
        inline(_select(plan), scores.at[row], out.at[row], counts[row], histogram, totals, found)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, plan.width), jnp.int32),
        scratch_types=dict(
            histogram=plgpu.SMEM((plan.copies * _BINS,), jnp.int32),
            totals=plgpu.SMEM((2 * _LANES,), jnp.int32),
            found=plgpu.SMEM((4 * len(_PASSES),), jnp.int32),
        ),
        grid=(rows,),
        grid_names=("row",),
        num_threads=plan.threads // _WARPGROUP,
        thread_name="wg",
        kernel_name="select_top",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
    )


def _select(plan: _Plan):
    """Inline function (scores, out, count, histogram, totals, found) of all threads of a CTA."""

    def body(ctx, scores, out, count, histogram, totals, found):
        row, target = ptx.global_address(scores), ptx.global_address(out)
        shared = tuple(ptx.smem_address(x) for x in (histogram, totals, found))
        count = ptx.scalar(count)
        count = ptx.select(count < 0, ptx.i32(0), count)
        count = ptx.select(count > plan.width, ptx.i32(plan.width), count)
        cut, ties = _threshold(plan, row, count, *shared)
        _write(plan, row, target, cut, ties, shared[1])

    return body


def _threshold(plan: _Plan, row: Reg, count: Reg, histogram: Reg, totals: Reg, found: Reg) -> tuple[Reg, Reg]:
    """(cut, ties): the `count` largest are the keys above `cut` and the first `ties` of those equal to it.

    Where one pass settles it (all keys that share the leading bits are taken, or all keys of the row), the cut lies just
    below them, ties is 0, and the other passes are left out.
    """
    thread = _thread()
    for p in range(len(_PASSES)):
        _store_if(thread.equals(p), found + 16 * p, ptx.i32(-1))
    digit, rest, inside = _digit(plan, 0, row, ptx.i32(0), count, histogram, totals, found)
    none = digit <= 0  # nothing is asked for, or more than there is: scores start at digit 4
    all_or_none = ptx.select(count.equals(0), ptx.i32(-1), ptx.i32(0))
    settled = ptx.either(none, rest.equals(inside))
    cut = ptx.select(none, all_or_none, (digit << _PASSES[0][0]) - 1)
    state = [digit, rest, cut, _flag(settled)]
    for p in (1, 2):
        shift, bits = _PASSES[p]
        prefix, rest, _, done = state

        def narrow(p=p, prefix=prefix, rest=rest, shift=shift, bits=bits):
            digit, rest, inside = _digit(plan, p, row, prefix, rest, histogram, totals, found)
            prefix = (prefix << bits) | digit
            return [prefix, rest, (prefix << shift) - 1, _flag(rest.equals(inside))]

        state = ptx.if_(done.equals(0), narrow, state)
    prefix, rest, cut, done = state
    exact = done.equals(0)
    return ptx.select(exact, prefix, cut), ptx.select(exact, rest, 0)


def _digit(
    plan: _Plan, p: int, row: Reg, prefix: Reg, rest: Reg, histogram: Reg, totals: Reg, found: Reg
) -> tuple[Reg, Reg, Reg]:
    """(digit of the `rest`-th largest key among those that start with `prefix`, how many of that digit are needed, how many
    there are).

    The first pass counts all keys, so that its digit is 0 where too few of them may be taken; it is -1 where `rest` is 0.
    """
    shift, bits = _PASSES[p]
    thread, bins = _thread(), 1 << bits
    lane, warp = thread & (_LANES - 1), thread >> 5
    for i in range(plan.copies * _BINS // plan.threads):
        ptx.store(histogram + (thread + i * plan.threads) * 4, ptx.i32(0))
    _sync()
    mine = histogram + (warp & (plan.copies - 1)) * (4 * _BINS)

    def count(i, _):
        vector = thread + i * (_LOADS * plan.threads)
        loads = [_load(row, vector + u * plan.threads, ptx.i32(plan.vectors)) for u in range(_LOADS)]
        for key in (_key(x) for words in loads for x in words):
            place = mine + ((key >> shift) & (bins - 1)) * 4
            _add_one(place, None if p == 0 else (key >> (shift + bits)).equals(prefix))
        return []

    steps = -(-plan.vectors // (_LOADS * plan.threads))
    ptx.for_(ptx.i32(0), ptx.i32(steps), ptx.i32(1), count)
    _sync()
    each = bins // plan.threads  # of a thread, the largest digits being those of the first threads
    digits = [(thread * each + j) ^ (bins - 1) for j in range(each)]
    sizes = [sum((ptx.load(histogram + d * 4 + c * 4 * _BINS)[0] for c in range(plan.copies)), ptx.i32(0))
             for d in digits]  # fmt: skip
    own = sum(sizes, ptx.i32(0))
    upto = _running_sum(own)
    _store_if(lane.equals(_LANES - 1), totals + warp * 4, upto)
    _sync()
    above = _sum(ptx.select(lane < warp, ptx.load(totals + lane * 4)[0], 0)) + upto - own
    for digit, size in zip(digits, sizes):
        hit = ptx.both(above < rest, rest <= above + size)
        for place, value in enumerate((digit, rest - above, size)):
            _store_if(hit, found + (16 * p + 4 * place), value)
        above = above + size
    _sync()
    digit, rest, inside = (ptx.load(found + (16 * p + 4 * place))[0] for place in range(3))
    return digit, rest, inside


def _write(plan: _Plan, row: Reg, out: Reg, cut: Reg, ties: Reg, totals: Reg) -> None:
    """Write the numbers of keys above `cut` and of the first `ties` equal ones, ascending, and -1 behind them."""
    thread = _thread()
    lane, warp = thread & (_LANES - 1), thread >> 5
    first = warp * plan.part
    end = first + plan.part
    end = ptx.select(end > plan.vectors, ptx.i32(plan.vectors), end)
    steps = -(-plan.part // (_LOADS * _LANES))

    def keys(i):
        """[(number of a vector's first score, its keys)] of a step."""
        at = first + i * (_LOADS * _LANES) + lane
        vectors = [at + u * _LANES for u in range(_LOADS)]
        loads = [_load(row, v, end) for v in vectors]
        return [(v * _VECTOR, [_key(x) for x in words]) for v, words in zip(vectors, loads)]

    def each_step(body, carry):
        return ptx.for_(ptx.i32(0), ptx.i32(steps), ptx.i32(1), lambda i, state: body(keys(i), *state), carry)

    def count(vectors, above, equal):
        for key in (key for _, group in vectors for key in group):
            above = above + _flag(_exceeds(key, cut))
            equal = equal + _flag(key.equals(cut))
        return [above, equal]

    above, equal = (_sum(x) for x in each_step(count, [ptx.i32(0), ptx.i32(0)]))
    _store_if(lane.equals(0), totals + warp * 4, above)
    _store_if(lane.equals(0), totals + (warp + _LANES) * 4, equal)
    _sync()
    of_lane = ptx.load(totals + lane * 4)[0]
    total = _sum(ptx.select(lane < plan.warps, of_lane, 0)) + ties
    above_before = _sum(ptx.select(lane < warp, of_lane, 0))
    equal_before = _sum(ptx.select(lane < warp, ptx.load(totals + (lane + _LANES) * 4)[0], 0))

    def last_tie():
        """One more than the number of the last tie to be taken, which lies in this warp's part."""

        def look(vectors, seen, limit):
            for number, group in vectors:
                bits = [key.equals(cut) for key in group]
                own = sum(map(_flag, bits), ptx.i32(0))
                upto = _running_sum(own)
                rank = seen + upto - own
                for e, bit in enumerate(bits):
                    limit = ptx.select(ptx.both(bit, rank < ties), number + (e + 1), limit)
                    rank = rank + _flag(bit)
                seen = seen + _last(upto)
            return [seen, limit]

        return [_maximum(each_step(look, [equal_before, ptx.i32(0)])[1])]

    # Numbers below the limit may be equal to the cut.
    none, every = equal_before >= ties, equal_before + equal <= ties
    limit = ptx.select(none, ptx.i32(0), _EVERY)
    (limit,) = ptx.if_(_flag(ptx.either(none, every)).equals(0), last_tie, [limit])

    def write(vectors, at):
        taken = []
        for number, group in vectors:
            bound = [cut - _flag(number + e < limit) for e in range(_VECTOR)]
            taken.append([_flag(_exceeds(key, b)) for key, b in zip(group, bound)])
        packed = ptx.i32(0)  # a byte per vector: of 32 lanes together no more than 128
        for u, flags in enumerate(taken):
            packed = packed + (sum(flags, ptx.i32(0)) << 8 * u)
        upto = _running_sum(packed)
        before, total = upto - packed, _last(upto)
        for u, ((number, _), flags) in enumerate(zip(vectors, taken)):
            place = at + ((before >> 8 * u) & 255)
            for e, flag in enumerate(flags):
                _store_if(flag.equals(1), out + ptx.wide(place) * 4, number + e)
                place = place + flag
            at = at + ((total >> 8 * u) & 255)
        return [at]

    each_step(write, [above_before + ptx.select(equal_before < ties, equal_before, ties)])

    def fill(i, _):
        ptx.store(out + ptx.wide(i) * 4, ptx.i32(-1))
        return []

    ptx.for_(total + thread, ptx.i32(plan.width), ptx.i32(plan.threads), fill)


def _thread() -> Reg:
    return ptx.asm("mov.u32 $0, %tid.x;", "r")[0]


def _sync() -> None:
    """Wait for all threads of the CTA; orders their ordinary shared-memory accesses."""
    ptx.asm("bar.sync 0;", "")


def _load(row: Reg, vector: Reg, end: Reg) -> list[Reg]:
    """The bits of four scores; -inf from `end` on."""
    floor = " ".join(f"mov.b32 ${i}, {_NEVER:#x};" for i in range(_VECTOR))
    read = "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];"
    asm = "{ .reg .pred p; setp.ne.b32 p, $5, 0; " + floor + read + " }"
    return ptx.asm(asm, "rrrr", [row + ptx.wide(vector) * 16, _flag(vector < end)], effects=True)


def _key(bits: Reg) -> Reg:
    """A 32-bit integer that orders as the score does, unsigned: 0 for what is never taken, and more for all else."""
    score = ptx.asm("add.rn.f32 $0, $1, 0f00000000;", "f", [ptx.bits_to_float(bits)])[0]  # -0.0 becomes 0.0
    bits = ptx.as_bits(score)
    sign = Reg(arith.shrsi(bits.value, ptx.i32(31).value), "r")
    return ptx.select(score > -math.inf, bits ^ (sign | 0x80000000), 0)


def _exceeds(a: Reg, b: Reg):
    return arith.cmpi(arith.CmpIPredicate.ugt, a.value, b.value)


def _flag(bit) -> Reg:
    """1 where the bit is set, else 0."""
    return Reg(arith.extui(ptx.register_type("r"), bit), "r")


def _store_if(bit, address: Reg, x: Reg) -> None:
    space = "shared" if address.kind == "r" else "global"
    asm = "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st." + space + ".b32 [$1], $2; }"
    ptx.asm(asm, "", [_flag(bit), address, x])


def _add_one(address: Reg, bit=None) -> None:
    """Count in shared memory, where the bit is set; lanes with the same address are added up by the hardware."""
    if bit is None:
        ptx.asm("red.shared.add.u32 [$0], 1;", "", [address])
    else:
        asm = "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p red.shared.add.u32 [$1], 1; }"
        ptx.asm(asm, "", [_flag(bit), address])


def _running_sum(x: Reg) -> Reg:
    """Sum over this lane and those before it in the warp."""
    for d in (1, 2, 4, 8, 16):
        asm = "{ .reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, $1, " + str(d) + ", 0, 0xffffffff; "
        x = ptx.asm(asm + "@!p mov.b32 t, 0; add.u32 $0, $1, t; }", "r", [x], effects=True)[0]
    return x


def _last(x: Reg) -> Reg:
    """The value of the warp's last lane."""
    return ptx.asm("shfl.sync.idx.b32 $0, $1, 31, 0x1f, 0xffffffff;", "r", [x], effects=True)[0]


def _sum(x: Reg) -> Reg:
    """Sum over the warp."""
    return ptx.asm("redux.sync.add.u32 $0, $1, 0xffffffff;", "r", [x], effects=True)[0]


def _maximum(x: Reg) -> Reg:
    """Maximum over the warp, unsigned."""
    return ptx.asm("redux.sync.max.u32 $0, $1, 0xffffffff;", "r", [x], effects=True)[0]
