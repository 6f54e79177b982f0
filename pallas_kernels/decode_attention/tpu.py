"""Decode attention through Mosaic TPU: every storage format, Dense and Ragged, in one kernel.

The grid is ((row, KV head), step). Both layouts are a pool [pages, slots, ...] to the kernel: Dense is one
page per (row, head), fetched in units of a few hundred slots; Ragged fetches several pages a step, each
through an index map that reads the scalar-prefetched schedule. Units past a row's length repeat the last
index, which Pallas does not fetch again, so the bytes read follow the lengths. Softmax state stays in VMEM
across the steps.

Slots seen by each query come either from two bounds a row (no positions, tree or block table) or from one
int32 a slot whose bit t says that token t sees it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tpu_plan import Fetch, Schedule, make_schedule
from pallas_kernels.formats import DENSE, EIGHT_BIT, PACKED_BITS, KVStore
from pallas_kernels.merge_partials import merge_partials
from pallas_kernels.platform import dot_precision

Array = jax.Array

_LOW = -1e30  # running maximum before any slot was seen; finite, so that no inf - inf arises
_LANES = 128
_SMEM_ENTRIES = 192 * 1024  # int32 schedule entries a launch may prefetch; SMEM holds 1 MiB on v5e and 7x


def unsupported(q: Array, store: KVStore, *, table, blocks, block_size) -> str | None:
    """Why the kernel cannot run on these operands, or None."""
    if q.dtype == jnp.float16 or store.k.dtype == jnp.float16:
        return "dtype float16 (TPUs compute in bfloat16 and float32)"
    if store.format == DENSE and store.k.dtype != q.dtype and q.dtype == jnp.bfloat16:
        return f"kv.k is {store.k.dtype} and q bfloat16; cast one of them"
    rows = 32 if store.format != DENSE else 32 // store.k.dtype.itemsize
    unit = block_size if blocks is not None else store.slots
    if table is not None:
        unit = store.slots if blocks is None else math.gcd(block_size, store.slots)
    if (table is not None or blocks is not None) and unit % rows:
        return f"pages or blocks of {unit} slots (multiples of {rows} are supported for {store.format})"
    return None


def decode_attention_tpu(
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
    interpret: Any = False,
) -> tuple[Array, Array, Array | None]:
    """(out f32 [batch, q_heads, tokens, head_dim], lse f32 [batch, q_heads, tokens], mass or None).

    Operands as `ops.decode_attention` validates them. The residual window is a second, small part in XLA,
    merged by its log-sum-exp.
    """
    batch, q_heads, tokens, dim = q.shape
    kv_heads = lengths.shape[1]
    group = q_heads // kv_heads
    schedule = make_schedule(
        store, tokens, lengths=lengths, positions=positions, q_positions=q_positions, mask=mask,
        window=window, table=table, blocks=blocks, block_size=block_size, return_mass=return_mass,
    )  # fmt: skip
    work = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
    rows = -(-group * tokens // 8) * 8
    grouped = q.astype(work).reshape(batch * kv_heads, group * tokens, dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, rows - group * tokens), (0, 0)))
    settings = _Settings(store.format, store.group, tokens, scale, softcap, return_mass, interpret)
    out, lse, logits = _launches(grouped, schedule, settings)

    shape = (batch, q_heads, tokens)
    out = out[:, : group * tokens].reshape(*shape, dim)
    lse = lse[:, : group * tokens, 0].reshape(shape)
    part = None
    if store.residual:
        part = _residual(q, store, schedule.residual_seen, scale, softcap)
        out, lse = merge_partials([out, part[0]], [lse, part[1]])
    if not return_mass:
        return out, lse, None
    logits = logits[:, : group * tokens].reshape(batch, kv_heads, group * tokens, -1)
    mass = _mass(logits.reshape(*shape, -1), lse)
    mass = schedule.to_slots(mass)
    if part is not None:
        mass = jnp.concatenate([mass, _mass(part[2], lse)], axis=-1)
    return out, lse, mass


def _mass(logits: Array, lse: Array) -> Array:
    """[batch, q_heads, tokens, n] logits -> probability summed over the tokens [batch, q_heads, n]."""
    return jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None]).sum(2)


def _residual(q, store: KVStore, seen: Array, scale: float, softcap: float | None):
    """Attention over the residual window: (out f32, lse, logits f32 [batch, q_heads, tokens, residual])."""
    batch, q_heads, tokens, dim = q.shape
    kv_heads = store.k_res.shape[1]
    q32 = q.astype(jnp.float32).reshape(batch, kv_heads, q_heads // kv_heads, tokens, dim)
    k, v = (x.astype(jnp.float32) for x in (store.k_res, store.v_res))
    v = jnp.where(seen.any(2)[..., None], v, 0.0)
    exact = dot_precision(jnp.float32)
    logits = jnp.einsum("bhgtd,bhsd->bhgts", q32, k, precision=exact) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    probs = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None])
    out = jnp.einsum("bhgts,bhsd->bhgtd", probs, v, precision=exact)
    shape = (batch, q_heads, tokens)
    return out.reshape(*shape, dim), lse.reshape(shape), logits.reshape(*shape, -1)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Static properties of a launch."""

    format: str
    group: int
    tokens: int
    scale: float
    softcap: float | None
    keep_logits: bool
    interpret: Any


