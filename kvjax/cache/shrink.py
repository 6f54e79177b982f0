"""Shrink to fit: after a prompt, pages that no head was given are returned, between prefill and decoding.

Allocators whose counts are an outcome (`Allocator.outcome`) may keep anything up to their cap, so that prefill needs
pools of the cap's size. The host then reads how many pages are in use and moves those into smaller pools, whose sizes
are rounded up by at most 1/16: requests that kept about as much share the programs that follow.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import arrays
from kvjax.cache.ops import constrain_pool
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, Pool
from kvjax.sharding import to_host

Array = jax.Array


def rounded(pages: int, most: int) -> int:
    """The size of a pool for `pages` pages: 16 sizes per factor of two, no larger than `most`.

    >>> rounded(100, 1000), rounded(5, 1000), rounded(999, 1000)
    (100, 5, 1000)
    """
    step = max(1, (1 << max(pages, 1).bit_length() - 1) // 16)
    return min(most, max(1, -(-pages // step)) * step)


def shrink(plan: Plan, cache: KVCache) -> tuple[Plan, KVCache, tuple[int, ...]]:
    """(plan, cache) with pools of the pages in use, and the pages per pool that the prompt alone needs.

    Layers that decide alone get one pool together where their pages are alike, so that one number tells programs apart;
    otherwise each pool is rounded by itself. Dense caches, and plans that are fitted already, are returned as they are,
    with no pages.
    """
    ragged = [i for i, lp in enumerate(plan.layers) if lp.ragged]
    if not ragged or plan.pages:
        return plan, cache, ()
    tables = {i: to_host(cache.layers[i].table) for i in ragged}
    entries = {i: to_host(cache.layers[i].fill) for i in ragged}
    used = {i: int((tables[i] >= 0).sum()) for i in ragged}
    prompt = {i: int((-(-entries[i] // plan.page(plan.layers[i].policy))).sum()) for i in ragged}
    groups = [ragged] if _alike(plan, ragged) else [[i] for i in ragged]
    sizes, kept = [0] * len(plan.layers), [0] * len(plan.layers)
    most = {i: next(iter(cache.pools[plan.layers[i].pool].store.values())).shape[0] for i in ragged}
    for group in groups:
        pools = {plan.layers[i].pool: most[i] for i in group}
        sizes[group[0]] = rounded(sum(used[i] for i in group), sum(pools.values()))
        kept[group[0]] = rounded(sum(prompt[i] for i in group), sizes[group[0]])
    fitted = dataclasses.replace(plan, pages=tuple(sizes))
    moves, at = {}, dict.fromkeys(ragged, 0)
    for (
        i
    ) in ragged:  # page p of the old pool becomes page moves[i][p] of the new one; layers own different pages
        home = fitted.layers[i].pool
        mine = np.sort(tables[i][tables[i] >= 0])
        move = np.full(most[i], sizes[home], np.int32)
        move[mine] = at[home] + np.arange(len(mine))
        at[home] += len(mine)
        moves[i] = move
    return fitted, _move(plan, fitted, cache, moves), tuple(kept)


def _alike(plan: Plan, ragged: list[int]) -> bool:
    """True when the layers' pages have one shape, and nothing compacts a layer without the others."""
    policies = [plan.layers[i].policy for i in ragged]
    if all(plan.layers[i].shares_pool for i in ragged):
        return True
    if any(p.evict_decode and (p.spare > 1 or p.rerotate) for p in policies):
        return False
    sizes = (plan.shape.head_dim, plan.shape.dtype)
    layouts = [(p.codec.fields(*sizes), plan.page(p)) for p in policies]
    return all(layout == layouts[0] for layout in layouts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _move(plan: Plan, fitted: Plan, cache: KVCache, moves: dict[int, Array]) -> KVCache:
    pools, layers = list(cache.pools), list(cache.layers)
    fresh: dict[int, Pool] = {}
    for i, move in moves.items():
        home = fitted.layers[i].pool
        pool = fresh.get(home)
        if pool is None:
            pool = arrays.init(fitted.pool_specs[home])
        old = cache.pools[plan.layers[i].pool]
        pool = jax.tree.map(lambda new, x, move=move: new.at[move].set(x, mode="drop"), pool, old)
        fresh[home] = constrain_pool(fitted, i, pool)
        table = layers[i].table
        moved = jnp.where(table >= 0, jnp.take(move, jnp.maximum(table, 0)), -1)
        layers[i] = layers[i].replace(table=moved)
    for i in moves:
        pools[plan.layers[i].pool] = None
    for home, pool in fresh.items():
        pools[home] = pool
    return cache.replace(layers=tuple(layers), pools=tuple(pools))
