"""One step of the Hopper decode kernel, per thread: 64 or 128 slots of one KV head against its queries.

Operands are swapped: S^T [slots, columns] = K q^T and O^T [channels, columns] += V^T P, so that the slots and the
channels fill the 64 rows of `wgmma` and the few queries are its columns. All tiles in shared memory are K-major in
128-byte-swizzled blocks of 8 rows x 128 bytes.

A column is one (query head of the group, token), `Plan.columns` of them, laid out per storage format:
  - half: as they are. 8 bits: each twice in QK, since q is split into a high and a low part whose products are
    added: an 8-bit operand with 8 to 16 bits of accuracy, and K is used as stored.
  - packed: repeated for every channel group of V, whose scales are folded into P.
Packed K, and V of all but half, are loaded into registers in the fragment layout of `wgmma`; which slot sits at
which place of the contraction is free as long as P is stored in the same order.

Softmax uses a reference that only has to bound P, not to be the maximum: it moves when some P exceeds 2**_HEADROOM,
which costs a reduction over the warpgroup; else one barrier a step suffices.
"""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels import ptx
from pallas_kernels.formats import PACKED_BITS
from pallas_kernels.ptx import Reg, f32

_LOG2E = math.log2(math.e)
_HEADROOM = 5.0  # P may exceed its reference by this many powers of two before the reference moves
_P_SCALE = {"f16": 2.0**10, "bf16": 1.0}  # keeps the largest P in range and the smallest above 0
_SPLIT = 16.0  # the low part of a split fp8 operand is stored times this
_START = -1e30  # reference before any slot was seen


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a kernel."""

    fmt: str  # "half", "int8", "fp8_e4m3", "fp8_e5m2", "int4" or "int2"
    dtype: str  # "bf16" or "f16": of q, and of K and V if fmt is "half"
    dim: int
    columns: int  # query heads of a KV head x tokens
    tokens: int
    block: int  # slots per step
    stages: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    group: int = 64  # packed: slots per key group and channels per value group
    meta: str = "f32"  # dtype of scales: "f32", "bf16" or "f16"
    causal: bool = False  # positions of the queries limit what they see
    positions: bool = False  # slots have explicit positions
    tree: int = 0  # newest slots that a mask decides on
    logits: int = 0  # slots per row of the scaled logits to write out; 0: none
    key_chunks: int = 2  # packed: 64-channel parts of K in registers at a time
    value_steps: int = 8  # 16-slot parts of V in registers at a time

    @property
    def packed(self) -> int:
        """Bits per code of a packed format, else 0."""
        return PACKED_BITS.get(self.fmt, 0)

    @property
    def split(self) -> bool:
        """Whether every column of QK is a pair (high, low)."""
        return self.fmt in ("int8", "fp8_e4m3", "fp8_e5m2")

    @property
    def value_groups(self) -> int:
        """Copies of each column, one per channel group of V."""
        return self.dim // self.group if self.packed else 1

    @property
    def n_scores(self) -> int:
        """Columns of the QK product, padded to 8."""
        return -(-self.columns * self.value_groups * (2 if self.split else 1) // 8) * 8

    @property
    def n_values(self) -> int:
        """Columns of the PV product, padded to 8."""
        return -(-self.logical // 2) * 8

    @property
    def tiles(self) -> int:
        """64-slot tiles of a step."""
        return self.block // 64

    @property
    def logical(self) -> int:
        """Columns that one thread holds after joining pairs."""
        return self.n_scores // 8 * (1 if self.split else 2)

    @property
    def q_bytes(self) -> int:
        """Bytes of an element of the q tile."""
        return 1 if self.split else 2

    @property
    def p_type(self) -> str:
        """PTX type of P."""
        return self.dtype if self.fmt == "half" else "f16"

    @property
    def k_row(self) -> int:
        """Bytes of a row of the K and V tiles."""
        return self.dim * (2 if self.fmt == "half" else 1)

    @property
    def k_rows(self) -> int:
        """Rows of the K and V tiles."""
        return self.block * self.packed // 8 if self.packed else self.block

    @property
    def q_dim(self) -> int:
        """Elements of a row of the q tile: packed keys append the products with the zero points."""
        return self.dim + 64 if self.packed else self.dim

    @property
    def key_groups(self) -> int:
        """q tiles of a step: one per key group, or one for all."""
        return max(1, self.block // self.group) if self.packed else 1

    @property
    def acc_registers(self) -> int:
        """Accumulator registers of a thread."""
        return self.dim // 64 * self.n_values // 2

    @property
    def state_registers(self) -> int:
        """Registers carried from step to step: accumulator, reference, sum, and the zero points' sum if packed."""
        return self.acc_registers + self.logical * (3 if self.packed else 2)


