"""Layers that compete for one budget, stored as they come: each new layer shrinks the ones before it (CAKE).

The layers seen so far share the budget of all layers, so that a prompt never holds more than that budget and the layer at
work. A head's entries lie in its pages best first until the prompt ends, so that to shrink is to lower a count and to return
the pages past it; the new layer gets pages that are free. At the end every layer is put back into time order. Counts never
grow, and those after the last layer are what a single division gives, but for the rounding of the ones before.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

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


def add(
    plan: Plan,
    cache: KVCache,
    i: int,
    entries: View,
    scores: Array,
    counts: Sequence[Array],
    limits: Sequence[Array],
) -> KVCache:
    """Store layer i, the last of those that `counts` and `limits` int32 [batch, kv_heads] are for, and shrink the others.

    scores f32 [batch, kv_heads, slots] of the new layer's entries, protected, -inf where there is none.
    """
    layers = sharing(plan)[: len(counts)]
    pages = next(iter(cache.pools[plan.layers[i].pool].store.values())).shape[0]
    used = jnp.zeros(pages, bool)
    for m, count, limit in zip(layers, counts, limits):
        layer, j = cache.layers[m], plan.layers[m].pool
        number = jnp.arange(layer.table.shape[2])
        each = ops.pages_for(plan, m, jnp.maximum(limit, count))
        if m == i:
            free = jnp.nonzero(~used, size=pages, fill_value=pages)[0]
            begin = jnp.cumsum(each.reshape(-1)).reshape(each.shape) - each
            source = jnp.minimum(begin[..., None] + number, pages - 1)
            table = jnp.where(number < each[..., None], free[source], -1)
            table = jnp.where(table < pages, table, -1).astype(jnp.int32)
        else:
            table = jnp.where(number < each[..., None], layer.table, -1)
            used = used.at[jnp.where(table < 0, pages, table)].set(True, mode="drop")
        layer = layer.replace(table=table, fill=count, next_slot=count, limit=limit)
        cache = cache.put(m, layer, j, cache.pools[j])
    slots = scores.shape[2]
    best, order = jax.lax.top_k(scores, min(slots, plan.layers[i].keep_capacity))
    order = jnp.where(best > -jnp.inf, order, slots)
    return _put(plan, cache, i, entries, order)


def close(plan: Plan, cache: KVCache) -> KVCache:
    """The cache once the last layer has come: entries of every layer in time order."""
    for i in sharing(plan):
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
