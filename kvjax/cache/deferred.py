"""Storage for codecs that encode whole groups behind a window in model dtype.

Entries of a head, in time order: its sinks (the first `sink` entries of `Layer.residual`), the encoded slots of
the pool, the rest of the residual. When a token does not fit any more, the window's oldest group is encoded. So
what is encoded depends on the number of entries alone, and a cache that was filled token by token, chunk by chunk
or from a whole prompt is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax import arrays
from kvjax.cache import ops, placing
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, Pool, Residual, View
from kvjax.codecs.base import Codec
from pallas_kernels.platform import target_platform

Array = jax.Array


def positions(plan: Plan, cache: KVCache, i: int) -> tuple[Array, Array]:
    """int32 positions of layer i's pool slots [batch, kv_heads, capacity] and of its residual; -1 = empty."""
    lp, layer = plan.layers[i], cache.layers[i]
    codec, res = lp.policy.codec, layer.residual
    place, width = jnp.arange(lp.capacity), jnp.arange(res.k.shape[2])
    stored, waiting = place < layer.fill[..., None], width < res.count[..., None]
    if not lp.implied:
        return jnp.where(stored, ops.view(plan, cache, i).pos, -1), jnp.where(waiting, res.pos, -1)
    late = jnp.where(width < codec.sink, 0, layer.fill[..., None])
    return jnp.where(stored, codec.sink + place, -1), jnp.where(waiting, width + late, -1)


def decoded(plan: Plan, cache: KVCache, i: int, inv_freq: Array | None) -> tuple[Array, Array, Array]:
    """Everything layer i holds: k, v [batch, kv_heads, slots, head_dim] in model dtype, positions [.., slots].

    For prefill, which reads all of it once for many queries; decoding goes tile by tile.
    """
    codec, res = plan.layers[i].policy.codec, cache.layers[i].residual
    pos, late = positions(plan, cache, i)
    store = ops.view(plan, cache, i).store
    ctx = ops.context(plan, i, pos, inv_freq)
    if codec.predicts:
        slots = jnp.broadcast_to(jnp.arange(pos.shape[2]), pos.shape)
        ctx = ctx.replace(previous=previous(plan, cache, i, slots, pos, inv_freq))
    k, v = codec.decode(store, plan.shape.dtype, ctx)
    # Slots that nothing was written to may decode to anything; attention masks them, but NaN would survive that.
    k, v = (jnp.where((pos >= 0)[..., None], x, 0) for x in (k, v))
    return (
        jnp.concatenate([k, res.k], axis=2),
        jnp.concatenate([v, res.v], axis=2),
        jnp.concatenate([pos, late], axis=2),
    )


def previous(
    plan: Plan, cache: KVCache, i: int, slots: Array, pos: Array, inv_freq: Array | None
) -> tuple[Array, Array]:
    """Keys and values of slots int32 [batch, kv_heads, n] of the layer before, as that layer decodes them."""
    store = cache.pools[plan.layers[i - 1].pool].store
    part = {name: ops.take_slots(x, slots) for name, x in store.items()}
    codec = plan.layers[i - 1].policy.codec
    return codec.decode(part, plan.shape.dtype, ops.context(plan, i - 1, pos, inv_freq))


def _encode(
    plan: Plan, cache: KVCache, i: int, part: View, slots: Array, inv_freq: Array | None
) -> dict[str, Array]:
    """Fields of whole groups, to be stored at `slots`; `part.store` holds k and v."""
    with jax.named_scope("quantize"):
        ctx = ops.context(plan, i, part.pos, inv_freq, part.slot_state.get("saliency"))
        if plan.layers[i].policy.codec.predicts:
            ctx = ctx.replace(previous=previous(plan, cache, i, slots, part.pos, inv_freq))
        return plan.layers[i].policy.codec.encode(part.store["k"], part.store["v"], ctx)


