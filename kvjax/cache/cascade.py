"""Layers that compete for one budget, stored as they come: each new layer shrinks the ones before it (CAKE).

The layers seen so far share the budget of all layers, so that a prompt never holds more than that budget and the layer at
work. A head's entries lie in its pages best first until the prompt ends, so that to shrink is to lower a count and to return
the pages past it; the new layer gets pages that are free. At the end every layer is put back into time order. Counts never
grow, and those after the last layer are what a single division gives, but for the rounding of the ones before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, Pool, View
from kvjax.policies.base import Tokens
from kvjax.policies.ordering import time_order

Array = jax.Array


def sharing(plan: Plan) -> list[int]:
    """The layers that share a pool."""
    return [i for i, lp in enumerate(plan.layers) if lp.shares_pool]


def applies(plan: Plan, i: int) -> bool:
    """True when layer i of a whole prompt is stored this way: single tokens are kept as they are, one by one."""
    lp, policy = plan.layers[i], plan.layers[i].policy
    alone = type(policy.selection) is Tokens and not policy.reducer.merges and not policy.rerotate
    simple = not policy.codec.deferred and policy.codec.group == 1 and policy.selector is None
    return lp.shares_pool and policy.allocator.cascades and alone and simple


@struct.dataclass
class Cascade:
    """What is known of the layers so far, within one call; n of them."""

    stats: tuple[Any, ...]  # what the allocator measured of each
    counts: Array  # int32 [n, batch, kv_heads] entries that the budget leaves them now
    limits: Array  # int32 [n, batch, kv_heads] `Layer.limit`
    tables: Array | None  # int32 [n, batch, kv_heads, pages per head] `Layer.table`

    def held(self, plan: Plan, i: int) -> Array:
        """int32 [n, batch, kv_heads]: entries that they hold."""
        return jnp.minimum(self.counts, plan.layers[i].keep_capacity)


def add(plan: Plan, cache: KVCache, i: int, entries: View, scores: Array, now: Cascade) -> KVCache:
    """Store layer i, the last of those that `now` counts, and shrink the others; `now.tables` are of those, if any.

    scores f32 [batch, kv_heads, slots] of the new layer's entries, protected, -inf where there is none.
    """
    layer, j, held = cache.layers[i], plan.layers[i].pool, now.held(plan, i)
    pages = next(iter(cache.pools[j].store.values())).shape[0]
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
    cache = cache.put(i, layer, j, cache.pools[j])
    slots = scores.shape[2]
    best, order = jax.lax.top_k(scores, min(slots, plan.layers[i].keep_capacity))
    order = jnp.where(best > -jnp.inf, order, slots)
    now = now.replace(tables=jnp.concatenate([tables, table[None]]))
    return _put(plan, cache, i, entries, order).replace(cascade=now)


def close(plan: Plan, cache: KVCache) -> KVCache:
    """The cache once the last layer has come: entries of every layer in time order."""
    now = cache.cascade
    for n, i in enumerate(sharing(plan)):
        held, j = now.held(plan, i)[n], plan.layers[i].pool
        layer = cache.layers[i].replace(table=now.tables[n], fill=held, next_slot=held, limit=now.limits[n])
        cache = cache.put(i, layer, j, cache.pools[j])
        seen = ops.view(plan, cache, i)
        cache = _put(plan, cache, i, seen, time_order(seen.pos))
    return cache.replace(cascade=None)


def _put(plan: Plan, cache: KVCache, i: int, entries: View, order: Array) -> KVCache:
    """The cache with `entries` in the order int32 [batch, kv_heads, n] in the pages of layer i, as many as it holds."""
    layer, j = cache.layers[i], plan.layers[i].pool
    new = Pool(
        store={n: ops.take_slots(x, order) for n, x in entries.store.items()},
        pos=ops.take_slots(entries.pos, order, fill=-1),
        slot_state={n: ops.take_slots(x, order) for n, x in entries.slot_state.items()},
    )
    return cache.put(i, layer, j, ops.fill_pages(plan, i, layer, cache.pools[j], new, layer.fill))
