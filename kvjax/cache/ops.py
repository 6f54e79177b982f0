"""Operations on a layer that both layouts share: view, append, rebuild from a selection, evict one slot.

Each takes `(layer, pool)` and returns new ones; nothing here knows about models or scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax import arrays
from kvjax.cache.plan import LEAD, Plan
from kvjax.cache.state import KVCache, Layer, Pool, View
from kvjax.sharding import constrain

Array = jax.Array


def empty(plan: Plan) -> KVCache:
    """A cache with no entries, allocated as the plan says; calibration arrays are filled in."""
    cache = arrays.init(plan.specs())
    layers = []
    for i, (layer, lp) in enumerate(zip(cache.layers, plan.layers)):
        if lp.policy.scorer is not None and lp.policy.compresses:
            const = {k: jnp.asarray(v) for k, v in lp.policy.scorer.constants(i, plan.shape).items()}
            layer = layer.replace(const=const)
        layers.append(layer)
    return cache.replace(layers=tuple(layers))


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
        return View(store=pool.store, pos=pool.pos, slot_state=pool.slot_state)
    b, h, width = layer.table.shape

    def gather(x: Array, slots: int) -> Array:
        # Unassigned pages read page 0; their slots are masked below.
        pages = jnp.take(x, jnp.maximum(layer.table, 0), axis=0)  # [b, h, width, page / per, ...]
        return pages.reshape(b, h, width * x.shape[1], *x.shape[2:])[:, :, :slots]

    owned = jnp.repeat(layer.table >= 0, plan.page_size, axis=2)[:, :, : lp.capacity]
    used = owned & (jnp.arange(lp.capacity) < layer.fill[..., None])
    fields = lp.policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)
    return View(
        store={n: gather(x, lp.capacity // fields[n].per) for n, x in pool.store.items()},
        pos=jnp.where(used, gather(pool.pos, lp.capacity), -1),
        slot_state={n: gather(x, lp.capacity) for n, x in pool.slot_state.items()},
    )


def _scatter(plan: Plan, layer: Layer, array: Array, slots: Array, values: Array, per: int = 1) -> Array:
    """Write values [batch, heads, n, ...] at slots [batch, heads, n] (in units of `per` slots); -1 is dropped."""
    values = values.astype(array.dtype)
    if layer.table is None:
        slots = jnp.where(slots < 0, array.shape[2], slots)
        return jax.vmap(jax.vmap(lambda a, s, x: a.at[s].set(x, mode="drop")))(array, slots, values)
    page = plan.page_size // per
    number = slots // page
    page_id = jnp.take_along_axis(layer.table, jnp.clip(number, 0, layer.table.shape[2] - 1), axis=2)
    bad = (slots < 0) | (number >= layer.table.shape[2]) | (page_id < 0)
    page_id = jnp.where(bad, array.shape[0], page_id)
    return array.at[page_id, slots % page].set(values, mode="drop")


def append(plan: Plan, cache: KVCache, i: int, k: Array, v: Array, positions: Array) -> KVCache:
    """Store new tokens. k, v [batch, kv_heads, tokens, head_dim]; positions int32 [batch, tokens], -1 = padding.

    One token goes to `next_slot` (a reused slot after an eviction); several go to fill, fill+1, ...
    """
    layer, j = cache.layers[i], plan.layers[i].pool
    pool = cache.pools[j]
    b, h, t, _ = k.shape
    new = (positions >= 0)[:, None]  # [b, 1, t]
    rank = jnp.cumsum(new, axis=-1) - 1
    start = layer.next_slot if t == 1 else layer.fill
    slots = jnp.broadcast_to(jnp.where(new, start[..., None] + rank, -1), (b, h, t))
    store = dict(pool.store)
    for name, value in plan.layers[i].policy.codec.encode(k, v).items():
        store[name] = _scatter(plan, layer, store[name], slots, value)
    pos = _scatter(plan, layer, pool.pos, slots, jnp.broadcast_to(positions[:, None], (b, h, t)))
    lead = 2 if layer.table is not None else 3
    slot_state = {
        n: _scatter(plan, layer, x, slots, jnp.zeros((b, h, t, *x.shape[lead:]), x.dtype))
        for n, x in pool.slot_state.items()
    }
    fill = jnp.maximum(layer.fill, jnp.max(slots, axis=-1) + 1)
    layer = layer.replace(fill=fill, next_slot=fill)
    return cache.put(i, layer, j, _constrain(layer, Pool(store, pos, slot_state)))


def write_slot_state(plan: Plan, cache: KVCache, i: int, state: dict[str, Array]) -> KVCache:
    """Replace layer i's per-slot policy state from dense arrays [batch, kv_heads, capacity, ...]."""
    layer, j = cache.layers[i], plan.layers[i].pool
    pool = cache.pools[j]
    if not state:
        return cache
    if layer.table is not None:
        places = jnp.arange(plan.layers[i].capacity)
        slots = jnp.where(places < layer.fill[..., None], places, -1)
        state = {n: _scatter(plan, layer, pool.slot_state[n], slots, x) for n, x in state.items()}
    return cache.put(i, layer, j, _constrain(layer, pool.replace(slot_state=state)))


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
        store=_take_fields(plan, i, entries.store, index),
        pos=take_slots(entries.pos, index, fill=-1),
        slot_state={n: take_slots(x, index) for n, x in entries.slot_state.items()},
    )
    layer = layer.replace(fill=count, next_slot=count, limit=limit)
    if layer.table is None:
        fitted = jax.tree.map(_fit, plan.specs().pools[lp.pool], new, is_leaf=arrays.is_spec)
        return cache.put(i, layer, lp.pool, _constrain(layer, fitted)), 0

    # Ragged: hand out the pool's pages anew, each head getting room for what it keeps and may still append.
    pool = arrays.init(plan.specs().pools[lp.pool]) if pool is None else pool
    grow = 1 if lp.policy.evict_decode else plan.reserve
    room = jnp.minimum(jnp.maximum(limit, count) + grow, lp.capacity)
    each = -(-room // plan.page_size)  # pages per head, int32 [batch, kv_heads]
    ends = first_page + jnp.cumsum(each.reshape(-1)).reshape(each.shape)
    number = jnp.arange(layer.table.shape[2])
    table = jnp.where(number < each[..., None], (ends - each)[..., None] + number, -1)
    layer = layer.replace(table=jnp.where(table < pool.pos.shape[0], table, -1).astype(jnp.int32))
    places = jnp.arange(index.shape[2])
    slots = jnp.where(places < count[..., None], places, -1)
    fields = lp.policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)

    def put(array: Array, values: Array, per: int = 1) -> Array:
        return _scatter(plan, layer, array, slots[:, :, ::per] // per, values, per)

    pool = Pool(
        store={n: put(pool.store[n], x, fields[n].per) for n, x in new.store.items()},
        pos=put(pool.pos, new.pos),
        slot_state={n: put(pool.slot_state[n], x) for n, x in new.slot_state.items()},
    )
    return cache.put(i, layer, lp.pool, _constrain(layer, pool)), ends.reshape(-1)[-1]


def _take_fields(plan: Plan, i: int, store: dict[str, Array], index: Array) -> dict[str, Array]:
    fields = plan.layers[i].policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)
    grouped = [n for n, f in fields.items() if f.per != 1]
    if grouped:
        raise ValueError(
            f"entries of a codec that groups slots cannot be moved one by one ({', '.join(grouped)})"
        )
    return {name: take_slots(x, index) for name, x in store.items()}