def _split(plan: Plan, i: int, entries: View, total: Array) -> tuple[View, Array, Residual]:
    """Entries in time order, the first `total` of them valid -> (groups to encode, how many slots, the rest)."""
    codec, lp = plan.layers[i].policy.codec, plan.layers[i]
    n = entries.pos.shape[2]
    encoded = codec.encoded(total)
    most = int(codec.encoded(n))  # a Python int: encode no more than could be needed
    index = jnp.broadcast_to(codec.sink + jnp.arange(most), (*total.shape, most))
    part = jax.tree.map(lambda x: ops.take_slots(x, index), entries)
    place = jnp.arange(codec.sink + codec.residual)
    rest = total - encoded
    late = jnp.where(place < codec.sink, 0, encoded[..., None])
    index = jnp.where(place < rest[..., None], place + late, n)
    take = {name: ops.take_slots(entries.store[name], index) for name in ("k", "v")}
    pos = None if lp.implied else ops.take_slots(entries.pos, index, fill=-1)
    return part, encoded, Residual(take["k"], take["v"], pos, rest)


def rebuild(
    plan: Plan,
    cache: KVCache,
    i: int,
    entries: View,
    index: Array,
    limit: Array,
    pool: Pool | None = None,
    first_page: Array | int = 0,
    inv_freq: Array | None = None,
) -> tuple[KVCache, Array | int]:
    """`ops.rebuild` for entries in model dtype: the selected ones are encoded, the newest wait in the residual."""
    lp, layer = plan.layers[i], cache.layers[i]
    count = jnp.sum(index < entries.pos.shape[2], axis=-1, dtype=jnp.int32)
    chosen = View(
        store={name: ops.take_slots(x, index) for name, x in entries.store.items()},
        pos=ops.take_slots(entries.pos, index, fill=-1),
        slot_state={n: ops.take_slots(x, index) for n, x in entries.slot_state.items()},
    )
    part, encoded, residual = _split(plan, i, chosen, count)
    layer = layer.replace(fill=encoded, next_slot=encoded, limit=limit, residual=residual)
    specs = plan.pool_specs[lp.pool]
    stored = jnp.where(jnp.arange(part.pos.shape[2]) < encoded[..., None], part.pos, -1)
    slots = jnp.broadcast_to(jnp.arange(part.pos.shape[2]), part.pos.shape)
    new = Pool(_encode(plan, cache, i, part, slots, inv_freq), None if lp.implied else stored, {})
    if layer.table is None:
        fitted = jax.tree.map(ops.fit, specs, new, is_leaf=arrays.is_spec)
        return cache.put(i, layer, lp.pool, ops.constrain_pool(plan, i, fitted)), 0
    pool = arrays.init(specs) if pool is None else pool
    layer, end = ops.hand_out_pages(plan, i, layer, pool, jnp.maximum(limit, count), first_page)
    return cache.put(i, layer, lp.pool, ops.fill_pages(plan, i, layer, pool, new, encoded)), end


