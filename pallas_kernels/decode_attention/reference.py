"""Decode attention in plain XLA: the oracle on every platform and the path on CPU."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.visibility import visible_slots
from pallas_kernels.formats import DENSE, EIGHT_BIT, PACKED_BITS, KVStore, pack_block, unpack
from pallas_kernels.platform import dot_precision, target_platform

Array = jax.Array
_CHUNK = 1024  # slots decoded at a time where the cache is paged, blocked or quantized


@dataclasses.dataclass(frozen=True)
class _Query:
    """What stays the same for every chunk of slots."""

    q: Array  # [batch, kv_heads, group * tokens, head_dim], dtype of the products
    tokens: int
    scale: float
    softcap: float | None


def decode_attention_xla(
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
) -> tuple[Array, Array, Array | None]:
    """(out f32 [batch, q_heads, tokens, head_dim], lse f32 [batch, q_heads, tokens], mass or None)."""
    batch, q_heads, tokens, dim = q.shape
    kv_heads = lengths.shape[1]
    half = store.format != DENSE and q.dtype.itemsize == 2 and target_platform() == "gpu"
    work = q.dtype if half or (store.format == DENSE and q.dtype == store.k.dtype) else jnp.float32
    grouped = q.astype(work).reshape(batch, kv_heads, q_heads // kv_heads * tokens, dim)
    query = _Query(grouped, tokens, scale, softcap)
    total = lengths if store.res_lengths is None else lengths + store.res_lengths
    sees = functools.partial(
        visible_slots, total=total, q_positions=q_positions, mask=mask, window=window, tokens=tokens
    )
    slots = store.slots if table is None else store.slots * table.shape[2]

    def visible(ids: Array) -> Array:
        safe = jnp.clip(ids, 0, slots - 1)
        pos = None if positions is None else jnp.take_along_axis(positions, safe, axis=-1)
        return sees(ids, valid=(ids >= 0) & (ids < lengths[..., None]), positions=pos)

    whole = store.format == DENSE or (
        half and store.format in EIGHT_BIT
    )  # packed codes would be unpacked in memory
    if whole and table is None and blocks is None:
        ids = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, kv_heads, slots))
        pos = None if positions is None else positions[..., :slots]
        seen = sees(ids, valid=ids < lengths[..., None], positions=pos)
        state = _whole(query, store, seen)
        logits = state[-1]
    else:
        state, logits, ids = _chunked(query, store, table, blocks, block_size, slots, visible, return_mass)
    peak, total_mass, acc = state[:3]
    if store.residual:
        part = _residual(query, store, lengths, positions, slots, sees)
        peak, total_mass, acc = _join((peak, total_mass, acc), part[:3])
    out, lse = _finish(peak, total_mass, acc)
    mass = None
    if return_mass:
        mass = slot_mass(logits, lse, tokens)
        mass = mass[..., :slots] if blocks is None else _scatter(mass, ids, slots)
        if store.residual:
            mass = jnp.concatenate([mass, slot_mass(part[-1], lse, tokens)], axis=-1)
    shape = (batch, q_heads, tokens)
    return out.reshape(*shape, dim), lse.reshape(shape), mass


def attend_residual(
    q: Array,  # [batch, q_heads, tokens, head_dim]
    store: KVStore,
    *,
    lengths: Array,
    positions: Array | None,
    q_positions: Array | None,
    mask: Array | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    slots: int,
) -> tuple[Array, Array, Array]:
    """Attention over the residual window alone.

    Returns: out f32 [batch, kv_heads, group * tokens, head_dim], lse and logits [batch, kv_heads, group * tokens
    (, residual)].
    """
    batch, q_heads, tokens, dim = q.shape
    kv_heads = lengths.shape[1]
    query = _Query(q.reshape(batch, kv_heads, q_heads // kv_heads * tokens, dim), tokens, scale, softcap)
    sees = functools.partial(
        visible_slots, total=lengths + store.res_lengths, q_positions=q_positions, mask=mask, window=window,
        tokens=tokens,
    )  # fmt: skip
    *state, logits = _residual(query, store, lengths, positions, slots, sees)
    return *_finish(*state), logits


def _residual(query: _Query, store: KVStore, lengths: Array, positions: Array | None, slots: int, sees):
    """(peak, total, acc, logits) of the residual window, in float32."""
    place = jnp.arange(store.residual, dtype=jnp.int32)
    ids = place + lengths[..., None]
    pos = None if positions is None else positions[..., slots:]
    valid = jnp.broadcast_to(place < store.res_lengths[..., None], ids.shape)
    window = KVStore(store.k_res.astype(jnp.float32), store.v_res.astype(jnp.float32))
    query = dataclasses.replace(query, q=query.q.astype(jnp.float32))
    return _whole(query, window, sees(ids, valid=valid, positions=pos))


def _finish(peak: Array, total: Array, acc: Array) -> tuple[Array, Array]:
    """Online-softmax state -> (out, lse); 0 and -inf where nothing was visible."""
    some = total > 0
    out = acc / jnp.where(some, total, 1.0)[..., None]
    return out, jnp.where(some, jnp.log(total) + peak, -jnp.inf)


def slot_mass(logits: Array, lse: Array, tokens: int) -> Array:
    """Probability of every slot, summed over the tokens.

    Args:
      logits: [batch, kv_heads, group * tokens, n], -inf where invisible; lse: [batch, kv_heads, group * tokens].
      tokens: query tokens.

    Returns: [batch, q_heads, n].
    """
    finite = jnp.where(lse == -jnp.inf, 0.0, lse)
    prob = jnp.exp(logits - finite[..., None])
    batch, kv_heads, rows, n = prob.shape
    return prob.reshape(batch, kv_heads * (rows // tokens), tokens, n).sum(2)


def _scatter(mass: Array, ids: Array, slots: int) -> Array:
    """Columns in the order they were read -> columns by slot; ids -1 fall away."""
    batch, q_heads, n = mass.shape
    group = q_heads // ids.shape[1]
    target = jnp.where(ids < 0, slots, ids)  # [batch, kv_heads, n], past the end: dropped
    fill = jnp.zeros((batch, ids.shape[1], group, slots), mass.dtype)
    place = jax.vmap(jax.vmap(lambda f, t, m: f.at[:, t].add(m, mode="drop")))
    return place(fill, target, mass.reshape(batch, ids.shape[1], group, n)).reshape(batch, q_heads, slots)


def _whole(query: _Query, store: KVStore, seen: Array) -> tuple[Array, Array, Array, Array]:
    """All slots of an array at once: (peak, total, acc, logits)."""
    logits = _mask_logits(query, _scores(query.q, store), seen)
    peak, prob = _exp(logits)
    used = seen.any(2)  # [batch, kv_heads, n]

    def clean() -> Array:
        return _values(prob, _blank(store, used), query.q.dtype)

    def hopeful() -> Array:
        # Copying V to blank unused slots would cost as much as attention: do it only if they held NaN or inf.
        acc = _values(prob, store, query.q.dtype)
        return lax.cond(jnp.isfinite(acc).all(), lambda: acc, clean)

    acc = lax.platform_dependent(cpu=hopeful, default=clean)
    return peak, prob.sum(-1), acc, logits


def _chunked(query, store, table, blocks, block_size, slots, visible, keep_logits):
    """Slots in chunks of about `_CHUNK` with an online softmax: (state, logits [.., n], ids [.., n])."""
    batch, kv_heads, rows, dim = query.q.shape
    unit, pick = _units(store, table, blocks, block_size, slots, batch, kv_heads)
    n_units = blocks.shape[2] * (block_size // unit) if blocks is not None else -(-slots // unit)
    per = max(1, min(_CHUNK // unit, n_units))
    steps = -(-n_units // per)

    def step(state, i):
        index = i * per + jnp.arange(per, dtype=jnp.int32)
        chunk, start = pick(index)  # start: int32 [batch, kv_heads, per], -1 where there is no unit
        ids = start[..., None] + jnp.arange(unit, dtype=jnp.int32)
        ids = jnp.where((start >= 0)[..., None] & (index < n_units)[:, None], ids, -1)
        ids = ids.reshape(batch, kv_heads, per * unit)
        seen = visible(ids)
        logits = _mask_logits(query, _scores(query.q, chunk), seen)
        peak, prob = _exp(logits)
        acc = _values(prob, _blank(chunk, seen.any(2)), query.q.dtype)
        state = _join(state, (peak, prob.sum(-1), acc))
        return state, (logits if keep_logits else None, ids)

    zero = jnp.zeros((batch, kv_heads, rows), jnp.float32)
    state = (zero - jnp.inf, zero, jnp.zeros((*zero.shape, dim), jnp.float32))
    if steps == 1:
        state, (logits, ids) = step(state, jnp.int32(0))
        return state, logits, ids
    state, (logits, ids) = lax.scan(step, state, jnp.arange(steps, dtype=jnp.int32))
    ids = jnp.moveaxis(ids, 0, 2).reshape(batch, kv_heads, -1)
    if keep_logits:
        logits = jnp.moveaxis(logits, 0, 3).reshape(batch, kv_heads, rows, -1)
    return state, logits, ids


def _units(store, table, blocks, block_size, slots, batch, kv_heads):
    """How slots are fetched: (slots per unit, index [per] -> (KVStore of the units, first slot ids))."""
    page = store.slots
    least = math.lcm(pack_block(store.format), store.group if store.format in PACKED_BITS else 1)
    if blocks is not None and table is not None:
        unit = math.gcd(block_size, page)
    elif blocks is not None:
        unit = block_size
    elif table is not None:
        unit = page
    else:
        sizes = [d for d in range(least, min(slots, _CHUNK) + 1, least) if slots % d == 0]
        # A slot count without a divisor of useful size is taken in one piece.
        unit = slots if not sizes or sizes[-1] * 8 < min(slots, _CHUNK) else sizes[-1]
    ratio = 1 if blocks is None else block_size // unit

    def pick(index: Array):
        if blocks is None:
            first = jnp.where(index * unit < slots, index * unit, -1)
            first = jnp.broadcast_to(first, (batch, kv_heads, index.shape[0]))
        else:
            chosen = jnp.take(blocks, index // ratio, axis=2, mode="clip")
            first = jnp.where(chosen < 0, -1, chosen * block_size + index % ratio * unit)
        if table is None:
            lead, where = None, jnp.maximum(first, 0) // unit
        else:
            at = jnp.clip(first // page, 0, table.shape[2] - 1)
            lead = jnp.maximum(jnp.take_along_axis(table, at, axis=2), 0)
            where = jnp.maximum(first, 0) % page // unit
        fields = {
            name: _take_units(getattr(store, name), axis, unit // per, lead, where)
            for name, (axis, per) in store.slot_fields().items()
        }
        return dataclasses.replace(store, **fields, k_res=None, v_res=None, res_lengths=None), first

    return unit, pick


def _take_units(x: Array, axis: int, size: int, lead: Array | None, where: Array) -> Array:
    """Gather units of `size` steps along `axis` -> [batch, kv_heads, ..., units * size, ...].

    Dense (lead None): x [batch, kv_heads, ...] and `where` [batch, kv_heads, units] counts units in the row.
    Ragged: x [pages, ...], `lead` names the page and `where` the unit inside it.
    """
    trailing = x.ndim - (2 if lead is None else 1)
    at = x.ndim + axis
    units = x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])
    units = jnp.moveaxis(
        units, at, 2 if lead is None else 1
    )  # [batch, kv_heads, units, ...] or [pages, units, ..]
    if lead is None:
        index = where.reshape(*where.shape, *([1] * trailing))
        got = jnp.take_along_axis(units, index, axis=2)
    else:
        got = units[lead, where]
    got = jnp.moveaxis(got, 2, got.ndim + axis - 1)
    return got.reshape(*got.shape[: got.ndim + axis - 1], -1, *got.shape[got.ndim + axis + 1 :])


def _blank(store: KVStore, used: Array) -> KVStore:
    """Replace what unused slots hold: whatever it was, it must not reach a product with probability 0."""
    if store.format in PACKED_BITS:  # codes are always finite
        keep = used[:, :, None, :]
        v_scale, v_zero = (jnp.where(keep, x, 0) for x in (store.v_scale, store.v_zero))
        return dataclasses.replace(store, v_scale=v_scale, v_zero=v_zero)
    if (
        store.format in EIGHT_BIT
    ):  # `_values` takes codes that are not finite for 0: a copy of V would cost more
        return dataclasses.replace(store, v_scale=jnp.where(used, store.v_scale, 0))
    return dataclasses.replace(store, v=jnp.where(used[..., None], store.v, jnp.zeros((), store.v.dtype)))


def _scores(q: Array, store: KVStore) -> Array:
    """q.k in f32 [batch, kv_heads, rows, n]; scales are applied to q or to the result, never to the codes."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=dot_precision(q.dtype))
    with jax.named_scope("scores"):
        if store.format == DENSE:
            k = store.k if store.k.dtype == q.dtype else store.k.astype(q.dtype)
            return dot("bhrd,bhnd->bhrn", q, k)
        if store.format in EIGHT_BIT:
            s = dot("bhrd,bhnd->bhrn", q, store.k.astype(q.dtype))
            return s * store.k_scale.astype(jnp.float32)[:, :, None, :]
        codes = unpack(store.k, PACKED_BITS[store.format]).astype(q.dtype)
        batch, kv_heads, n, dim = codes.shape
        codes = codes.reshape(batch, kv_heads, n // store.group, store.group, dim)
        scaled = q[:, :, None] * store.k_scale.astype(q.dtype)[:, :, :, None]  # [b, h, groups, rows, d]
        s = dot("bhgrd,bhgnd->bhrgn", scaled, codes)
        bias = dot("bhrd,bhgd->bhrg", q, store.k_zero.astype(q.dtype))
        return (s + bias[..., None]).reshape(*s.shape[:3], n)


def _finite(codes: Array) -> Array:
    """8-bit codes with NaN and inf replaced by the largest number; by their bits, which XLA fuses into a product."""
    if not jnp.issubdtype(codes.dtype, jnp.floating):
        return codes
    bits = lax.bitcast_convert_type(codes, jnp.int8)
    most = lax.bitcast_convert_type(jnp.finfo(codes.dtype).max.astype(codes.dtype), jnp.int8)
    return lax.bitcast_convert_type((jnp.minimum(bits & 0x7F, most)) | (bits & -0x80), codes.dtype)


def _values(prob: Array, store: KVStore, work: jnp.dtype) -> Array:
    """prob . v in f32 [batch, kv_heads, rows, head_dim]; work: dtype of the products with K.

    Codes are exact in bfloat16: with 16-bit queries a GPU takes them as they are into its matrix units.
    """
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    with jax.named_scope("values"):
        if store.format == DENSE:
            v = store.v
            return dot("bhrn,bhnd->bhrd", prob.astype(v.dtype), v, precision=dot_precision(v.dtype))
        exact = dot_precision(jnp.float32)
        if store.format in EIGHT_BIT:
            weight = prob * store.v_scale.astype(jnp.float32)[:, :, None, :]
            dtype = jnp.bfloat16 if work.itemsize == 2 else jnp.float32
            v = _finite(store.v).astype(dtype)  # a valid entry's NaN is in its scale too
            return dot("bhrn,bhnd->bhrd", weight.astype(dtype), v, precision=dot_precision(dtype))
        dtype = jnp.bfloat16 if work.itemsize == 2 else jnp.float32
        codes = unpack(store.v, PACKED_BITS[store.format]).astype(dtype)
        batch, kv_heads, n, dim = codes.shape
        codes = codes.reshape(batch, kv_heads, n, dim // store.group, store.group)
        v_scale, v_zero = (x.astype(jnp.float32) for x in (store.v_scale, store.v_zero))  # [b, h, j, n]
        weight = (prob[:, :, :, None] * v_scale[:, :, None]).astype(dtype)  # [b, h, rows, j, n]
        out = dot("bhrjn,bhnjc->bhrjc", weight, codes, precision=dot_precision(dtype))
        out = out + dot("bhrn,bhjn->bhrj", prob, v_zero, precision=exact)[..., None]
        return out.reshape(*out.shape[:3], dim)


def _mask_logits(query: _Query, scores: Array, seen: Array) -> Array:
    """Scale, cap and mask: [batch, kv_heads, group * tokens, n], -inf where a query does not see a slot."""
    logits = scores * query.scale
    if query.softcap is not None:
        logits = query.softcap * jnp.tanh(logits / query.softcap)
    batch, kv_heads, rows, n = logits.shape
    by_token = logits.reshape(batch, kv_heads, rows // query.tokens, query.tokens, n)
    return jnp.where(seen[:, :, None], by_token, -jnp.inf).reshape(logits.shape)


def _exp(logits: Array) -> tuple[Array, Array]:
    """(peak [..], exp(logits - peak) [.., n]); peak -inf and zeros where nothing is visible."""
    peak = logits.max(-1)
    return peak, jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak)[..., None])


def _join(a, b):
    """Two online-softmax states (peak, total, acc) -> one."""
    peak = jnp.maximum(a[0], b[0])
    safe = jnp.where(peak == -jnp.inf, 0.0, peak)
    wa, wb = jnp.exp(a[0] - safe), jnp.exp(b[0] - safe)
    return peak, a[1] * wa + b[1] * wb, a[2] * wa[..., None] + b[2] * wb[..., None]