def _fit(spec: arrays.ArraySpec, x: Array) -> Array:
    """Pad or cut the slot axis of a Dense array to the planned capacity."""
    extra = spec.shape[2] - x.shape[2]
    if extra <= 0:
        return x[:, :, : spec.shape[2]]
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 3), constant_values=spec.fill)


def evict_one(plan: Plan, cache: KVCache, i: int, scores: Array) -> KVCache:
    """Free the lowest-scored slot of every head of layer i that holds more than its limit.

    scores f32 [batch, kv_heads, slots] over the dense view. The freed slot is where the next token goes.
    """
    layer, j = cache.layers[i], plan.layers[i].pool
    pool = cache.pools[j]
    pos = view(plan, cache, i).pos
    victim = jnp.argmin(jnp.where(pos >= 0, scores, jnp.inf), axis=-1).astype(jnp.int32)
    over = jnp.sum(pos >= 0, axis=-1, dtype=jnp.int32) > layer.limit
    slot = jnp.where(over, victim, -1)[..., None]
    new_pos = _scatter(plan, layer, pool.pos, slot, jnp.full(slot.shape, -1, jnp.int32))
    layer = layer.replace(next_slot=jnp.where(over, victim, layer.next_slot))
    return cache.put(i, layer, j, pool.replace(pos=new_pos))


def _constrain(layer: Layer, pool: Pool) -> Pool:
    """Sharding constraints on every stored array, from its logical axes."""
    lead = ("pages", "page_slots") if layer.table is not None else (*LEAD, "slots")
    return jax.tree.map(lambda x: constrain(x, (*lead, *(None,) * (x.ndim - len(lead)))), pool)