def _launches(q: Array, schedule: Schedule, settings: _Settings):
    """One launch, or several over ranges of (row, head) where the schedule would overflow SMEM."""
    heads = q.shape[0]
    entries = 0 if schedule.units is None else schedule.units.size
    per = -(-heads // max(1, -(-entries // _SMEM_ENTRIES)))
    parts = []
    for start in range(0, heads, per):
        cut = slice(start, start + per)
        parts.append(_launch(q[cut], schedule.rows(cut), settings))
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _launch(q: Array, plan: Schedule, settings: _Settings):
    heads, rows, dim = q.shape
    bits = [] if plan.bits is None else [plan.bits]
    prefetch = [plan.starts, plan.counts, plan.bounds]
    if plan.units is not None:
        prefetch.append(plan.units.reshape(-1))
    per_step = plan.chunks * plan.unit

    def unit_of(chunk: int, head, step, scalars):
        """Pool unit that `chunk` of `step` reads; past the end its last one again, which costs no fetch."""
        first, last = scalars[0][head] + chunk, scalars[1][head] - 1
        step = jnp.minimum(step, jnp.maximum(last - first, 0) // plan.chunks)
        at = jnp.minimum(first + step * plan.chunks, jnp.maximum(last, 0))
        if plan.units is None:
            return (plan.first_head + head) * plan.units_per_page + at
        return scalars[3][head * plan.max_units + at]

    def spec(fetch: Fetch, chunk: int) -> pl.BlockSpec:
        def index(head, step, *scalars):
            unit = unit_of(chunk, head, step, scalars)
            page, part = (unit, 0) if fetch.whole else (
                unit // plan.units_per_page, unit % plan.units_per_page)  # fmt: skip
            return (page, part, 0) if fetch.axis == 1 else (page, 0, part)

        return pl.BlockSpec((1, *fetch.block), index)

    fixed = lambda head, step, *_: (head, 0, 0)  # noqa: E731
    moving = lambda head, step, *_: (head, 0, step)  # noqa: E731
    in_specs = [pl.BlockSpec((1, rows, dim), fixed)]
    in_specs += [pl.BlockSpec((1, 1, per_step), moving)] * len(bits)
    operands = [q, *bits]
    for chunk in range(plan.chunks):
        for fetch in plan.fetches:
            in_specs.append(spec(fetch, chunk))
            operands.append(fetch.array)
    out_specs = [pl.BlockSpec((1, rows, dim), fixed), pl.BlockSpec((1, rows, _LANES), fixed)]
    out_shape = [
        jax.ShapeDtypeStruct((heads, rows, dim), jnp.float32),
        jax.ShapeDtypeStruct((heads, rows, _LANES), jnp.float32),
    ]
    if settings.keep_logits:
        out_specs.append(pl.BlockSpec((1, rows, per_step), moving))
        out_shape.append(jax.ShapeDtypeStruct((heads, rows, plan.steps * per_step), jnp.float32))
    kernel = functools.partial(_kernel, plan=_Static.of(plan, len(prefetch)), settings=settings)
    result = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(heads, plan.steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((rows, _LANES), jnp.float32),
                pltpu.VMEM((rows, _LANES), jnp.float32),
                pltpu.VMEM((rows, dim), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        cost_estimate=plan.cost(q, settings.keep_logits),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=settings.interpret,
        name=f"decode_attention_{settings.format}",
    )(*prefetch, *operands)
    return result if settings.keep_logits else (*result, None)


@dataclasses.dataclass(frozen=True)
class _Static:
    """The numbers of a schedule that the kernel body needs."""

    unit: int
    chunks: int
    steps: int
    has_bits: bool
    fields: tuple[str, ...]
    scalars: int

    @classmethod
    def of(cls, plan: Schedule, scalars: int) -> _Static:
        return cls(
            plan.unit, plan.chunks, plan.steps, plan.bits is not None, tuple(f.name for f in plan.fetches),
            scalars,
        )  # fmt: skip


def _kernel(*refs, plan: _Static, settings: _Settings):
    scalars, refs = refs[: plan.scalars], refs[plan.scalars :]
    starts, counts, bounds = scalars[:3]
    q_ref, refs = refs[0], refs[1:]
    bits_ref = None
    if plan.has_bits:
        bits_ref, refs = refs[0], refs[1:]
    width = len(plan.fields)
    chunks = [dict(zip(plan.fields, refs[c * width : (c + 1) * width])) for c in range(plan.chunks)]
    refs = refs[plan.chunks * width :]
    out_ref, lse_ref = refs[:2]
    logits_ref = refs[2] if settings.keep_logits else None
    top_ref, total_ref, acc_ref = refs[-3:]
    head, step = pl.program_id(0), pl.program_id(1)
    rows, n = q_ref.shape[1], plan.chunks * plan.unit

    @pl.when(step == 0)
    def _init():
        top_ref[...] = jnp.full_like(top_ref, _LOW)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    first = starts[head] + step * plan.chunks
    live = first < counts[head]

    def stacked(name: str, axis: int):
        parts = [chunk[name][0] for chunk in chunks]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)

    @pl.when(live)
    def _attend():
        q = q_ref[0]
        seen, used = _seen(first * plan.unit, head, rows, n, bits_ref, bounds, settings.tokens)
        dot = functools.partial(
            lax.dot_general, preferred_element_type=jnp.float32, precision=dot_precision(q.dtype)
        )
        logits = dot(q, _keys(stacked, settings, q.dtype), (((1,), (1,)), ((), ())))
        if settings.format in EIGHT_BIT:
            logits *= _float32(stacked("k_scale", 1))
        logits *= settings.scale
        if settings.softcap is not None:
            logits = settings.softcap * jnp.tanh(logits / settings.softcap)
        logits = jnp.where(seen, logits, -jnp.inf)
        if logits_ref is not None:
            logits_ref[0] = logits
        top = top_ref[:, :1]
        new_top = jnp.maximum(top, logits.max(axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - new_top), 0.0)
        rescale = jnp.exp(top - new_top)
        total_ref[...] = total_ref[...] * rescale + weights.sum(axis=1, keepdims=True)
        top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
        acc_ref[...] = acc_ref[...] * rescale + _values(stacked, settings, weights, seen, used, q.dtype, dot)

    if logits_ref is not None:

        @pl.when(jnp.logical_not(live))
        def _dead():
            logits_ref[0] = jnp.full_like(logits_ref[0], -jnp.inf)

    @pl.when(step == plan.steps - 1)
    def _finish():
        total = total_ref[...]
        empty = total <= 0.0
        out_ref[0] = acc_ref[...] / jnp.where(empty, 1.0, total)[:, :1]
        lse_ref[0] = jnp.where(empty, -jnp.inf, top_ref[...] + jnp.log(jnp.where(empty, 1.0, total)))


def _seen(start, head, rows: int, n: int, bits_ref, bounds, tokens: int):
    """(bool [rows, n]: the row's token sees the slot, bool [n, 1]: the slot holds something to read)."""
    token = lax.broadcasted_iota(jnp.int32, (rows, 1), 0) % tokens
    if bits_ref is not None:
        bits = bits_ref[0]  # int32 [1, n]
        seen = (lax.shift_right_logical(jnp.broadcast_to(bits, (rows, n)), token) & 1) != 0
        # Lanes to sublanes: the mask of V's rows.
        column = jnp.broadcast_to(bits, (8, n)).T[:, :1]
        return seen, column != 0
    slot = start + lax.broadcasted_iota(jnp.int32, (rows, n), 1)
    low = jnp.zeros((rows, 1), jnp.int32)
    high = jnp.zeros((rows, 1), jnp.int32)
    last = jnp.int32(0)
    for t in range(tokens):
        at = (head * tokens + t) * 2
        low = jnp.where(token == t, bounds[at], low)
        high = jnp.where(token == t, bounds[at + 1], high)
        last = jnp.maximum(last, bounds[at + 1])
    used = start + lax.broadcasted_iota(jnp.int32, (n, 1), 0) < last
    return (slot >= low) & (slot < high), used


def _float32(x):
    """Scales and zeros as float32; int16 is the bits of float16, which TPUs do not load.

    The exponents differ by 112, so the shifted bits are the value times 2**-112; subnormals are whole numbers
    of 2**-24, taken apart because TPUs flush those of float32 to 0.
    """
    if x.dtype != jnp.int16:
        return x.astype(jnp.float32)
    bits = x.astype(jnp.int32)
    small = (bits & 0x7C00) == 0
    magnitude = lax.bitcast_convert_type((bits & 0x7FFF) << 13, jnp.float32) * 2.0**112
    magnitude = jnp.where(small, (bits & 0x3FF).astype(jnp.float32) * 2.0**-24, magnitude)
    return jnp.where(bits < 0, -magnitude, magnitude)


def _unpack(packed, bits: int):
    """uint8 [rows, head_dim] -> codes float32 [rows * 8 / bits, head_dim] in slot order (see formats)."""
    words = packed.astype(jnp.int32)
    parts = []
    for block in range(words.shape[0] // 32):
        rows = words[block * 32 : (block + 1) * 32]
        parts += [lax.shift_right_logical(rows, bits * j) & (2**bits - 1) for j in range(8 // bits)]
    return jnp.concatenate(parts, axis=0).astype(jnp.float32)


def _keys(stacked, settings: _Settings, dtype):
    """Keys of the step in `dtype`; for 8 bits without their scale, which multiplies the logits."""
    if settings.format not in PACKED_BITS:
        return stacked("k", 0).astype(dtype)
    codes = _unpack(stacked("k", 0), PACKED_BITS[settings.format])
    n, dim = codes.shape
    scale, zero = (_float32(stacked(name, 0))[:, None, :] for name in ("k_scale", "k_zero"))
    # In registers only: on the MXU a separate product per token group would cost as much as all of them.
    grouped = codes.reshape(n // settings.group, settings.group, dim) * scale + zero
    return grouped.reshape(n, dim).astype(dtype)


def _values(stacked, settings: _Settings, weights, seen, used, dtype, dot):
    """weights [rows, n] times the values of the step: f32 [rows, head_dim]."""
    plain = (((1,), (0,)), ((), ()))
    if settings.format in PACKED_BITS:
        codes = _unpack(stacked("v", 0), PACKED_BITS[settings.format]).astype(dtype)
        scale, zero = (_float32(stacked(name, 1)) for name in ("v_scale", "v_zero"))
        channel = lax.broadcasted_iota(jnp.int32, (1, codes.shape[1]), 1) // settings.group
        out = jnp.zeros((weights.shape[0], codes.shape[1]), jnp.float32)
        for j in range(codes.shape[1] // settings.group):
            scaled = jnp.where(seen, weights * scale[j : j + 1], 0.0)
            shift = jnp.where(seen, weights * zero[j : j + 1], 0.0).sum(axis=1, keepdims=True)
            out = jnp.where(channel == j, dot(scaled.astype(dtype), codes, plain) + shift, out)
        return out
    v = stacked("v", 0).astype(dtype)
    if settings.format != "int8":  # integers are finite whatever an empty slot holds
        v = jnp.where(used, v, jnp.zeros((), dtype))
    if settings.format in EIGHT_BIT:
        weights = jnp.where(seen, weights * _float32(stacked("v_scale", 1)), 0.0)
    return dot(weights.astype(dtype), v, plain)
