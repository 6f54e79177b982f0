"""Softmax of the Hopper decode kernel: one step over 64 or 128 slots, its start and its end."""

from __future__ import annotations

import math

from pallas_kernels import ptx
from pallas_kernels.decode_attention.gpu_plan import (
    HEADROOM,
    P_SCALE,
    Plan,
    Thread,
    channel,
    load_meta,
    pack_state,
    tile_offset,
    unpack_state,
)
from pallas_kernels.decode_attention.gpu_products import scores
from pallas_kernels.ptx import Reg, f32

_START = -1e30  # reference before any slot was seen


def initial_state(plan: Plan):
    """State before any slot: an inline function without arguments."""

    def body(ctx):
        zero, start = f32(0.0), f32(_START)
        acc = [zero] * plan.acc_registers
        return ptx.as_array(
            acc + [start] * plan.logical + [zero] * (plan.logical * (2 if plan.packed else 1))
        )

    return body


def attend_keys(plan: Plan):
    """Inline function for the first half of a step: scores, softmax, P into shared memory, one barrier.

    Arguments: state; scalars first slot, row length, total length, buffer, and stage; refs k, v, k_scale, v_scale,
    v_zero (stage slices), q_tile, p_tile, column_scales, scratch, positions, q_positions, tree, logits, new_q
    arguments. Unused refs are None. Returns the state; P waits in p_tile[buffer].
    """

    def body(ctx, state, first_slot, length, total, buffer, refs, raw=None):
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
            return load_meta(plan, address["k_scale"] + t.slot(tile, e) * size), column_scales

        raw = ptx.registers(raw) if plan.packed else None
        s = scores(plan, t, address["k"], address["q_tile"], key_scales, raw)
        weights, offsets, sees = {}, {}, {}
        tokens = [t.column(j) % plan.columns % plan.tokens for j in range(plan.logical)]
        factor = P_SCALE[plan.p_type]
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
                    scale = load_meta(plan, address["v_scale"] + at)
                    weights[key], offsets[key] = ptx.select(live, scale * by, 0.0), None
                    if plan.packed:
                        offsets[key] = ptx.select(live, load_meta(plan, address["v_zero"] + at), 0.0)
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
            scaled = {
                k: p[k] * weights[k] if weights else p[k] * factor if factor != 1.0 else p[k] for k in keys
            }
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
            ptx.if_(
                first + plan.block > length,
                lambda: _blank_values(plan, t, address["v"], length - first) or [],
            )
        ptx.fence_async()
        moved = ptx.barrier_any(largest > factor * 2.0**HEADROOM)

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
                scaled, peak, [ptx.fma(x, a, y) for x, a, y in zip(sums, alpha, part)],
                [ptx.fma(x, a, y) for x, a, y in zip(zeros, alpha, zero_part)],
            )  # fmt: skip

        added = [x + y for x, y in zip(sums, part)], [x + y for x, y in zip(zeros, zero_part)]
        return ptx.as_array(ptx.if_(moved, move, pack_state(acc, reference, *added)))

    return body


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
        by = unit / P_SCALE[plan.p_type]
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
