"""Operations on a layer that both layouts share: view, append, rebuild from a selection, evict one slot.

Each takes `(layer, pool)` and returns new ones; nothing here knows about models or scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from kvjax import arrays
from kvjax.cache import index_layout, paging, placing
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, Layer, Pool, View
from kvjax.codecs.base import Context, Field
from kvjax.sharding import constrain
from pallas_kernels.platform import target_platform

Array = jax.Array
ONE_EACH = Field((), "")  # how positions and slot states are laid out: one entry a slot


def empty(plan: Plan) -> KVCache:
    """A cache with no entries, allocated as the plan says; calibration arrays are filled in."""
    cache = arrays.init(plan.specs())
    layers = []
    for i, (layer, lp) in enumerate(zip(cache.layers, plan.layers)):
        if lp.policy.scorer is not None and lp.policy.compresses:
            const = {k: jnp.asarray(v) for k, v in lp.policy.scorer.constants(i, plan.shape).items()}
            layer = layer.replace(const=const)
        if lp.policy.selector is not None:
            own = index_layout.constants(plan, i)
            const = {f"selector.{k}": jnp.asarray(v) for k, v in own.items()}
            layer = layer.replace(const={**layer.const, **const})
        layers.append(layer)
    return paging.open_files(plan, cache.replace(layers=tuple(layers)))


def context(plan: Plan, i: int, pos: Array, inv_freq: Array | None, saliency: Array | None = None) -> Context:
    """What layer i's codec may look at for slots at positions `pos` int32 [batch, kv_heads, n]."""
    const = plan.layers[i].policy.codec.constants(i, plan.shape)
    arrays_of = {n: jnp.asarray(x) for n, x in const.items()}
    return Context(pos, inv_freq, saliency, arrays_of, head_dim=plan.shape.head_dim)


def take_slots(x: Array, index: Array, fill: float = 0) -> Array:
    """x [batch, heads, slots, ...] at index [batch, heads, n]; an index outside 0..slots-1 gives `fill`."""
    slots = x.shape[2]
    gathered = jax.vmap(jax.vmap(lambda a, i: jnp.take(a, i, axis=0, mode="clip")))(x, index)
    inside = ((index >= 0) & (index < slots)).reshape(*index.shape, *(1,) * (x.ndim - 3))
    return jnp.where(inside, gathered, jnp.asarray(fill, x.dtype))