class Thread:
    """Where a thread sits in the fragments of its warpgroup."""

    def __init__(self, plan: Plan):
        self.index = ptx.thread_index()
        self.warp = self.index >> 5
        lane = self.index & 31
        self.row, self.quad = lane >> 2, lane & 3
        self.plan = plan

    def column(self, j: int) -> Reg:
        """Column (before padding, value groups included) of the thread's j-th logical value."""
        if self.plan.split:
            return self.quad + 4 * j
        return self.quad * 2 + (8 * (j // 2) + j % 2)

    def value_column(self, j: int) -> Reg:
        """Where that column lies in P and in the accumulator, so that the same thread holds it there."""
        return self.quad * 2 + (8 * (j // 2) + j % 2)

    def slot(self, tile: int, e: int) -> Reg:
        """Slot of the step in row e of a 64-slot tile."""
        if self.plan.packed:
            return self.warp * 8 + self.row + (64 * tile + 32 * e)
        return self.warp * 16 + self.row + (64 * tile + 8 * e)


def unpack_state(plan: Plan, regs: list[Reg]):
    """(acc per 64-channel tile, reference, total, zero sums) of the carried registers."""
    n, at = plan.n_values // 2, plan.acc_registers
    acc = [regs[i * n : (i + 1) * n] for i in range(plan.dim // 64)]
    parts = [regs[at + i * plan.logical : at + (i + 1) * plan.logical] for i in range(3)]
    return acc, parts[0], parts[1], parts[2]


def pack_state(acc, reference, total, zeros) -> list[Reg]:
    """The inverse of `unpack_state`."""
    return [r for tile in acc for r in tile] + list(reference) + list(total) + list(zeros)


def initial_state(plan: Plan):
    """State before any slot: an inline function without arguments."""

    def body(ctx):
        zero, start = f32(0.0), f32(_START)
        acc = [zero] * plan.acc_registers
        return ptx.as_array(acc + [start] * plan.logical + [zero] * (plan.logical * (2 if plan.packed else 1)))

    return body


def tile_offset(row: Reg, chunk: Reg | int, row_bytes: int) -> Reg:
    """Byte offset of 16-byte chunk `chunk` of row `row` in a swizzled tile with rows of `row_bytes` bytes."""
    columns = -(-row_bytes // 128)
    chunk = chunk if isinstance(chunk, Reg) else ptx.i32(chunk)
    in_tile = (row & 7) * 128 + (((chunk & 7) ^ (row & 7)) << 4)
    return (row >> 3) * (columns * 1024) + (chunk >> 3) * 1024 + in_tile


# ---- queries -------------------------------------------------------------------------------------------------


def load_queries(plan: Plan):
    """Inline function (q, q_tile, p_tile, per-column scales): q [columns, dim] of one KV head into shared memory.

    half: q as it is. 8 bits: q = scale * (high + low / 256 or 16), quantized per column; the scales go to
    `column_scales`. Packed: only the tile's padding is cleared; `scale_queries` writes the rest every step.
    """

    def body(ctx, q, q_tile, p_tile, column_scales):
        t = Thread(plan)
        tile, source = ptx.smem_address(q_tile), ptx.global_address(q)
        q_tile_bytes = plan.n_scores * -(-plan.q_dim * plan.q_bytes // 128) * 128
        copies = 2 * plan.key_groups if plan.packed else 1
        _clear(t, tile, q_tile_bytes * copies)
        _clear(t, ptx.smem_address(p_tile), 2 * plan.n_values * -(-plan.block * 2 // 128) * 128)
        ptx.barrier()
        if plan.packed:
            return
        # 16 threads a column, 8 columns at a time; a thread converts runs of 8 channels.
        runs = range(-(-plan.dim // 128))
        place = t.index & 15
        for start in range(0, plan.columns, 8):
            column = (t.index >> 4) + start
            live = column < plan.columns

            def words(run, column):
                at = source + ptx.wide((column * plan.dim + (place + 16 * run) * 8) * 2)
                return ptx.load(at, words=4)

            if plan.fmt == "half":
                for run in runs:

                    def copy(run=run, column=column):
                        to = tile + tile_offset(column, place + 16 * run, plan.k_row)
                        for i, word in enumerate(words(run, column)):
                            ptx.store(to + 4 * i, word)
                        return []

                    ptx.if_(ptx.both(live, place + 16 * run < plan.dim // 8), copy)
                continue
            safe = ptx.select(live, column, 0)
            values = [v for run in runs for w in words(run, safe) for v in ptx.unpack_half(w, plan.dtype)]
            peak = ptx.maximum(_abs(values[0]), 1e-30)
            for v in values[1:]:
                peak = ptx.maximum(peak, _abs(v))
            for lanes in (1, 2, 4, 8):
                peak = ptx.maximum(peak, ptx.shuffle_xor(peak, lanes))
            top = 32512.0 if plan.fmt == "int8" else 448.0
            factor = f32(top) / peak

            def write(column=column, values=values, factor=factor, peak=peak, top=top):
                for run in runs:
                    high, low = _split_words([v * factor for v in values[8 * run : 8 * run + 8]], plan)
                    channel = (place + 16 * run) * 8
                    for part, words in ((0, high), (1, low)):
                        to = tile + tile_offset(column * 2 + part, channel >> 4, plan.k_row) + (channel & 15)
                        for i, word in enumerate(words):
                            ptx.store(to + 4 * i, word)
                by = peak * (plan.scale * _LOG2E / top)
                at = ptx.smem_address(column_scales) + column * 4
                ptx.if_(place.equals(0), lambda: ptx.store(at, by) or [])
                return []

            ptx.if_(live, write)
        ptx.fence_async()
        ptx.barrier()

    return body


def _abs(x: Reg) -> Reg:
    return ptx.asm("abs.f32 $0, $1;", "f", [x])[0]


def _clear(t: Thread, address: Reg, size: int) -> None:
    """Zero shared memory, `size` a multiple of 16."""
    for start in range(0, size, 2048):
        at = t.index * 16 + start
        ptx.if_(at < size, lambda at=at: ptx.store_zeros(address + at) or [])


def _split_words(values: list[Reg], plan: Plan) -> tuple[list[Reg], list[Reg]]:
    """f32 values, already in the code's range -> words of 4 codes of their high and of their low parts."""
    if plan.fmt == "int8":
        codes = [ptx.to_int(v) for v in values]
        high = [Reg(_shift_signed(c + 128, 8), "r") for c in codes]
        low = [c - (h << 8) for c, h in zip(codes, high)]
        return _join_bytes(high), _join_bytes(low)
    high, low = [], []
    for a, b in zip(values[::2], values[1::2]):
        code = ptx.pack_fp8(a, b, "e4m3")
        back = ptx.unpack_fp8(code, "e4m3")
        high.append(code)
        low.append(ptx.pack_fp8((a - back[0]) * _SPLIT, (b - back[1]) * _SPLIT, "e4m3"))
    return tuple([x | (y << 16) for x, y in zip(p[::2], p[1::2])] for p in (high, low))


def _shift_signed(x: Reg, by: int):
    return ptx.asm(f"shr.s32 $0, $1, {by};", "r", [x])[0].value


def _join_bytes(codes: list[Reg]) -> list[Reg]:
    """Low bytes of 4 registers each -> words."""
    words = []
    for i in range(0, len(codes), 4):
        a, b, c, d = codes[i : i + 4]
        words.append(ptx.prmt(ptx.prmt(a, b, 0x0040), ptx.prmt(c, d, 0x0040), 0x5410))
    return words


def query_pairs(plan: Plan):
    """Inline function (q) -> the thread's part of scale * q as f16 pairs, in the order of the K fragments.

    Thread 16 c + i of every 128 holds channels 8 i ... + 7 (+ 128) of columns c, c + 8, ...; pairs are channels
    (0, 2), (1, 3) of every four.
    """

    def body(ctx, q):
        t = Thread(plan)
        source, regs = ptx.global_address(q), []
        for start in range(0, plan.columns * plan.value_groups, 8):
            head = ((t.index >> 4) + start) % plan.columns
            for run in range(plan.dim // 128):
                at = source + ptx.wide((head * plan.dim + ((t.index & 15) + 16 * run) * 8) * 2)
                words = ptx.load(at, words=4)
                v = [x * (plan.scale * _LOG2E) for w in words for x in ptx.unpack_half(w, plan.dtype)]
                regs += [ptx.pack_half(v[i], v[i + 2], "f16") for i in (0, 1, 4, 5)]
        return ptx.as_array([ptx.bits_to_float(x) for x in regs])

    return body


def query_pair_registers(plan: Plan) -> int:
    """Registers that `query_pairs` returns."""
    return -(-plan.columns * plan.value_groups // 8) * plan.dim // 128 * 4


def scale_queries(plan: Plan):
    """Inline function (pairs, k_scale, k_zero, q_tile, buffer): q times the key scales of each group of the step.

    The tile's first `dim` elements of a column are q * scale in the order of the K fragments; the next dim / 4
    hold the sums of q * zero over 4 channels each, against codes that are all 1.
    """

    def body(ctx, pairs, k_scale, k_zero, q_tile, buffer):
        t = Thread(plan)
        row = -(-plan.q_dim * 2 // 128) * 128
        one = plan.n_scores * row
        base = ptx.smem_address(q_tile) + ptx.scalar(buffer) * (one * plan.key_groups)
        scales, zeros = ptx.smem_address(k_scale), ptx.smem_address(k_zero)
        size = 4 if plan.meta == "f32" else 2
        used, quarter, place = plan.columns * plan.value_groups, plan.dim // 4, t.index & 15
        q_words = [ptx.as_bits(x) for x in ptx.registers(pairs)]
        for group in range(plan.key_groups):
            for run in range(plan.dim // 128):
                first = (place + 16 * run) * 8
                at = (first + group * plan.dim) * size
                s, z = _meta_pairs(plan, scales + at), _meta_pairs(plan, zeros + at)
                for start in range(0, used, 8):
                    column = (t.index >> 4) + start
                    index = (start // 8 * (plan.dim // 128) + run) * 4
                    q4 = q_words[index : index + 4]

                    def write(group=group, run=run, first=first, column=column, q4=q4, s=s, z=z):
                        tile = base + group * one
                        total = None
                        for i in range(4):
                            # A K word holds 4 channels, pairs (0, 2) and (1, 3); see `_key_fragments`.
                            start = first + 4 * (i // 2)
                            step, quad = (start % quarter) >> 2, start // quarter
                            element = step * 16 + quad * 2 + 8 * (i % 2)
                            to = tile + tile_offset(column, element >> 3, row) + (element & 7) * 2
                            ptx.store(to, ptx.half_multiply(q4[i], s[i]))
                            total = ptx.half_multiply(q4[i], z[i], total)
                        element = place * 2 + (plan.dim + 32 * run)
                        to = tile + tile_offset(column, element >> 3, row) + (element & 7) * 2
                        ptx.store(to, total)
                        return []

                    if used % 8:
                        ptx.if_(column < used, write)
                    else:
                        write()

    return body


def _meta_pairs(plan: Plan, address: Reg) -> list[Reg]:
    """8 consecutive scales as f16 pairs (0, 2), (1, 3), (4, 6), (5, 7)."""
    if plan.meta == "f16":
        w = ptx.load(address, words=4)
        return [ptx.prmt(w[i], w[i + 1], sel) for i in (0, 2) for sel in (0x5410, 0x7632)]
    if plan.meta == "f32":
        v = [ptx.bits_to_float(w) for i in (0, 16) for w in ptx.load(address + i, words=4)]
    else:
        v = [x for w in ptx.load(address, words=4) for x in ptx.unpack_half(w, plan.meta)]
    return [ptx.pack_half(v[i], v[i + 2], "f16") for i in (0, 1, 4, 5)]


def _load_one_meta(plan: Plan, address: Reg) -> Reg:
    """One scale as f32."""
    if plan.meta == "f32":
        return ptx.bits_to_float(ptx.load(address)[0])
    return ptx.unpack_half(ptx.load(address, 2)[0], plan.meta)[0]


# ---- scores --------------------------------------------------------------------------------------------------


def _key_fragments(plan: Plan, t: Thread, k_tile: Reg, chunks) -> list[list[list[Reg]]]:
    """Packed K as f16 codes times 2**-24 (denormals): [tile][k step] -> 4 registers; 4 steps per 16-byte chunk.

    Word q of a thread holds channels dim/4 * quad + 4 q ... + 3 of 2 or 4 slots; field f of a byte is slot
    row + 32 f. Codes stay where they are in their byte: field f comes out times 2**(bits f).
    """
    bits, fields = plan.packed, 8 // plan.packed
    out = [[] for _ in range(plan.tiles)]
    for block in range(plan.k_rows // 32):
        row = t.warp * 8 + t.row + 32 * block
        words = []
        for q in chunks:
            chunk = t.quad * (plan.dim // 64) + q
            words += ptx.load(k_tile + tile_offset(row, chunk, plan.k_row), words=4)
        for word in words:
            shifted = word >> 8
            for tile in range(fields // 2):
                masks = [((1 << bits) - 1) << (bits * (2 * tile + e)) for e in range(2)]
                regs = [w & (m | m << 16) for w in (word, shifted) for m in masks]
                out[block * (fields // 2) + tile].append(regs)
    return out


def _scores(plan: Plan, t: Thread, k_tile: Reg, q_tile: Reg, scales) -> list[list[list[Reg]]]:
    """[tile][e][logical column] -> (x, factor): logits in powers of two are x * factor.

    `scales(tile, e)` gives the 8-bit scales: of the slot's key and of every column.
    """
    n, steps = plan.n_scores, plan.dim * plan.q_bytes // 32
    row = -(-plan.q_dim * plan.q_bytes // 128) * 128
    b_matrix = ptx.matrix(q_tile, rows_apart=row * 8)
    in_row = [(s // 4) * 1024 + (s % 4) * 32 for s in range(row // 32)]
    if plan.packed:
        extra, per = plan.dim // 64, plan.key_chunks
        raw = [[] for _ in range(plan.tiles)]
        for start in range(0, plan.dim // 64, per):
            fragments = _key_fragments(plan, t, k_tile, range(start, start + per))
            last = start + per == plan.dim // 64
            a, b = [], []
            for tile in range(plan.tiles):
                # "Codes" of 1 for the zero points, with the same powers of two as the slots of each row have.
                field = 2 * (tile % (4 // plan.packed)) if plan.packed == 2 else 0
                ones = [ptx.i32((1 << (plan.packed * (field + e))) * 0x10001) for e in range(2)]
                group = tile * 64 // plan.group
                here = range(4 * start, 4 * (start + per) + (extra if last else 0))
                b += [group * n * row + in_row[s] for s in here]
                a += fragments[tile] + ([[*ones, *ones]] * extra if last else [])
            types = ("f32", "f16", "f16")
            raw = ptx.wgmma(raw, a, b, b_matrix=b_matrix, n=n, types=types, init=start == 0)
    else:
        a_matrix = ptx.matrix(k_tile, rows_apart=plan.k_row * 8)
        offsets = [tile * 8 * plan.k_row * 8 + in_row[s] for tile in range(plan.tiles) for s in range(steps)]
        types = {
            "half": ("f32", plan.dtype, plan.dtype),
            "int8": ("s32", "s8", "s8"),
            "fp8_e4m3": ("f32", "e4m3", "e4m3"),
            "fp8_e5m2": ("f32", "e5m2", "e4m3"),
        }[plan.fmt]
        raw = ptx.wgmma([[] for _ in range(plan.tiles)], offsets, in_row[:steps] * plan.tiles, b_matrix=b_matrix,
                        a_matrix=a_matrix, n=n, types=types, init=True)  # fmt: skip
    out = []
    for tile in range(plan.tiles):
        rows = []
        for e in range(2):
            pairs = [(raw[tile][4 * nt + 2 * e], raw[tile][4 * nt + 2 * e + 1]) for nt in range(n // 8)]
            if plan.packed:
                field = 2 * (tile % (4 // plan.packed)) + e if plan.packed == 2 else e
                values = [(x, 2.0 ** (24 - plan.packed * field)) for pair in pairs for x in pair]
            elif plan.split:
                key, column = scales(tile, e)
                if plan.fmt == "int8":
                    joined = [ptx.to_float((high << 8) + low) for high, low in pairs]
                else:
                    joined = [ptx.fma(low, 1.0 / _SPLIT, high) for high, low in pairs]
                values = [(x, key * c) for x, c in zip(joined, column)]
            else:
                values = [(x, plan.scale * _LOG2E) for pair in pairs for x in pair]
            if plan.softcap is not None:
                values = [(_cap(x * by, plan.softcap * _LOG2E), 1.0) for x, by in values]
            rows.append(values)
        out.append(rows)
    return out


def _cap(x: Reg, cap: float) -> Reg:
    """cap * tanh(x / cap)."""
    power = ptx.ex2(ptx.maximum(x * (-2.0 * _LOG2E / cap), -126.0))
    return (f32(1.0) - power) / (f32(1.0) + power) * cap


# ---- one step ------------------------------------------------------------------------------------------------


def attend_keys(plan: Plan):
    """Inline function for the first half of a step: scores, softmax, P into shared memory, one barrier.

    Arguments: state; scalars first slot, row length, total length, buffer, and stage; refs k, v, k_scale, v_scale,
    v_zero (stage slices), q_tile, p_tile, column_scales, scratch, positions, q_positions, tree, logits, new_q
    arguments. Unused refs are None. Returns the state; P waits in p_tile[buffer].
    """

    def body(ctx, state, first_slot, length, total, buffer, refs):
        t = Thread(plan)
        acc, reference, sums, zeros = unpack_state(plan, ptx.registers(state))
        first, length, total, buffer = (ptx.scalar(x) for x in (first_slot, length, total, buffer))
        address = {name: ptx.address(ref) for name, ref in refs.items() if ref is not None}
        size = 4 if plan.meta == "f32" else 2

        column_scales = []
        if plan.split:
            places = [address["column_scales"] + t.column(j) * 4 for j in range(plan.logical)]
            column_scales = [ptx.bits_to_float(ptx.load(at)[0]) for at in places]

        def key_scales(tile, e):
            return _load_one_meta(plan, address["k_scale"] + t.slot(tile, e) * size), column_scales

        q_tile = address["q_tile"]
        if plan.packed:
            one = plan.n_scores * -(-plan.q_dim * 2 // 128) * 128
            q_tile = q_tile + buffer * (one * plan.key_groups)
        s = _scores(plan, t, address["k"], q_tile, key_scales)
        weights, offsets, sees = {}, {}, {}
        tokens = [t.column(j) % plan.columns % plan.tokens for j in range(plan.logical)]
        factor = _P_SCALE[plan.p_type]
        for tile in range(plan.tiles):
            for e in range(2):
                local = t.slot(tile, e)
                slot = first + local
                live = slot < length
                sees[tile, e] = _visible(plan, slot, live, local, total, tokens, address)
                if plan.fmt == "half":
                    continue
                # Codes come out of V times 2 ** (bits field); P takes that back.
                field = (2 * (tile % (4 // plan.packed)) if plan.packed == 2 else 0) + e
                by = factor * 2.0 ** -(plan.packed * field)
                for j in range(plan.logical):
                    key = (tile, e, j)
                    if j and (not plan.packed or (j % 2 and plan.columns % 2 == 0)):
                        weights[key], offsets[key] = weights[tile, e, j - 1], offsets[tile, e, j - 1]
                        continue
                    at = local * size
                    if plan.packed:
                        value_group = t.column(j) // plan.columns
                        value_group = ptx.select(value_group < plan.value_groups, value_group, 0)
                        at = (value_group * plan.block + local) * size
                    scale = _load_one_meta(plan, address["v_scale"] + at)
                    weights[key], offsets[key] = ptx.select(live, scale * by, 0.0), None
                    if plan.packed:
                        offsets[key] = ptx.select(live, _load_one_meta(plan, address["v_zero"] + at), 0.0)
        if plan.logits:
            _write_logits(plan, t, s, sees, first, length, address["logits"])
        p_tile = address["p_tile"] + buffer * (plan.n_values * -(-plan.block * 2 // 128) * 128)
        keys = [(tile, e, j) for tile in range(plan.tiles) for e in range(2) for j in range(plan.logical)]

        def probabilities(reference):
            """Write P for this reference; (largest P, sum of p, sum of p * zero) of the thread's columns."""
            minus = [f32(0.0) - x for x in reference]
            p = {}
            for a, e, j in keys:
                x, by = s[a][e][j]
                p[a, e, j] = ptx.ex2(ptx.select(sees[a, e][j], ptx.fma(x, by, minus[j]), -math.inf))
            scaled = {k: p[k] * weights[k] if weights else p[k] * factor if factor != 1.0 else p[k] for k in keys}
            largest = _write_probabilities(plan, t, p_tile, scaled)
            part, zero_part = [], []
            for j in range(plan.logical):
                mine = [k for k in keys if k[2] == j]
                part.append(_sum([p[k] for k in mine]))
                if plan.packed:
                    total_zero = p[mine[0]] * offsets[mine[0]]
                    for k in mine[1:]:
                        total_zero = ptx.fma(p[k], offsets[k], total_zero)
                    zero_part.append(total_zero)
            return largest, part, zero_part

        largest, part, zero_part = probabilities(reference)
        if plan.fmt == "half" or plan.fmt.startswith("fp8"):
            ptx.if_(first + plan.block > length, lambda: _blank_values(plan, t, address["v"], length - first) or [])
        ptx.fence_async()
        moved = ptx.barrier_any(largest > factor * 2.0**_HEADROOM)

        def move():
            peak = []
            for j in range(plan.logical):
                best = reference[j]
                for k in (k for k in keys if k[2] == j):
                    x, by = s[k[0]][k[1]][j]
                    value = ptx.select(sees[k[0], k[1]][j], x * by, -math.inf)
                    if weights:
                        value = value + (ptx.lg2(weights[k]) - math.log2(factor))
                    best = ptx.maximum(best, value)
                peak.append(best)
            peak = _reduce(plan, t, peak, address["scratch"], ptx.maximum)
            alpha = [ptx.ex2(old - new) for old, new in zip(reference, peak)]
            _, part, zero_part = probabilities(peak)
            ptx.fence_async()
            ptx.barrier()
            scaled = [[r * alpha[_alpha_index(plan, i)] for i, r in enumerate(tile)] for tile in acc]
            return pack_state(
                scaled, peak, [fma_(x, a, y) for x, a, y in zip(sums, alpha, part)],
                [fma_(x, a, y) for x, a, y in zip(zeros, alpha, zero_part)],
            )  # fmt: skip

        added = [x + y for x, y in zip(sums, part)], [x + y for x, y in zip(zeros, zero_part)]
        return ptx.as_array(ptx.if_(moved, move, pack_state(acc, reference, *added)))

    return body


def fma_(x: Reg, a: Reg, y: Reg) -> Reg:
    """x * a + y."""
    return ptx.fma(x, a, y)


def _alpha_index(plan: Plan, i: int) -> int:
    """Logical column of accumulator register i of a tile; of padding, any."""
    return min(2 * (i // 4) + i % 2, plan.logical - 1)


def _sum(values: list[Reg]) -> Reg:
    total = values[0]
    for v in values[1:]:
        total = total + v
    return total


def _visible(plan, slot, live, local, total, tokens, address) -> list:
    """Per logical column, whether it sees the slot."""
    if not plan.causal and not plan.tree and not plan.positions:
        return [live] * plan.logical
    position = slot
    if plan.positions:
        position = ptx.load(address["positions"] + local * 4)[0]
        live = ptx.both(live, position >= 0)
    out = []
    for token in tokens:
        sees = live
        if plan.causal:
            query = ptx.load(address["q_positions"] + ptx.wide(token * 4))[0]
            order = position <= query
            if plan.tree:
                order = ptx.either(order, slot >= total - plan.tree)
            sees = ptx.both(sees, order, query >= 0)
            if plan.window is not None:
                sees = ptx.both(sees, position > query - plan.window)
        if plan.tree:
            bits = ptx.load(address["tree"] + ptx.wide(token * 4))[0]
            new = slot - (total - plan.tree)
            bit = ((bits >> ptx.select(new >= 0, new, 0)) & 1).equals(1)
            sees = ptx.both(sees, ptx.either(bit, new < 0))
        out.append(sees)
    return out


def _write_logits(plan, t, s, sees, first, length, logits) -> None:
    """Scaled logits (powers of two) [columns, slots] of the first copy of every column."""
    for tile in range(plan.tiles):
        for e in range(2):
            slot = first + t.slot(tile, e)
            for j in range(plan.logical):
                column = t.column(j)
                at = logits + ptx.wide((column * plan.logits + slot) * 4)
                live = ptx.both(column < plan.columns, slot < length)
                x, by = s[tile][e][j]
                value = ptx.select(sees[tile, e][j], x * by, -math.inf)
                ptx.if_(live, lambda at=at, v=value: ptx.store(at, v) or [])


def _write_probabilities(plan: Plan, t: Thread, p_tile: Reg, p: dict) -> Reg:
    """P into its tile [columns, block], in the order of contraction of the format; returns the largest P."""
    row, kind, largest = -(-plan.block * 2 // 128) * 128, plan.p_type, None
    for tile in range(plan.tiles):
        for j in range(plan.logical):
            word = ptx.pack_half(p[tile, 0, j], p[tile, 1, j], kind)
            largest = word if largest is None else ptx.half_maximum(largest, word, kind)
            column = t.value_column(j)
            if plan.fmt == "half":
                for e in range(2):
                    element = t.slot(tile, e)
                    to = p_tile + tile_offset(column, element >> 3, row) + (element & 7) * 2
                    ptx.store(to, word if e == 0 else word >> 16, 2)
                continue
            element = t.warp * 16 + (t.row & 1) * 8 + (t.row >> 1) * 2 + 64 * tile
            to = p_tile + tile_offset(column, element >> 3, row) + (element & 7) * 2
            ptx.store(to, word)
    return ptx.maximum(*ptx.unpack_half(largest, kind))


def _blank_values(plan: Plan, t: Thread, v_tile: Reg, valid: Reg) -> None:
    """Zero the rows of V past the length: whatever they hold must not meet a probability of 0."""
    chunks = plan.k_row // 16
    for start in range(0, plan.block * chunks, 128):
        index = t.index + start
        row, chunk = index // chunks, index % chunks
        to = v_tile + tile_offset(row, chunk, plan.k_row)
        ptx.if_(row >= valid, lambda to=to: ptx.store_zeros(to) or [])


def _reduce(plan: Plan, t: Thread, values: list[Reg], scratch: Reg, op) -> list[Reg]:
    """Reduce per logical column over the rows of all warps."""
    for lanes in (4, 8, 16):
        values = [op(v, ptx.shuffle_xor(v, lanes)) for v in values]
    for j, v in enumerate(values):
        at = scratch + ((t.warp * plan.logical + j) * 4 + t.quad) * 4
        ptx.if_(t.row.equals(0), lambda at=at, v=v: ptx.store(at, v) or [])
    ptx.barrier()
    out = []
    for j in range(plan.logical):
        parts = [ptx.bits_to_float(ptx.load(scratch + ((w * plan.logical + j) * 4 + t.quad) * 4)[0])
                 for w in range(4)]  # fmt: skip
        total = parts[0]
        for x in parts[1:]:
            total = op(total, x)
        out.append(total)
    ptx.barrier()
    return out


def attend_values(plan: Plan):
    """Inline function for the second half of a step: (state, buffer, v, p_tile) -> state, acc += V^T P."""

    def body(ctx, state, buffer, v, p_tile):
        t = Thread(plan)
        acc, reference, sums, zeros = unpack_state(plan, ptx.registers(state))
        n, row = plan.n_values, -(-plan.block * 2 // 128) * 128
        p_address = ptx.smem_address(p_tile) + ptx.scalar(buffer) * (n * row)
        b_matrix = ptx.matrix(p_address, rows_apart=row * 8)
        steps = plan.block * 2 // 32
        b = [(s // 4) * 1024 + (s % 4) * 32 for s in range(steps)]
        v_tile = ptx.smem_address(v)
        types = ("f32", plan.p_type, plan.p_type)
        channel_tiles = plan.dim // 64
        if plan.fmt == "half":
            a_matrix = ptx.matrix(v_tile, rows_apart=plan.k_row * 8, leading=1024)
            a = [tile * 1024 + s * 2 * plan.k_row * 8 for tile in range(channel_tiles) for s in range(steps)]
            acc = ptx.wgmma(acc, a, b * channel_tiles, b_matrix=b_matrix, a_matrix=a_matrix, n=n, types=types,
                            init=False, a_transposed=True)  # fmt: skip
        else:
            per = min(steps, plan.value_steps)
            for start in range(0, steps, per):
                fragments = _value_fragments(plan, t, v_tile, range(start, start + per))
                a = [regs for tile in fragments for regs in tile]
                acc = ptx.wgmma(acc, a, b[start : start + per] * channel_tiles, b_matrix=b_matrix, n=n,
                                types=types, init=False)  # fmt: skip
        return ptx.as_array(pack_state(acc, reference, sums, zeros))

    return body


def channel(t: Thread, tile: int, e: int) -> Reg:
    """Channel in row e of the thread in a 64-channel tile of the accumulator."""
    if t.plan.fmt == "half":
        return t.warp * 16 + t.row + (64 * tile + 8 * e)
    return t.warp * 32 + t.row * 4 + (128 * (tile // 2) + 2 * (tile % 2) + e)


def _value_fragments(plan: Plan, t: Thread, v_tile: Reg, steps) -> list[list[list[Reg]]]:
    """V^T in registers: [channel tile][step of the contraction] -> 4 registers."""
    out, seen = [[] for _ in range(plan.dim // 64)], {}

    def word(row: int, half: int) -> Reg:
        """4 channels of row 2 quad + `row`."""
        at = t.warp * 32 + t.row * 4 + 128 * half
        if (row, half) not in seen:
            to = v_tile + tile_offset(t.quad * 2 + row, at >> 4, plan.k_row) + (at & 15)
            seen[row, half] = ptx.load(to)[0]
        return seen[row, half]

    for half in range(plan.dim // 128):
        for s in steps:
            if plan.packed:
                regs = _packed_step(plan, t, word, half, s)
            else:
                regs = _eight_bit_step(plan, t, word, half, s)
            for tile in range(2):
                out[2 * half + tile].append([regs[2 * tile + e][c] for c in range(2) for e in range(2)])
    return out


def _packed_step(plan, t, word, half, s):
    """Codes times powers of two as f16 denormals: [byte of the word][c]; the two slots of a register are 32 apart."""
    bits, per_block = plan.packed, 4 * (4 // plan.packed)
    block, inside = s // per_block, s % per_block
    tile, s4 = (inside // 4, inside % 4) if bits == 2 else (0, inside)
    masks = [((1 << bits) - 1) << (bits * (2 * tile + e)) for e in range(2)]
    regs = [[] for _ in range(4)]
    for c in range(2):
        w = word(c + 8 * s4 + 32 * block, half)
        for byte in range(4):
            regs[byte].append(ptx.prmt(w, 0, 0x4040 | byte << 8 | byte) & (masks[0] | masks[1] << 16))
    return regs


def _eight_bit_step(plan, t, word, half, s):
    """8-bit codes as f16, exact: [byte][c]; 16 slots a step. e4m3 comes out times 2**-8."""
    regs = [[] for _ in range(4)]
    for c in range(2):
        a, b = (word(16 * s + c + 8 * e, half) for e in range(2))
        if plan.fmt == "int8":
            a, b = a ^ 0x80808080, b ^ 0x80808080
        for byte in range(4):
            if byte % 2 == 0:
                joined = ptx.prmt(a, b, 0x5140 if byte == 0 else 0x7362)  # a0 b0 a1 b1 or a2 b2 a3 b3
            if plan.fmt == "int8":  # code + 128 as the low bits of 1024, then the 1152 is taken off
                biased = ptx.prmt(joined, 0x64646464, 0x4140 if byte % 2 == 0 else 0x4342)
                ptx_sub = "{ .reg .b32 k; mov.b32 k, 0x64806480; sub.f16x2 $0, $1, k; }"
                regs[byte].append(ptx.asm(ptx_sub, "r", [biased])[0])
                continue
            x = ptx.prmt(joined, 0, 0x1404 if byte % 2 == 0 else 0x3424)  # codes as the high bytes of f16
            if plan.fmt == "fp8_e4m3":
                x = ((x >> 1) & 0x3F803F80) | (x & 0x80008000)
            regs[byte].append(x)
    return regs


# ---- end -----------------------------------------------------------------------------------------------------


def write_partial(plan: Plan):
    """Inline function (state, scratch, out [columns, dim], lse [columns]): the normalised partial result in f32."""

    def body(ctx, state, scratch, out, lse):
        t = Thread(plan)
        acc, reference, sums, zeros = unpack_state(plan, ptx.registers(state))
        area = ptx.smem_address(scratch)
        add = lambda a, b: a + b  # noqa: E731
        sums = _reduce(plan, t, sums, area, add)
        zeros = _reduce(plan, t, zeros, area, add) if plan.packed else []
        some = [s > 0.0 for s in sums]
        inverse = [ptx.select(x, f32(1.0) / s, 0.0) for x, s in zip(some, sums)]
        base, lse_base = ptx.global_address(out), ptx.global_address(lse)
        unit = 2.0**24 if plan.packed else 2.0**8 if plan.fmt == "fp8_e4m3" else 1.0
        by = unit / _P_SCALE[plan.p_type]
        for tile in range(plan.dim // 64):
            for nt in range(plan.n_values // 8):
                for e in range(2):
                    for p in range(2):
                        j = 2 * nt + p
                        if j < plan.logical:
                            value = acc[tile][4 * nt + 2 * e + p] * by
                            _write_one(plan, t, base, tile, e, j, value, inverse, zeros)
        first_row = ptx.both(t.warp.equals(0), t.row.equals(0))
        for j in range(plan.logical):
            value = ptx.select(some[j], (reference[j] + ptx.lg2(sums[j])) * math.log(2.0), -math.inf)
            column = t.column(j)
            at = lse_base + ptx.wide(column * 4)
            ptx.if_(ptx.both(first_row, column < plan.columns), lambda at=at, v=value: ptx.store(at, v) or [])

    return body


def _write_one(plan, t, base, tile, e, j, value, inverse, zeros) -> None:
    column, row = t.column(j), channel(t, tile, e)
    wanted = column < plan.columns
    head = column
    if plan.packed:
        value = value + zeros[j]
        wanted = (column // plan.columns).equals(row // plan.group)
        head = column % plan.columns
    value = value * inverse[j]
    at = base + ptx.wide((head * plan.dim + row) * 4)
    ptx.if_(wanted, lambda: ptx.store(at, value) or [])