def _write(
    plan: Plan, cache: KVCache, i: int, part: View, count: Array, residual: Residual, inv_freq: Array | None
) -> KVCache:
    """Encode `part` and store its first `count` slots after those that are there."""
    lp, layer = plan.layers[i], cache.layers[i]
    pool, n = cache.pools[lp.pool], part.pos.shape[2]
    place = jnp.arange(n)
    slots = jnp.where(place < count[..., None], layer.fill[..., None] + place, -1)
    fields = lp.policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)
    store = dict(pool.store)
    whole = n == lp.policy.codec.group and layer.table is None and pool.host is None
    for name, value in _encode(plan, cache, i, part, slots, inv_freq).items():
        if whole and fields[name].before:  # one group, at a multiple of its size, in the last axis
            store[name] = ops.put_block(
                store[name], jnp.where(count > 0, layer.fill // n, -1), value, fields[name]
            )
            continue
        places = placing.tail_places(cache, i, slots)
        store[name] = ops.scatter(plan, i, layer, store[name], places, value, fields[name])
    pos = None if lp.implied else ops.scatter(plan, i, layer, pool.pos, slots, part.pos)
    fill = layer.fill + count
    layer = layer.replace(fill=fill, next_slot=fill, residual=residual)
    return cache.put(i, layer, lp.pool, ops.constrain_pool(plan, i, Pool(store, pos, {}, pool.host)))


def append(
    plan: Plan,
    cache: KVCache,
    i: int,
    k: Array,
    v: Array,
    new_positions: Array,
    inv_freq: Array | None = None,
    q: Array | None = None,
) -> KVCache:
    """Store new tokens. k, v [batch, kv_heads, tokens, head_dim]; positions int32 [batch, tokens], -1 = padding.

    q [batch, q_heads, tokens, head_dim]: the newest query ranks the entries of a group for codecs that give salient
    entries more bits.
    """
    codec, res = plan.layers[i].policy.codec, cache.layers[i].residual
    b, h, t, _ = k.shape
    pos = jnp.broadcast_to(new_positions[:, None], (b, h, t))
    if t == 1 and codec.residual:
        return _append_one(plan, cache, i, View({"k": k, "v": v}, pos, {}), inv_freq, q)
    if t == 1:
        return _append_behind_sinks(plan, cache, i, View({"k": k, "v": v}, pos, {}), inv_freq, q)
    late = positions(plan, cache, i)[1]
    entries = View(
        store={"k": jnp.concatenate([res.k, k], axis=2), "v": jnp.concatenate([res.v, v], axis=2)},
        pos=jnp.concatenate([late, pos], axis=2),
        slot_state={},
    )
    index = ops.all_entries(entries.pos >= 0, entries.pos.shape[2])
    total = jnp.sum(entries.pos >= 0, axis=-1, dtype=jnp.int32)
    entries = View(
        store={name: ops.take_slots(x, index) for name, x in entries.store.items()},
        pos=ops.take_slots(entries.pos, index, fill=-1),
        slot_state={},
    )
    part, count, residual = _split(plan, i, _salient(codec, entries, q), total)
    if part.pos.shape[2] == 0:
        return cache.put(
            i,
            cache.layers[i].replace(residual=residual),
            plan.layers[i].pool,
            cache.pools[plan.layers[i].pool],
        )
    return _write(plan, cache, i, part, count, residual, inv_freq)


def _salient(codec, entries: View, q: Array | None) -> View:
    """Add the saliency of entries that no prompt scorer has seen: the newest query's logits, mean over its group."""
    if codec.scorer is None or q is None:
        return entries
    b, h = entries.pos.shape[:2]
    last = q[:, :, -1].reshape(b, h, -1, q.shape[-1]).astype(jnp.float32)
    score = jnp.einsum("bhgd,bhnd->bhn", last, entries.store["k"].astype(jnp.float32))
    return entries.replace(slot_state={"saliency": score})


def _append_one(
    plan: Plan, cache: KVCache, i: int, new: View, inv_freq: Array | None, q: Array | None
) -> KVCache:
    """One token: if a row's window is full, its oldest group is encoded first; other steps only write the token.

    Groups of one entry are encoded at every step, without a branch. Layers whose codec needs nothing but keys and values
    are flushed together when the first of them appends: a branch makes a GPU wait for the host, and one a step is
    enough. Layers therefore append in order, each of them every token.
    """
    codec, j = plan.layers[i].policy.codec, plan.layers[i].pool
    valid = new.pos[..., 0] >= 0
    together = _flushed_together(plan)
    if codec.group == 1:  # one entry a step, once the window is full: nothing to branch about
        cache = flush(plan, cache, i, valid & _full(cache, i, codec), inv_freq, q)
    elif i not in together:
        cache = _flush_full(plan, cache, (i,), valid, inv_freq, q)
    elif i == together[0]:
        cache = _flush_full(plan, cache, together, valid)
    layer = cache.layers[i]
    return cache.put(i, layer.replace(residual=_wait(layer.residual, new, valid)), j, cache.pools[j])


def _append_behind_sinks(
    plan: Plan, cache: KVCache, i: int, new: View, inv_freq: Array | None, q: Array | None
) -> KVCache:
    """One token where no window is: among the sinks while they are not complete, else encoded."""
    codec, res = plan.layers[i].policy.codec, cache.layers[i].residual
    valid, early = new.pos[..., 0] >= 0, res.count < codec.sink
    count = (valid & ~early).astype(jnp.int32)
    return _write(plan, cache, i, _salient(codec, new, q), count, _wait(res, new, valid & early), inv_freq)


def _wait(res: Residual, new: View, here: Array) -> Residual:
    """`res` with one more entry where `here` bool [batch, kv_heads]."""
    place = jnp.where(here, res.count, res.k.shape[2])[..., None]

    def put(x: Array, value: Array) -> Array:
        return jax.vmap(jax.vmap(lambda a, s, y: a.at[s].set(y, mode="drop")))(
            x, place, value.astype(x.dtype)
        )

    return Residual(
        put(res.k, new.store["k"]),
        put(res.v, new.store["v"]),
        None if res.pos is None else put(res.pos, new.pos),
        res.count + here.astype(jnp.int32),
    )


def _full(cache: KVCache, i: int, codec: Codec) -> Array:
    """bool [batch, kv_heads]: the window of layer i has no room."""
    return cache.layers[i].residual.count == codec.sink + codec.residual


def _flushed_together(plan: Plan) -> tuple[int, ...]:
    """Layers whose windows are flushed under one branch."""
    codecs = [lp.policy.codec for lp in plan.layers]
    return tuple(i for i, c in enumerate(codecs) if c.residual and c.group > 1 and c.self_contained)


def _flush_full(
    plan: Plan,
    cache: KVCache,
    layers: tuple[int, ...],
    valid: Array,
    inv_freq: Array | None = None,
    q: Array | None = None,
) -> KVCache:
    """Encode the oldest group of every full window of `layers` in the rows bool [batch, kv_heads] that append."""

    def full(cache: KVCache, i: int) -> Array:
        return valid & _full(cache, i, plan.layers[i].policy.codec)

    def encode(cache: KVCache) -> KVCache:
        for i in layers:
            cache = flush(plan, cache, i, full(cache, i), inv_freq, q)
        return cache

    due = functools.reduce(jnp.logical_or, [jnp.any(full(cache, i)) for i in layers])
    cache, host = placing.detach(cache)  # a branch would copy what it hands through
    return placing.attach(_when(due, encode, cache), host)


def _when(due: Array, encode: Callable[[KVCache], KVCache], cache: KVCache) -> KVCache:
    """`encode(cache)` if due, else the cache, in place.

    A loop of at most one round except on GPUs, whose rows were measured with a branch: for TPUs XLA copies the arrays
    that a branch hands through, and libtpu 0.0.51 aborts on such branches of eight layers.
    """
    if target_platform() == "gpu":
        return jax.lax.cond(due, encode, lambda cache: cache, cache)
    return jax.lax.fori_loop(0, due.astype(jnp.int32), lambda _, cache: encode(cache), cache)


def flush(
    plan: Plan,
    cache: KVCache,
    i: int,
    full: Array,
    inv_freq: Array | None = None,
    q: Array | None = None,
) -> KVCache:
    """Encode the oldest group of layer i's windows where `full` bool [batch, kv_heads]."""
    codec, res = plan.layers[i].policy.codec, cache.layers[i].residual
    group, sink = codec.group, codec.sink
    oldest = slice(sink, sink + group)
    part = View(
        store={"k": res.k[:, :, oldest], "v": res.v[:, :, oldest]},
        pos=positions(plan, cache, i)[1][:, :, oldest],
        slot_state={},
    )

    def staying(x: Array) -> Array:
        later = x[:, :, sink + group :]
        where = full.reshape(*full.shape, *(1,) * (x.ndim - 2))
        return jnp.where(where, later, x[:, :, sink : sink + later.shape[2]])

    def put(x: Array, stay: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, stay, sink, axis=2)

    # Everything is read before the window is written, in place: otherwise the branch would return another array than
    # it was given, and every step without a flush would copy the window. What lies beyond the count is not read.
    window = {"k": res.k, "v": res.v} | ({} if res.pos is None else {"pos": res.pos})
    part, stay, window = jax.lax.optimization_barrier((part, jax.tree.map(staying, window), window))
    window = jax.tree.map(put, window, stay)
    count = jnp.where(full, group, 0).astype(jnp.int32)
    rest = Residual(window["k"], window["v"], window.get("pos"), res.count - count)
    return _write(plan, cache, i, _salient(codec, part, q), count, rest, inv_freq)
