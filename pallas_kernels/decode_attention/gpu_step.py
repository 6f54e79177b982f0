"""Softmax of the Hopper decode kernel: one step over 64 or 128 slots, its start and its end."""

from __future__ import annotations

import itertools
import math

from pallas_kernels import ptx, ptx_copy
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
        rest = plan.logical * (1 + (plan.repeats if plan.packed else 0))
        return ptx.as_array(acc + [start] * plan.logical + [zero] * rest)

    return body


def attend_keys(plan: Plan):
    """Inline function for the first half of a step: scores, softmax, P into shared memory, one barrier.

    Arguments: state; scalars first slot, row length, total length, buffer, and where the step's slots and its
    reference lie in what `Plan.weights` writes out; refs k, v, k_scale, v_scale, v_zero (stage slices), q_tile,
    p_tile, reference_tile, column_scales, scratch, positions, q_positions, tree, weights, references. Unused refs are None. Returns
    the state; P waits in p_tile[buffer].
    """

    def body(ctx, state, first_slot, length, total, buffer, place, unit, refs, raw=None):
        t = Thread(plan)
        acc, reference, sums, zeros = unpack_state(plan, ptx.registers(state))
        first, length, total, buffer, place, unit = (
            ptx.scalar(x) for x in (first_slot, length, total, buffer, place, unit)
        )
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
        tokens = [t.column(j) % plan.columns % plan.tokens for j in range(plan.logical)]
        factor = P_SCALE[plan.p_type]
        sees, scales, zero_points = {}, {}, {}
        for tile in range(plan.tiles):
            for e in range(2):
                local = t.slot(tile, e)
                slot = first + local
                live = slot < length
                sees[tile, e] = _visible(plan, slot, live, local, total, tokens, address)
                if plan.fmt != "half":
                    found = _value_scales(plan, t, tile, e, live, factor, address)
                    scales |= found[0]
                    zero_points |= found[1]
        p_tile = address["p_tile"] + buffer * (plan.n_values * -(-plan.block * 2 // 128) * 128)
        keys = [(tile, e, j) for tile in range(plan.tiles) for e in range(2) for j in range(plan.logical)]
        repeats = range(plan.repeats)
        if plan.bulk:
            reference_tile = address["reference_tile"] + buffer * (plan.reference_columns * 4)

        def probabilities(reference):
            """Write P for this reference; (largest P, sum of p, sum of p * zero) of the thread's columns."""
            minus = [f32(0.0) - x for x in reference]
            p = {}
            for a, e, j in keys:
                x, by = s[a][e][j]
                p[a, e, j] = ptx.ex2(ptx.select(sees[a, e][j], ptx.fma(x, by, minus[j]), -math.inf))
            words = _pack_weights(plan, p) if plan.weights and not plan.bulk else []
            if plan.bulk:
                _write_columns(plan, t, reference_tile, reference)
            scaled = {
                (*k, r): p[k] * scales[*k, r] if scales else p[k] * factor if factor != 1.0 else p[k]
                for k in keys for r in repeats
            }  # fmt: skip
            largest = _write_probabilities(plan, t, p_tile, scaled)
            part, zero_part = [], []
            for j in range(plan.logical):
                mine = [k for k in keys if k[2] == j]
                part.append(_sum([p[k] for k in mine]))
                for r in repeats if plan.packed else ():
                    total_zero = p[mine[0]] * zero_points[*mine[0], r]
                    for k in mine[1:]:
                        total_zero = ptx.fma(p[k], zero_points[*k, r], total_zero)
                    zero_part.append(total_zero)
            return largest, part, zero_part, words

        largest, part, zero_part, words = probabilities(reference)
        if (plan.fmt == "half" and not plan.used) or plan.fmt.startswith("fp8"):
            ptx.if_(
                first + plan.block > length,
                lambda: _blank_values(plan, t, address["v"], length - first) or [],
            )
        if plan.bulk:  # the other P tile, written in the next step, has left shared memory
            ptx.if_(t.index.equals(0), lambda: ptx_copy.bulk_wait() or [])
        ptx.fence_async()
        moved = ptx.barrier_any(largest > factor * 2.0**HEADROOM)

        def move():
            peak = []
            for j in range(plan.logical):
                best = reference[j]
                for k in (k for k in keys if k[2] == j):
                    x, by = s[k[0]][k[1]][j]
                    value = ptx.select(sees[k[0], k[1]][j], x * by, -math.inf)
                    for r in repeats if scales else ():
                        scale = ptx.lg2(scales[*k, r]) - math.log2(factor)
                        best = ptx.maximum(best, value + scale)
                    best = best if scales else ptx.maximum(best, value)
                peak.append(best)
            peak = _reduce(plan, t, peak, address["scratch"], ptx.maximum)
            alpha = [ptx.ex2(old - new) for old, new in zip(reference, peak)]
            _, part, zero_part, words = probabilities(peak)
            ptx.fence_async()
            ptx.barrier()
            scaled = [[r * alpha[_alpha_index(plan, i)] for i, r in enumerate(tile)] for tile in acc]
            by_zero = [a for a in alpha for _ in repeats]
            state = pack_state(
                scaled, peak, [ptx.fma(x, a, y) for x, a, y in zip(sums, alpha, part)],
                [ptx.fma(x, a, y) for x, a, y in zip(zeros, by_zero, zero_part)],
            )  # fmt: skip
            return state + words

        added = [x + y for x, y in zip(sums, part)], [x + y for x, y in zip(zeros, zero_part)]
        state = ptx.if_(moved, move, pack_state(acc, reference, *added) + words)
        state, words = state[: plan.state_registers], state[plan.state_registers :]
        if plan.weights:
            base = address["references"] + ptx.wide(unit * (plan.reference_columns * 4))
            if plan.bulk:
                to = address["weights"] + ptx.wide(place * (plan.weight_columns * 2))

                def write_out():
                    ptx_copy.bulk_store(to, p_tile, plan.columns * 128)
                    ptx_copy.bulk_store(base, reference_tile, plan.reference_columns * 4)
                    return []

                ptx.if_(t.index.equals(0), write_out)
            else:
                _write_weights(plan, t, words, place, address["weights"])
                _write_columns(plan, t, base, unpack_state(plan, state)[1])
        return ptx.as_array(state)

    return body


def _value_scales(
    plan: Plan, t: Thread, tile: int, e: int, live, factor: float, address
) -> tuple[dict, dict]:
    """What P is multiplied by and (packed) the zero points, 0 past the length: {(tile, e, column, repeat): ...}."""
    # Codes come out of V times 2 ** (bits field); P takes that back.
    field = (2 * (tile % (4 // plan.packed)) if plan.packed == 2 else 0) + e
    by, size, local = factor * 2.0 ** -(plan.packed * field), 4 if plan.meta == "f32" else 2, t.slot(tile, e)
    scales, zeros = {}, {}
    for j in range(plan.logical):
        for r in range(plan.repeats):
            key, before = (tile, e, j, r), (tile, e, j - 1, r)
            if j and (not plan.packed or (j % 2 and plan.columns % 2 == 0)):
                scales[key] = scales[before]
                if plan.packed:
                    zeros[key] = zeros[before]
                continue
            at = local * size
            if plan.packed:
                group = t.column(j) // plan.columns
                group = ptx.select(group < plan.copies, group, 0) + r * plan.copies
                at = (group * plan.block + local) * size
                zeros[key] = ptx.select(live, load_meta(plan, address["v_zero"] + at), 0.0)
            scales[key] = ptx.select(live, load_meta(plan, address["v_scale"] + at) * by, 0.0)
    return scales, zeros


def _alpha_index(plan: Plan, i: int) -> int:
    """Logical column of accumulator register i of a tile; of padding, any."""
    j = 2 * (i // 4) + i % 2
    return j % plan.logical if plan.packed else min(j, plan.logical - 1)


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


def _weight_places(plan: Plan):
    """(tile, e, logical column) of every word of weights that a thread writes, the first copy of every column."""
    for tile, e, j in itertools.product(
        range(plan.tiles), (0, 1), range(0, plan.logical, 1 if plan.split else 2)
    ):
        if 4 * j < plan.weight_columns:
            yield tile, e, j


def _pack_weights(plan: Plan, p: dict) -> list[Reg]:
    """p as bf16, two columns a word (8 bits: one)."""
    zero = f32(0.0)
    return [ptx.pack_half(p[tile, e, j], zero if plan.split else p[tile, e, j + 1], "bf16")
            for tile, e, j in _weight_places(plan)]  # fmt: skip


def _write_weights(plan: Plan, t: Thread, words: list[Reg], place: Reg, weights: Reg) -> None:
    """Words of `_pack_weights` into [slots, weight_columns]."""
    size = 2 if plan.split else 4
    for (tile, e, j), word in zip(_weight_places(plan), words, strict=True):
        column = t.column(j)
        at = weights + ptx.wide(((place + t.slot(tile, e)) * plan.weight_columns + column) * 2)
        ptx.if_(column < plan.weight_columns, lambda at=at, word=word: ptx.store(at, word, size) or [])


def _write_columns(plan: Plan, t: Thread, base: Reg, values: list[Reg]) -> None:
    """One f32 per column."""
    first_row = ptx.both(t.warp.equals(0), t.row.equals(0))
    for j, value in enumerate(values):
        column = t.column(j)
        at = base + (column * 4 if base.kind == "r" else ptx.wide(column * 4))
        ptx.if_(ptx.both(first_row, column < plan.columns), lambda at=at, v=value: ptx.store(at, v) or [])


def _write_probabilities(plan: Plan, t: Thread, p_tile: Reg, p: dict) -> Reg:
    """P into its tile [columns, block], in the order of contraction of the format; returns the largest P."""
    row, kind, largest = -(-plan.block * 2 // 128) * 128, plan.p_type, None
    for tile in range(plan.tiles):
        for j in range(plan.logical):
            for r in range(plan.repeats):
                word = ptx.pack_half(p[tile, 0, j, r], p[tile, 1, j, r], kind)
                largest = word if largest is None else ptx.half_maximum(largest, word, kind)
                column = t.value_column(j, r)
                if not plan.split:
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
        # The scratch area holds `logical` values at a time.
        zeros = [_reduce(plan, t, zeros[r :: plan.repeats], area, add) for r in range(plan.repeats) if zeros]
        zeros = [x for by_column in zip(*zeros) for x in by_column]
        some = [s > 0.0 for s in sums]
        inverse = [ptx.select(x, f32(1.0) / s, 0.0) for x, s in zip(some, sums)]
        base, lse_base = ptx.global_address(out), ptx.global_address(lse)
        unit = 2.0**24 if plan.packed else 1.0
        by = unit / P_SCALE[plan.p_type]
        tiles = plan.n_values // 8 // plan.repeats
        for tile, nt, e, p in itertools.product(
            range(plan.dim // 64), range(plan.n_values // 8), (0, 1), (0, 1)
        ):
            j, repeat = 2 * (nt % tiles) + p, nt // tiles
            if j < plan.logical:
                value = acc[tile][4 * nt + 2 * e + p] * by
                zero = zeros[j * plan.repeats + repeat] if plan.packed else None
                _write_one(plan, t, base, tile, e, j, repeat, value, inverse[j], zero)
        found = [ptx.select(x, (r + ptx.lg2(s)) * math.log(2.0), -math.inf)
                 for x, r, s in zip(some, reference, sums)]  # fmt: skip
        _write_columns(plan, t, lse_base, found)
        if plan.bulk:
            ptx.if_(t.index.equals(0), lambda: ptx_copy.bulk_wait() or [])

    return body


def _write_one(plan, t, base, tile, e, j, repeat, value, inverse, zero) -> None:
    column, row = t.column(j), channel(t, tile, e)
    wanted = column < plan.columns
    head = column
    if plan.packed:
        value = value + zero
        group = column // plan.columns + repeat * plan.copies
        wanted = ptx.both(group.equals(row // plan.group), column < plan.columns * plan.copies)
        head = column % plan.columns
    value = value * inverse
    at = base + ptx.wide((head * plan.dim + row) * 4)
    ptx.if_(wanted, lambda: ptx.store(at, value) or [])
