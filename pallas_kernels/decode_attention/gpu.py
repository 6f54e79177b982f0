"""Decode attention on Hopper: the Mosaic GPU kernel around `gpu_step`, and which shapes it covers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx
from pallas_kernels.decode_attention import (
    gpu_blocks,
    gpu_memory,
    gpu_products,
    gpu_queries,
    gpu_step,
    gpu_window,
)
from pallas_kernels.decode_attention.gpu_limits import (
    choose_parts,
    choose_splits,
    choose_stages,
    least_block,
    preferred_block,
    resident_ctas,
)
from pallas_kernels.decode_attention.gpu_plan import Plan
from pallas_kernels.decode_attention.gpu_window import WeightLayout
from pallas_kernels.decode_attention.reference import attend_residual, slot_mass
from pallas_kernels.formats import DENSE, KVStore
from pallas_kernels.inline import inline as _inline
from pallas_kernels.inline import raw as _raw
from pallas_kernels.merge_partials import merge_partials

Array = jax.Array
_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def decode_attention_gpu(
    q: Array,  # [batch, q_heads, tokens, head_dim]
    store: KVStore,
    *,
    lengths: Array,  # int32 [batch, kv_heads]
    positions: Array | None,  # int32 [batch, kv_heads, slots + residual]
    q_positions: Array | None,  # int32 [batch, tokens]
    mask: Array | None,  # bool [batch, tokens, new_tokens]
    scale: float,
    window: int | None,
    softcap: float | None,
    table: Array | None,  # int32 [batch, kv_heads, pages]
    blocks: Array | None,  # int32 [batch, kv_heads, n_blocks]
    block_size: int | None,
    return_mass: bool,
    mass_per: str = "query",
    blocks_ascend: bool = False,
    splits: int | None = None,
    stages: int | None = None,
    block: int | None = None,
    parts: tuple[int, int] | None = None,
) -> tuple[Array, Array, Array | None]:
    """(out f32 [batch, q_heads, tokens, head_dim], lse f32 [batch, q_heads, tokens], mass or None)."""
    if blocks is not None and block_size % least_block(store):
        store, lengths, table = gpu_blocks.as_pages(store, lengths, blocks, block_size, blocks_ascend)
        blocks = block_size = None
    batch, q_heads, tokens, dim = q.shape
    kv_heads = lengths.shape[1]
    rows, columns = batch * kv_heads, q_heads // kv_heads * tokens
    slots = store.slots if table is None else store.slots * table.shape[2]
    fmt = "half" if store.format == DENSE else store.format
    block = block or preferred_block(store, math.gcd(store.slots, block_size or store.slots), columns)
    stages = stages or choose_stages(fmt, dim, block, store.group)
    parts = parts or choose_parts(fmt, dim, store.group)
    plan = Plan(
        fmt=fmt, dtype=_NAMES[q.dtype.name], dim=dim, columns=columns, tokens=tokens, block=block,
        stages=stages, scale=scale, softcap=softcap, window=window, group=store.group,
        meta="f32" if store.k_scale is None else _NAMES[store.k_scale.dtype.name],
        causal=q_positions is not None, positions=positions is not None,
        tree=0 if mask is None else mask.shape[2], weights=return_mass,
        key_chunks=parts[0], value_steps=parts[1],
    )  # fmt: skip
    read = slots if blocks is None else blocks.shape[2] * block_size
    splits = splits or choose_splits(rows, read, block, resident_ctas(fmt, store.group))
    skips = window is not None and positions is None and blocks is None
    residual = gpu_window.window_plan(plan, q, store)
    layout = WeightLayout(
        slots, block, store.residual if residual else 0, residual.used if residual else 64, columns,
        plan.weight_columns, plan.reference_columns, plan.bulk,
    )  # fmt: skip
    call = _kernel(plan, residual, layout, rows, kv_heads, splits, store, table, blocks, block_size, skips)
    arrays = {"q": q.reshape(rows, columns, dim), "lengths": lengths.reshape(rows)}
    for name in store.slot_fields():
        arrays[name] = gpu_memory.flat(getattr(store, name), name, fmt)
    if table is not None:
        arrays["table"] = table.reshape(rows, -1)
    if blocks is not None:
        arrays["blocks"] = blocks.reshape(rows, -1)
        arrays["counts"] = (blocks >= 0).sum(-1, dtype=jnp.int32).reshape(rows)
    total = lengths if store.res_lengths is None else lengths + store.res_lengths
    if residual:
        arrays |= {n: getattr(store, n).reshape(rows, -1, dim) for n in ("k_res", "v_res")}
        arrays["res_lengths"] = store.res_lengths.reshape(rows)
        if positions is not None:
            arrays["res_positions"] = positions[..., slots:].reshape(rows, -1)
    if mask is not None:
        bits = jnp.uint32(1) << jnp.arange(mask.shape[2], dtype=jnp.uint32)
        arrays["tree"] = lax.bitcast_convert_type((mask * bits).sum(-1, dtype=jnp.uint32), jnp.int32)
        arrays["total"] = total.reshape(rows)
    if q_positions is not None:
        arrays["q_positions"] = q_positions
    if positions is not None:
        arrays["positions"] = positions[..., :slots].reshape(rows, slots)
    if skips:
        oldest = jnp.where(q_positions < 0, jnp.iinfo(jnp.int32).max, q_positions).min(-1)
        arrays["first_step"] = jnp.maximum(oldest - (window - 1), 0) // block  # [batch]
    out, lse, *weights = call(arrays)
    if out.shape[1] == 1:
        out, lse = out[:, 0], lse[:, 0]
    else:
        out, lse = merge_partials(jnp.moveaxis(out, 1, 0), jnp.moveaxis(lse, 1, 0))
    grouped = (batch, kv_heads, columns)
    out, lse = out.reshape(*grouped, dim), lse.reshape(grouped)
    outside = store.residual and not residual
    if outside:
        rest = dict(lengths=lengths, positions=positions, q_positions=q_positions, mask=mask, scale=scale)
        part = attend_residual(q, store, **rest, window=window, softcap=softcap, slots=slots)
        out, lse = merge_partials([out, part[0]], [lse, part[1]])
    mass = None
    if return_mass:
        written = jnp.arange(slots) < lengths[..., None]
        if blocks is not None:
            written &= _in_blocks(blocks, slots, block_size)
        if skips:
            written &= jnp.arange(slots) >= arrays["first_step"][:, None, None] * block
        if residual:
            inside = jnp.arange(store.residual) < store.res_lengths[..., None]
            written = jnp.concatenate([written, inside], -1)
        mass = gpu_window.mass_of_slots(layout, *weights, lse, written, tokens, mass_per == "kv_head")
        if outside:
            of_window = slot_mass(part[2], lse, tokens)
            if mass_per == "kv_head":
                of_window = of_window.reshape(batch, kv_heads, -1, store.residual).sum(2)
            mass = jnp.concatenate([mass, of_window], axis=-1)
    shape = (batch, q_heads, tokens)
    return out.reshape(*shape, dim), lse.reshape(shape), mass


def _in_blocks(blocks: Array, slots: int, block_size: int) -> Array:
    """bool [batch, kv_heads, slots]: the slot is in one of the blocks."""
    n = slots // block_size
    hit = (blocks[..., None] == jnp.arange(n)).any(2)
    return jnp.repeat(hit, block_size, axis=-1)


def _kernel(plan, window, layout, rows, kv_heads, splits, store, table, blocks, block_size, skips):
    """The kernel as a function of the dict of arrays: (out [rows, parts, columns, dim], lse, weights?, references?).

    The residual window is part 0 where there is one, so that its short CTAs start first and not last.
    """
    page = store.slots
    before = 1 if window else 0
    per, block, stages = store.slots_per_row, plan.block, plan.stages
    unit = min(block, page)
    copies = block // unit
    fields = list(store.slot_fields())
    columns, dim = plan.columns, plan.dim
    out_type = [
        jax.ShapeDtypeStruct((rows, before + splits, columns, dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, before + splits, columns), jnp.float32),
    ]
    if plan.weights:
        out_type += layout.shapes(rows)
    scratch = gpu_memory.scratch(plan, window, store, fields)
    names = ["q", "lengths", *fields]
    names += ["table"] if table is not None else []
    names += ["blocks", "counts"] if blocks is not None else []
    names += ["k_res", "v_res", "res_lengths"] if window else []
    names += ["res_positions"] if window and plan.positions else []
    names += ["tree", "total"] if plan.tree else []
    names += ["q_positions"] if plan.causal else []
    names += ["positions"] if plan.positions else []
    names += ["first_step"] if skips else []

    def body(*refs, **scr):
        ref = dict(zip(names, refs))
        out, lse, *rest = refs[len(names) :]
        row, part = lax.axis_index("row"), lax.axis_index("part")
        split = part - before
        length = ref["lengths"][row]
        raw = {n: _raw(r) for n, r in scr.items()}
        shared = {n: raw[n] for n in ("q_tile", "p_tile", "scratch", "column_scales")}
        if plan.causal:
            shared["q_positions"] = ref["q_positions"].at[lax.div(row, kv_heads)]
        if plan.tree:
            shared["tree"] = ref["tree"].at[lax.div(row, kv_heads)]
        if plan.bulk:
            shared["reference_tile"] = raw["reference_tile"]
        if plan.weights:
            shared |= {"weights": rest[0].at[row], "references": rest[1].at[row]}
        if not window:
            attend(ref, scr, raw, shared, out, lse, row, split, part, length)
            return
        pl.when(part == 0)(lambda: attend_window(ref, raw, shared, out, lse, row, length))
        pl.when(part > 0)(lambda: attend(ref, scr, raw, shared, out, lse, row, split, part, length))

    def attend_window(ref, raw, shared, out, lse, row, length):
        _inline(gpu_queries.load_queries(window), ref["q"].at[row], raw["q_tile"], raw["p_tile"],
                raw["column_scales"])  # fmt: skip
        state = _inline(gpu_step.initial_state(window), result=window.state_registers)
        entries = ref["res_lengths"][row]
        total = ref["total"][row] if plan.tree else length
        args = shared | {"k": raw["k"], "v": raw["v"]}
        positions = []
        if plan.positions:
            args["positions"] = raw["positions"]
            positions = [ref["res_positions"].at[row], raw["positions"]]

        def one(i, state):
            first = i * window.used
            _inline(gpu_window.load_window(window), ref["k_res"].at[row], ref["v_res"].at[row], raw["k"], raw["v"],
                    first, entries, *positions)  # fmt: skip
            valid = jnp.minimum(entries, first + window.used)
            state = _inline(gpu_step.attend_keys(window), state, length + first, length + valid, total, 0,
                            layout.blocks * layout.block + first, layout.blocks + i, args,
                            result=window.state_registers)  # fmt: skip
            state = _inline(gpu_products.attend_values(window), state, 0, raw["v"], raw["p_tile"],
                            result=window.state_registers)  # fmt: skip
            _inline(_sync)
            return state

        state = lax.fori_loop(0, lax.div(entries + (window.used - 1), window.used), one, state)
        _inline(gpu_step.write_partial(window), state, raw["scratch"], out.at[row, 0], lse.at[row, 0])

    def attend(ref, scr, raw, shared, out, lse, row, split, part, length):
        if blocks is None:
            n_steps = lax.div(length + (block - 1), block)
        else:
            n_steps = ref["counts"][row] * (block_size // block)
        skipped = jnp.minimum(ref["first_step"][lax.div(row, kv_heads)], n_steps) if skips else 0
        start, end = (skipped + lax.div(s * (n_steps - skipped), splits) for s in (split, split + 1))

        def first_slot(i):
            if blocks is None:
                return i * block
            ratio = block_size // block
            return ref["blocks"][row, lax.div(i, ratio)] * block_size + lax.rem(i, ratio) * block

        copied = [*fields, "positions"] if plan.positions else fields
        sources, targets = ({n: x[n] for n in copied} for x in (ref, raw))

        def fetch(i, stage):
            first, places = first_slot(i), []
            for c in range(copies):
                slot = first + c * unit
                if table is None:
                    base, inside = row, slot
                else:
                    safe = jnp.minimum(slot, jnp.maximum(length - 1, 0))
                    base, inside = ref["table"][row, lax.div(safe, page)], lax.rem(slot, page)
                places.append({n: gpu_memory.place(plan, n, base, inside, page, per) for n in fields})
            if plan.positions:
                places[0]["positions"] = (row, first)
            _inline(gpu_memory.start_copies(plan, unit), stage, places, sources, targets, raw["barrier"])

        _inline(gpu_memory.start_barriers(plan), raw["barrier"])

        @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
        def _():
            for s in range(stages - 1):

                @pl.when((lax.axis_index("warp") == 0) & (start + s < end))
                def _(s=s):
                    fetch(start + s, jnp.int32(s))

        _inline(
            gpu_queries.load_queries(plan),
            ref["q"].at[row],
            raw["q_tile"],
            raw["p_tile"],
            raw["column_scales"],
        )
        state = _inline(gpu_step.initial_state(plan), result=plan.state_registers)
        if plan.packed:
            pairs = _inline(
                gpu_queries.query_pairs(plan), ref["q"].at[row], result=gpu_queries.query_pair_registers(plan)
            )

        def stage_of(turn):
            return jnp.where(turn >= stages, turn - stages, turn)

        def arrive(turn):
            parity = (turn >= stages).astype(jnp.int32)
            _inline(gpu_memory.await_stage(plan), raw["barrier"], stage_of(turn), parity)

        def scale(turn, buffer):
            arrive(turn)
            stage = stage_of(turn)
            _inline(gpu_queries.scale_queries(plan), pairs, raw["k_scale"].at[stage], raw["k_zero"].at[stage],
                    raw["q_tile"], buffer)  # fmt: skip

        if plan.packed:

            @pl.when(start < end)
            def _():
                scale(jnp.int32(0), 0)

            _inline(_sync)

        def one(i, carry):
            # The turn of a step is its number modulo two rounds of the stages: stage, round and buffer follow from it.
            state, turn = carry
            following = jnp.where(turn == 2 * stages - 1, 0, turn + 1)
            stage, buffer = stage_of(turn), turn & 1
            scores = []
            if plan.packed:
                scores = [_inline(gpu_products.start_scores(plan), raw["k"].at[stage], raw["q_tile"], buffer,
                                  result=plan.score_registers)]  # fmt: skip

                @pl.when(i + 1 < end)
                def _():
                    scale(following, 1 - buffer)

            else:
                arrive(turn)
            args = shared | {n: raw[n].at[stage] for n in fields}
            if plan.positions:
                args["positions"] = raw["positions"].at[stage]
            total = ref["total"][row] if plan.tree else length
            first = first_slot(i)
            state = _inline(gpu_step.attend_keys(plan), state, first, length, total, buffer, first,
                            lax.div(first, block), args, *scores, result=plan.state_registers)  # fmt: skip

            # Everyone has passed this step's barrier, so that the previous step's stage is free. One warp runs
            # the copies' address arithmetic, the other three go on.
            @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
            def _():
                @pl.when((lax.axis_index("warp") == 0) & (i + stages - 1 < end))
                def _():
                    fetch(i + stages - 1, jnp.where(stage == 0, stages - 1, stage - 1))

            state = _inline(gpu_products.attend_values(plan), state, buffer, raw["v"].at[stage], raw["p_tile"],
                            result=plan.state_registers)  # fmt: skip
            return state, following

        state, _ = lax.fori_loop(start, end, one, (state, jnp.int32(0)))
        _inline(gpu_step.write_partial(plan), state, raw["scratch"], out.at[row, part], lse.at[row, part])

    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(before + splits, rows),
        grid_names=("part", "row"),
        kernel_name=f"decode_attention_{plan.fmt}",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=True,
            reduction_scratch_bytes=0,
        ),
    )
    return lambda arrays: kernel(*[arrays[n] for n in names])


def _sync(ctx):
    ptx.fence_async()
    ptx.barrier()
