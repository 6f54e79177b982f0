"""The two products of a step of the Hopper decode kernel, K q^T and V^T P, and how codes become operands."""

from __future__ import annotations

from pallas_kernels import ptx, ptx_wgmma
from pallas_kernels.decode_attention.gpu_plan import (
    LOG2E,
    SPLIT,
    Plan,
    Thread,
    pack_state,
    tile_offset,
    unpack_state,
)
from pallas_kernels.ptx import Reg, f32


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


def start_scores(plan: Plan):
    """Inline function (k, q_tile, buffer) -> packed K q^T as registers in flight, `score_registers` of them."""

    def body(ctx, k, q_tile, buffer):
        t = Thread(plan)
        row = -(-plan.q_dim * 2 // 128) * 128
        group_bytes = plan.n_scores * row
        address = ptx.smem_address(q_tile) + ptx.scalar(buffer) * (group_bytes * plan.key_groups)
        b_matrix = ptx_wgmma.matrix(address, rows_apart=row * 8)
        in_row = [(s // 4) * 1024 + (s % 4) * 32 for s in range(row // 32)]
        extra, per = plan.dim // 128, plan.key_chunks
        raw = [[] for _ in range(plan.tiles * plan.chains)]
        for start in range(0, plan.dim // 64, per):
            fragments = _key_fragments(plan, t, ptx.smem_address(k), range(start, start + per))
            last = start + per == plan.dim // 64
            products = []  # (step, accumulator, A, B): in this order
            for tile in range(plan.tiles):
                # "Codes" of 1 for the zero points, with the same powers of two as the slots of each row have.
                field = 2 * (tile % (4 // plan.packed)) if plan.packed == 2 else 0
                ones = [ptx.i32((1 << (plan.packed * (field + e))) * 0x10001) for e in range(2)]
                group = tile * 64 // plan.group
                here = range(4 * start, 4 * (start + per) + (extra if last else 0))
                tile_a = fragments[tile] + ([[*ones, *ones]] * extra if last else [])
                products += [
                    (i, tile * plan.chains + i % plan.chains, regs, group * group_bytes + in_row[s])
                    for i, (s, regs) in enumerate(zip(here, tile_a, strict=True))
                ]
            products.sort(key=lambda p: p[:2])
            _, tiles, a, b = (list(x) for x in zip(*products))
            raw = ptx_wgmma.wgmma(raw, a, b, b_matrix=b_matrix, n=plan.n_raw, types=("f32", "f16", "f16"),
                                  init=start == 0, wait=not last, tiles=tiles)  # fmt: skip
        return ptx.as_array([r for tile in raw for r in tile])

    return body


def _finish_scores(plan: Plan, raw: list[Reg]) -> list[list[Reg]]:
    """Wait for `start_scores`: accumulator registers per tile."""
    done, size = ptx_wgmma.wgmma_wait(raw), plan.n_raw // 2
    parts = [done[i * size : (i + 1) * size] for i in range(plan.tiles * plan.chains)]
    if plan.chains == 1:
        return parts
    return [[x + y for x, y in zip(*parts[2 * i : 2 * i + 2])] for i in range(plan.tiles)]


def scores(plan: Plan, t: Thread, k_tile: Reg, q_tile: Reg, scales, raw) -> list[list[list[tuple]]]:
    """[tile][e][logical column] -> (x, factor): logits in powers of two are x * factor.

    `scales(tile, e)` gives the 8-bit scales: of the slot's key and of every column. `raw`: from `start_scores`.
    """
    n, steps = plan.n_scores, plan.dim * plan.q_bytes // 32
    if plan.packed:
        raw = _finish_scores(plan, raw)
    else:
        row = -(-plan.q_dim * plan.q_bytes // 128) * 128
        b_matrix = ptx_wgmma.matrix(q_tile, rows_apart=row * 8)
        in_row = [(s // 4) * 1024 + (s % 4) * 32 for s in range(row // 32)]
        a_matrix = ptx_wgmma.matrix(k_tile, rows_apart=plan.k_row * 8)
        offsets = [tile * 8 * plan.k_row * 8 + in_row[s] for tile in range(plan.tiles) for s in range(steps)]
        types = {
            "half": ("f32", plan.dtype, plan.dtype),
            "int8": ("s32", "s8", "s8"),
            "fp8_e4m3": ("f32", "e4m3", "e4m3"),
            "fp8_e5m2": ("f32", "e5m2", "e4m3"),
        }[plan.fmt]
        raw = ptx_wgmma.wgmma([[] for _ in range(plan.tiles)], offsets, in_row[:steps] * plan.tiles, b_matrix=b_matrix,
                        a_matrix=a_matrix, n=n, types=types, init=True)  # fmt: skip
    out = []
    for tile in range(plan.tiles):
        rows = []
        for e in range(2):
            own = e * (n // 8) if plan.tile_groups == 2 else 0  # the columns of the row's key group
            pairs = [(raw[tile][4 * (own + nt) + 2 * e], raw[tile][4 * (own + nt) + 2 * e + 1])
                     for nt in range(n // 8)]  # fmt: skip
            if plan.packed:
                field = 2 * (tile % (4 // plan.packed)) + e if plan.packed == 2 else e
                values = [(x, 2.0 ** (24 - plan.packed * field)) for pair in pairs for x in pair]
            elif plan.split:
                key, column = scales(tile, e)
                if plan.fmt == "int8":
                    joined = [ptx.to_float((high << 8) + low) for high, low in pairs]
                else:
                    joined = [ptx.fma(low, 1.0 / SPLIT, high) for high, low in pairs]
                values = [(x, key * c) for x, c in zip(joined, column)]
            else:
                values = [(x, plan.scale * LOG2E) for pair in pairs for x in pair]
            if plan.softcap is not None:
                values = [(_cap(x * by, plan.softcap * LOG2E), 1.0) for x, by in values]
            rows.append(values)
        out.append(rows)
    return out


def _cap(x: Reg, cap: float) -> Reg:
    """cap * tanh(x / cap)."""
    power = ptx.ex2(ptx.maximum(x * (-2.0 * LOG2E / cap), -126.0))
    return (f32(1.0) - power) / (f32(1.0) + power) * cap


def attend_values(plan: Plan):
    """Inline function for the second half of a step: (state, buffer, v, p_tile) -> state, acc += V^T P."""

    def body(ctx, state, buffer, v, p_tile):
        t = Thread(plan)
        acc, reference, sums, zeros = unpack_state(plan, ptx.registers(state))
        n, row = plan.n_values, -(-plan.block * 2 // 128) * 128
        p_address = ptx.smem_address(p_tile) + ptx.scalar(buffer) * (n * row)
        b_matrix = ptx_wgmma.matrix(p_address, rows_apart=row * 8)
        steps = (plan.used or plan.block) * 2 // 32
        b = [(s // 4) * 1024 + (s % 4) * 32 for s in range(steps)]
        v_tile = ptx.smem_address(v)
        types = ("f32", plan.p_type, plan.p_type)
        channel_tiles = plan.dim // 64
        if plan.fmt == "half":
            a_matrix = ptx_wgmma.matrix(v_tile, rows_apart=plan.k_row * 8, leading=1024)
            a = [tile * 1024 + s * 2 * plan.k_row * 8 for tile in range(channel_tiles) for s in range(steps)]
            acc = ptx_wgmma.wgmma(acc, a, b * channel_tiles, b_matrix=b_matrix, a_matrix=a_matrix, n=n, types=types,
                            init=False, a_transposed=True)  # fmt: skip
        else:
            per = min(steps, plan.value_steps)
            for start in range(0, steps, per):
                fragments = _value_fragments(plan, t, v_tile, range(start, start + per))
                a = [regs for tile in fragments for regs in tile]
                acc = ptx_wgmma.wgmma(acc, a, b[start : start + per] * channel_tiles, b_matrix=b_matrix, n=n,
                                types=types, init=False)  # fmt: skip
        return ptx.as_array(pack_state(acc, reference, sums, zeros))

    return body


def _value_fragments(plan: Plan, t: Thread, v_tile: Reg, steps) -> list[list[list[Reg]]]:
    """V^T in registers: [channel tile][step of the contraction] -> 4 registers."""
    out, seen, joined = [[] for _ in range(plan.dim // 64)], {}, {}

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
                regs = _packed_step(plan, word, joined, half, s)
            else:
                regs = _eight_bit_step(plan, t, word, half, s)
            for tile in range(2):
                out[2 * half + tile].append([regs[2 * tile + e][c] for c in range(2) for e in range(2)])
    return out


def _packed_step(plan, word, joined, half, s):
    """Codes times powers of two as f16 denormals: [byte of the word][c]; slots of a step in their natural order.

    A register holds the same field of two neighbouring byte rows, so that their bytes are joined once for all fields.
    """
    bits, fields = plan.packed, 8 // plan.packed
    block, field, rows = s // (2 * fields), s // 2 % fields, s % 2
    mask = ((1 << bits) - 1) << (bits * field)
    regs = [[] for _ in range(4)]
    for c in range(2):
        at = 8 * c + 16 * rows + 32 * block
        for byte in range(4):
            if (at, byte, half) not in joined:
                pair = word(at, half), word(at + 1, half)
                joined[at, byte, half] = ptx.prmt(*pair, (0x44 + byte * 0x11) << 8 | byte * 0x11)
            regs[byte].append(joined[at, byte, half] & (mask | mask << 16))
    return regs


def _eight_bit_step(plan, t, word, half, s):
    """8-bit codes as f16, exact: [byte][c]; 16 slots a step."""
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
            if plan.fmt == "fp8_e4m3":
                regs[byte].append(ptx.e4m3_to_f16(joined, byte % 2 == 1))
                continue
            codes_high = 0x1404 if byte % 2 == 0 else 0x3424  # e5m2 codes are the high bytes of f16
            regs[byte].append(ptx.prmt(joined, 0, codes_high))
    return regs
