"""Queries of the Hopper decode kernel in shared memory: as they are, split into codes, or times key scales."""

from __future__ import annotations

from pallas_kernels import ptx
from pallas_kernels.decode_attention.gpu_plan import LOG2E, SPLIT, Plan, Thread, tile_offset
from pallas_kernels.ptx import Reg, f32


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
                by = peak * (plan.scale * LOG2E / top)
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
        low.append(ptx.pack_fp8((a - back[0]) * SPLIT, (b - back[1]) * SPLIT, "e4m3"))
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
        for start in range(0, plan.columns * plan.copies, 8):
            head = ((t.index >> 4) + start) % plan.columns
            for run in range(plan.dim // 128):
                at = source + ptx.wide((head * plan.dim + ((t.index & 15) + 16 * run) * 8) * 2)
                words = ptx.load(at, words=4)
                v = [x * (plan.scale * LOG2E) for w in words for x in ptx.unpack_half(w, plan.dtype)]
                regs += [ptx.pack_half(v[i], v[i + 2], "f16") for i in (0, 1, 4, 5)]
        return ptx.as_array([ptx.bits_to_float(x) for x in regs])

    return body


def query_pair_registers(plan: Plan) -> int:
    """Registers that `query_pairs` returns."""
    return -(-plan.columns * plan.copies // 8) * plan.dim // 128 * 4


def scale_queries(plan: Plan):
    """Inline function (pairs, k_scale, k_zero, q_tile, buffer): q times the key scales of each group of the step.

    The tile's first `dim` elements of a column are q * scale in the order of the K fragments; the next dim / 8
    hold the sums of q * zero over 8 channels each, against codes that are all 1.
    """

    def body(ctx, pairs, k_scale, k_zero, q_tile, buffer):
        t = Thread(plan)
        row = -(-plan.q_dim * 2 // 128) * 128
        one = plan.n_scores * row
        base = ptx.smem_address(q_tile) + ptx.scalar(buffer) * (one * plan.key_groups)
        scales, zeros = ptx.smem_address(k_scale), ptx.smem_address(k_zero)
        size = 4 if plan.meta == "f32" else 2
        used, quarter, place = plan.columns * plan.copies, plan.dim // 4, t.index & 15
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
                        element = place + (plan.dim + 16 * run)
                        to = tile + tile_offset(column, element >> 3, row) + (element & 7) * 2
                        ptx.store(to, ptx.half_add(total, ptx.prmt(total, 0, 0x1032)), 2)
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