def view(plan: Plan, cache: KVCache, i: int) -> View:
    """Layer i as dense arrays of `capacity` slots (a gather of pages in the Ragged layout)."""
    lp, layer = plan.layers[i], cache.layers[i]
    pool = cache.pools[lp.pool]
    if layer.table is None:
        store = pool.store if pool.host is None else placing.whole_store(plan, cache, i)
        return View(store=store, pos=pool.pos, slot_state=pool.slot_state)
    _b, _h, width = layer.table.shape

    def gather(x: Array, slots: int, before: int = 0) -> Array:
        # Unassigned pages read page 0; their slots are masked below.
        pages = jnp.take(x, jnp.maximum(layer.table, 0), axis=0)  # [b, h, width, before, page / per, ...]
        pages = jnp.moveaxis(pages, 2, 2 + before)
        lead = pages.shape[: 2 + before]
        pages = pages.reshape(*lead, width * pages.shape[3 + before], *pages.shape[4 + before :])
        return jax.lax.slice_in_dim(pages, 0, slots, axis=2 + before)

    owned = jnp.repeat(layer.table >= 0, plan.page(lp.policy), axis=2)[:, :, : lp.capacity]
    used = owned & (jnp.arange(lp.capacity) < layer.fill[..., None])
    fields = lp.policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)
    return View(
        store={
            n: gather(x, lp.capacity // fields[n].per, len(fields[n].before)) for n, x in pool.store.items()
        },
        pos=jnp.where(used, gather(pool.pos, lp.capacity), -1),
        slot_state={n: gather(x, lp.capacity) for n, x in pool.slot_state.items()},
    )


def scatter(
    plan: Plan, i: int, layer: Layer, array: Array, slots: Array, values: Array, field: Field = ONE_EACH
) -> Array:
    """Write values [batch, kv_heads, before, n / per, ...] of layer i at slots int32 [batch, kv_heads, n].

    `field` says what surrounds the slot axis and how many slots share an entry; -1 is dropped.
    """
    values, inner = values.astype(array.dtype), len(field.before)
    slots = slots[:, :, :: field.per] // field.per
    if layer.table is None:
        slots = jnp.where(slots < 0, array.shape[2 + inner], slots)

        def put(a: Array, s: Array, x: Array) -> Array:
            return a.at[s].set(x, mode="drop")

        for _ in range(inner):
            put = jax.vmap(put, in_axes=(0, None, 0))
        return jax.vmap(jax.vmap(put))(array, slots, values)
    page = plan.page(plan.layers[i].policy) // field.per
    number = slots // page
    page_id = jnp.take_along_axis(layer.table, jnp.clip(number, 0, layer.table.shape[2] - 1), axis=2)
    bad = (slots < 0) | (number >= layer.table.shape[2]) | (page_id < 0)
    page_id = jnp.where(bad, array.shape[0], page_id)
    where = (page_id, *(slice(None),) * inner, slots % page)
    # Index arrays on both sides of a slice put the slots before the axes in between.
    return array.at[where].set(jnp.moveaxis(values, 2 + inner, 2), mode="drop")


def put_block(array: Array, block: Array, values: Array, field: Field) -> Array:
    """Write values [batch, kv_heads, before, n / per, ...] over block number `block` int32 [batch, kv_heads] of n slots.

    For the Dense layout; -1 writes nothing. A select over the whole array: a scatter along the last axis makes a TPU copy
    the array with that axis padded 128 times.
    """
    axis = 2 + len(field.before)
    n = values.shape[axis]
    place = jnp.arange(array.shape[axis], dtype=jnp.int32).reshape((-1,) + (1,) * (array.ndim - axis - 1))
    here = place // n == block.reshape(block.shape + (1,) * (array.ndim - 2))
    reps = [1] * array.ndim
    reps[axis] = -(-array.shape[axis] // n)
    tiled = jax.lax.slice_in_dim(jnp.tile(values.astype(array.dtype), reps), 0, array.shape[axis], axis=axis)
    out = jnp.where(here, tiled, array)
    if target_platform() == "tpu":
        out = with_layout_constraint(out, Layout(major_to_minor=tuple(range(array.ndim))))
    return out


def append(
    plan: Plan, cache: KVCache, i: int, k: Array, v: Array, positions: Array, inv_freq: Array | None = None
) -> KVCache:
    """Store new tokens. k, v [batch, kv_heads, tokens, head_dim]; positions int32 [batch, tokens], -1 = padding.

    One token goes to `next_slot` (a reused slot after an eviction); several go to fill, fill+1, ... Codecs that
    are deferred: `kvjax.cache.deferred.append`.
    """
    layer, j = cache.layers[i], plan.layers[i].pool
    pool = cache.pools[j]
    b, h, t, _ = k.shape
    new = (positions >= 0)[:, None]  # [b, 1, t]
    rank = jnp.cumsum(new, axis=-1) - 1
    start = layer.next_slot if t == 1 else layer.fill
    slots = jnp.broadcast_to(jnp.where(new, start[..., None] + rank, -1), (b, h, t))
    store, every = dict(pool.store), jnp.broadcast_to(positions[:, None], (b, h, t))
    for name, value in plan.layers[i].policy.codec.encode(k, v, context(plan, i, every, inv_freq)).items():
        store[name] = scatter(plan, i, layer, store[name], placing.tail_places(cache, i, slots), value)
    pos = scatter(plan, i, layer, pool.pos, slots, every)
    lead = 2 if layer.table is not None else 3
    slot_state = {
        n: scatter(plan, i, layer, x, slots, jnp.zeros((b, h, t, *x.shape[lead:]), x.dtype))
        for n, x in pool.slot_state.items()
    }
    fill = jnp.maximum(layer.fill, jnp.max(slots, axis=-1) + 1)
    layer = layer.replace(fill=fill, next_slot=fill)
    return cache.put(i, layer, j, constrain_pool(plan, i, Pool(store, pos, slot_state, pool.host)))


def write_slot_state(plan: Plan, cache: KVCache, i: int, state: dict[str, Array]) -> KVCache:
    """Replace layer i's per-slot policy state from dense arrays [batch, kv_heads, capacity, ...]."""
    layer, j = cache.layers[i], plan.layers[i].pool
    pool = cache.pools[j]
    if not state:
        return cache
    if layer.table is not None:
        places = jnp.arange(plan.layers[i].capacity)
        slots = jnp.where(places < layer.fill[..., None], places, -1)
        state = {n: scatter(plan, i, layer, pool.slot_state[n], slots, x) for n, x in state.items()}
    return cache.put(i, layer, j, constrain_pool(plan, i, pool.replace(slot_state=state)))


def all_entries(valid: Array, places: int) -> Array:
    """Index for `rebuild` that keeps every valid candidate: int32 [batch, kv_heads, places]."""
    n = valid.shape[-1]
    index = jnp.sort(jnp.where(valid, jnp.arange(n, dtype=jnp.int32), n), axis=-1)[..., :places]
    return jnp.pad(index, ((0, 0), (0, 0), (0, places - index.shape[-1])), constant_values=n)


def rebuild(
    plan: Plan,
    cache: KVCache,
    i: int,
    entries: View,
    index: Array,
    limit: Array,
    pool: Pool | None = None,
    first_page: Array | int = 0,
) -> tuple[KVCache, Array | int]:
    """Make layer i hold exactly the selected entries; returns the cache and the first page still free.

    entries: all candidates as dense arrays of n slots. index int32 [batch, kv_heads, places]: candidates in
    time order; values outside 0..n-1 mark unused places, which come last. limit int32 [batch, kv_heads].
    Layers that share a pool are rebuilt one after the other: pass on the pool and the first free page.
    """
    lp, layer = plan.layers[i], cache.layers[i]
    count = jnp.sum(index < entries.pos.shape[2], axis=-1, dtype=jnp.int32)
    new = Pool(
        store={name: take_slots(x, index) for name, x in entries.store.items()},
        pos=take_slots(entries.pos, index, fill=-1),
        slot_state={n: take_slots(x, index) for n, x in entries.slot_state.items()},
    )
    layer = layer.replace(fill=count, next_slot=count, limit=limit)
    if layer.table is None:
        fitted = jax.tree.map(fit, plan.pool_specs[lp.pool], new, is_leaf=arrays.is_spec)
        return cache.put(i, layer, lp.pool, constrain_pool(plan, i, fitted)), 0

    # Ragged: hand out the pool's pages anew, each head getting room for what it keeps and may still append.
    pool = arrays.init(plan.pool_specs[lp.pool]) if pool is None else pool
    layer, end = hand_out_pages(plan, i, layer, pool, jnp.maximum(limit, count), first_page)
    return cache.put(i, layer, lp.pool, fill_pages(plan, i, layer, pool, new, count)), end


def pages_for(plan: Plan, i: int, entries: Array) -> Array:
    """Pages int32 [batch, kv_heads] that heads of layer i need for `entries`, likewise, and what they may append."""
    lp, codec = plan.layers[i], plan.layers[i].policy.codec
    room = entries + (lp.policy.interval if lp.policy.evict_decode else plan.reserve)
    room = jnp.minimum(codec.encoded(room) if codec.deferred else room, lp.capacity)
    return -(-room // plan.page(lp.policy))


def hand_out_pages(
    plan: Plan, i: int, layer: Layer, pool: Pool, entries: Array, first_page: Array | int
) -> tuple[Layer, Array]:
    """A new page table: every head gets room for `entries` int32 [batch, kv_heads] and what it may still append.

    Returns the layer and the first page still free.
    """
    each = pages_for(plan, i, entries)
    ends = first_page + jnp.cumsum(each.reshape(-1)).reshape(each.shape)
    number, pages = jnp.arange(layer.table.shape[2]), next(iter(pool.store.values())).shape[0]
    table = jnp.where(number < each[..., None], (ends - each)[..., None] + number, -1)
    table = jnp.where(table < pages, table, -1).astype(jnp.int32)
    return layer.replace(table=table), ends.reshape(-1)[-1]


def fill_pages(plan: Plan, i: int, layer: Layer, pool: Pool, new: Pool, count: Array) -> Pool:
    """Write the first `count` int32 [batch, kv_heads] slots of the dense `new` into a layer's pages."""
    fields = plan.layers[i].policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)

    def put(array: Array, values: Array, field: Field = ONE_EACH) -> Array:
        n = values.shape[2 + len(field.before)] * field.per
        slots = jnp.where(jnp.arange(n) < count[..., None], jnp.arange(n), -1)
        return scatter(plan, i, layer, array, slots, values, field)

    pool = Pool(
        store={n: put(pool.store[n], x, fields[n]) for n, x in new.store.items()},
        pos=None if pool.pos is None else put(pool.pos, new.pos),
        slot_state={n: put(pool.slot_state[n], x) for n, x in new.slot_state.items()},
    )
    return constrain_pool(plan, i, pool)


def fit(spec: arrays.ArraySpec, x: Array) -> Array:
    """Pad or cut a Dense array to the planned capacity; only the slot axis differs."""
    x = x[tuple(slice(0, n) for n in spec.shape)]
    return jnp.pad(x, [(0, n - m) for n, m in zip(spec.shape, x.shape)], constant_values=spec.fill)


def lowest(pos: Array, scores: Array, limit: Array) -> Array:
    """int32 [batch, kv_heads]: the lowest-scored slot of every head that holds more than its `limit` [batch, kv_heads],
    -1 of other heads.

    pos, scores [batch, kv_heads, slots] of the dense view; of equal scores the oldest entry, wherever it is stored.
    """
    scores = jnp.where(pos >= 0, scores, jnp.inf)
    least = scores == jnp.min(scores, axis=-1, keepdims=True)
    victim = jnp.argmin(jnp.where(least, pos, jnp.iinfo(jnp.int32).max), axis=-1).astype(jnp.int32)
    over = jnp.sum(pos >= 0, axis=-1, dtype=jnp.int32) > limit
    return jnp.where(over, victim, -1)


def free(plan: Plan, cache: KVCache, i: int, slot: Array) -> KVCache:
    """Empty one slot int32 [batch, kv_heads] (-1: none) of every head of layer i; the next token goes there."""
    layer, j = cache.layers[i], plan.layers[i].pool
    pool, slots = cache.pools[j], slot[..., None]
    new_pos = scatter(plan, i, layer, pool.pos, slots, jnp.full(slots.shape, -1, jnp.int32))
    layer = layer.replace(next_slot=jnp.where(slot >= 0, slot, layer.next_slot))
    return cache.put(i, layer, j, pool.replace(pos=new_pos))


def overwrite(plan: Plan, cache: KVCache, i: int, slots: Array, k: Array, v: Array, ctx: Context) -> KVCache:
    """Other keys and values k, v [batch, kv_heads, n, head_dim] at slots int32 [batch, kv_heads, n], -1 = dropped.

    ctx: of these slots. Positions and slot state stay. For codecs of single tokens.
    """
    layer, j = cache.layers[i], plan.layers[i].pool
    pool, store = cache.pools[j], dict(cache.pools[j].store)
    fields = plan.layers[i].policy.codec.encode(k.astype(plan.shape.dtype), v.astype(plan.shape.dtype), ctx)
    for name, value in fields.items():
        store[name] = scatter(plan, i, layer, store[name], slots, value)
    return cache.put(i, layer, j, constrain_pool(plan, i, pool.replace(store=store)))


def constrain_pool(plan: Plan, i: int, pool: Pool) -> Pool:
    """Sharding constraints on every stored array, from its logical axes."""
    specs = plan.pool_specs[plan.layers[i].pool]
    if pool.host is not None:
        return pool
    return jax.tree.map(lambda spec, x: constrain(x, spec.axes), specs, pool, is_leaf=arrays.is_spec)
