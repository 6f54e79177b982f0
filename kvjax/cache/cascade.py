"""Layers that compete for one budget, stored as they come: each new layer shrinks the ones before it (CAKE).

The layers seen so far share the budget of all layers, so that a prompt never holds more than that budget and the layer at
work. A head's entries lie in its pages best first until the call ends, so that to shrink is to lower a count and to return
the pages past it; the new layer gets pages that are free. At the end every layer is put back into time order. Counts never
grow, and those after the last layer are what a single division gives, but for the rounding of the ones before.

The method is defined for whole prompts. A chunk of one is divided anew, by what its own window says, and a layer may get
more than it held before: what it competes with, the chunk's tokens and its entries so far, must not be lost until the
layers after it have been heard, whose own entries their attention still needs. So the layers of a chunk move, one by one,
from the pool that was to a second one where they cascade, which takes its place at the end. That holds twice the budget and
the layer at work; no order of layers with less room gives the counts of a single division.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.arrays import init
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, Layer, Pool, View
from kvjax.policies.base import Tokens
from kvjax.policies.ordering import time_order

Array = jax.Array


def sharing(plan: Plan) -> list[int]:
    """The layers that share a pool."""
    return [i for i, lp in enumerate(plan.layers) if lp.shares_pool]


def applies(plan: Plan, i: int) -> bool:
    """True when layer i of a prompt is stored this way: single tokens are kept as they are, one by one."""
    lp, policy = plan.layers[i], plan.layers[i].policy
    alone = type(policy.selection) is Tokens and not policy.reducer.merges and not policy.rerotate
    simple = not policy.codec.deferred and policy.codec.group == 1 and policy.selector is None
    return lp.shares_pool and policy.allocator.cascades and alone and simple


@struct.dataclass
class Cascade:
    """What is known of the layers so far, within one call; n of them."""

    # Where they go while layers to come are read from the cache's own pool; None: into that one.
    pool: Pool | None = None
    stats: tuple[Any, ...] = ()  # what the allocator measured of each
    fixed: tuple[Array, ...] = ()  # int32 [batch, kv_heads] protected entries of each
    had: tuple[Array, ...] = ()  # int32 [batch, kv_heads] entries that each came with
    counts: Array | None = None  # int32 [n, batch, kv_heads] entries that the budget leaves them now
    limits: Array | None = None  # int32 [n, batch, kv_heads] `Layer.limit`
    tables: Array | None = None  # int32 [n, batch, kv_heads, pages per head] `Layer.table`

    def held(self, plan: Plan, i: int) -> Array:
        """int32 [n, batch, kv_heads]: entries that they hold."""
        return jnp.minimum(self.counts, plan.layers[i].keep_capacity)


def start(plan: Plan, i: int, *, fresh: bool) -> Cascade:
    """Nothing yet, before layer i, the first; fresh: the cache holds nothing that later layers read."""
    return Cascade(pool=None if fresh else init(plan.pool_specs[plan.layers[i].pool]))


def add(plan: Plan, cache: KVCache, i: int, entries: View, scores: Array, now: Cascade) -> KVCache:
    """Store layer i, the last of those that `now` counts, and shrink the others; `now.tables` are of those, if any.

    scores f32 [batch, kv_heads, slots] of the new layer's entries, protected, -inf where there is none.
    """
    layer, j, held = cache.layers[i], plan.layers[i].pool, now.held(plan, i)
    pool = cache.pools[j] if now.pool is None else now.pool
    pages = next(iter(pool.store.values())).shape[0]
    number = jnp.arange(layer.table.shape[2])
    need = number < ops.pages_for(plan, i, jnp.maximum(now.limits, held))[..., None]
    tables = jnp.zeros((0, *layer.table.shape), jnp.int32) if now.tables is None else now.tables
    tables = jnp.where(need[:-1], tables, -1)
    used = jnp.zeros(pages, bool).at[jnp.where(tables < 0, pages, tables)].set(True, mode="drop")
    free = jnp.nonzero(~used, size=pages, fill_value=pages)[0].astype(jnp.int32)
    rank = jnp.cumsum(need[-1].reshape(-1), dtype=jnp.int32).reshape(layer.table.shape) - 1
    table = jnp.where(need[-1] & (rank < pages), free[jnp.minimum(rank, pages - 1)], -1)
    table = jnp.where(table < pages, table, -1)
    layer = layer.replace(table=table, fill=held[-1], next_slot=held[-1], limit=now.limits[-1])
    slots = scores.shape[2]
    best, order = jax.lax.top_k(scores, min(slots, plan.layers[i].keep_capacity))
    order = jnp.where(best > -jnp.inf, order, slots)
    now = now.replace(tables=jnp.concatenate([tables, table[None]]))
    pool = _put(plan, i, layer, pool, entries, order)
    if now.pool is None:
        return cache.put(i, layer, j, pool).replace(cascade=now)
    return cache.replace(cascade=now.replace(pool=pool))


def close(plan: Plan, cache: KVCache) -> KVCache:
    """The cache once the last layer has come: entries of every layer in time order."""
    now = cache.cascade
    if now.pool is not None:
        first = sharing(plan)[0]
        cache = cache.put(first, cache.layers[first], plan.layers[first].pool, now.pool)
    for n, i in enumerate(sharing(plan)):
        held, j = now.held(plan, i)[n], plan.layers[i].pool
        layer = cache.layers[i].replace(table=now.tables[n], fill=held, next_slot=held, limit=now.limits[n])
        cache = cache.put(i, layer, j, cache.pools[j])
        seen = ops.view(plan, cache, i)
        pool = _put(plan, i, layer, cache.pools[j], seen, time_order(seen.pos))
        cache = cache.put(i, layer, j, pool)
    return cache.replace(cascade=None)


def _put(plan: Plan, i: int, layer: Layer, pool: Pool, entries: View, order: Array) -> Pool:
    """The pool with `entries` in the order int32 [batch, kv_heads, n] in the pages of layer i, as many as it holds."""
    new = Pool(
        store={n: ops.take_slots(x, order) for n, x in entries.store.items()},
        pos=ops.take_slots(entries.pos, order, fill=-1),
        slot_state={n: ops.take_slots(x, order) for n, x in entries.slot_state.items()},
    )
    return ops.fill_pages(plan, i, layer, pool, new, layer.fill)
