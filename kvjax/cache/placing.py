"""Offloaded layers: prompt entries in host memory or on disk, the newest and the ones just read on the device.

`Pool.host` holds the prompt's fields and never changes; `Pool.store` the slots from `Layer.start` on, a *tail* with room
for new tokens; the index holds the blocks of the last step (`held`, `held.FIELD`). A step fetches those chosen blocks that
are neither in the tail nor held. Slots keep their numbers, so that selectors know nothing of it.

On a GPU the host part is pinned memory that kernels read over the link without a copy (`readable`): a gather moves only
the rows it names. On a CPU it is an array like any other. With `offload(disk=...)` the host part has no arrays: its
complete pages are in files, which callbacks read and write (`kvjax.cache.paging`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache import paging
from kvjax.cache.pinned import device_view
from kvjax.cache.plan import Plan
from kvjax.cache.state import Fetched, KVCache, Pool
from kvjax.codecs.base import Field
from pallas_kernels.fetch import fetch_blocks

Array = jax.Array
Host = tuple[dict[str, Array] | None, ...]  # `Pool.host` of every pool


def offloaded(plan: Plan, i: int) -> bool:
    """True when layer i's prompt lives in host memory or on disk."""
    return plan.layers[i].offloaded


def _fields(plan: Plan, i: int) -> dict[str, Field]:
    return plan.layers[i].policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)


def _blocks(x: Array, field: Field, block: int) -> Array:
    """[batch, kv_heads, before, slots / per, ...] -> [.., blocks, block / per, ...]."""
    axis = 2 + len(field.before)
    return x.reshape(*x.shape[:axis], -1, block // field.per, *x.shape[axis + 1 :])


def _take(x: Array, field: Field, block: int, numbers: Array) -> Array:
    """Blocks `numbers` int32 [batch, kv_heads, n] of a field, side by side; numbers outside are clipped."""
    inner = len(field.before)
    got = jax.vmap(jax.vmap(lambda a, n: jnp.take(a, n, axis=inner, mode="clip")))(
        _blocks(x, field, block), numbers
    )
    return got.reshape(*got.shape[: 2 + inner], -1, *got.shape[4 + inner :])


def _far_blocks(far: Array, field: Field, block: int, source: Array) -> Array:
    """Blocks of a field side by side as `source` int32 [batch, kv_heads, n] names them: `fetch_blocks`."""
    far = _blocks(far, field, block)
    between = (1,) * len(field.before)
    rows, n = far.shape[: 2 + len(between)], source.shape[2]
    source = jnp.broadcast_to(source.reshape(*source.shape[:2], *between, n), (*rows, n))
    got = fetch_blocks(far, source)
    return got.reshape(*rows, -1, *got.shape[len(rows) + 2 :])


def _spread(mask: Array, field: Field, block: int, like: Array) -> Array:
    """bool [batch, kv_heads, n] of blocks -> broadcastable to the field [.., n * block / per, ...]."""
    mask = jnp.repeat(mask, block // field.per, axis=2)
    shape = (*mask.shape[:2], *(1,) * len(field.before), mask.shape[2])
    return mask.reshape(*shape, *(1,) * (like.ndim - len(shape)))


def split(plan: Plan, cache: KVCache, i: int) -> KVCache:
    """Move layer i's entries to host memory or disk, but for the tail. Under `jit` on a GPU the copy starts here."""
    lp, layer = plan.layers[i], cache.layers[i]
    pool, block, span, fields = cache.pools[lp.pool], plan.block(i), plan.span(i), _fields(plan, i)
    end = jnp.maximum(layer.fill - plan.tail_recent(i), 0)
    start = jnp.minimum(end // span * span, plan.host_slots(i)).astype(jnp.int32)
    number = start[..., None] // block + jnp.arange(plan.tail_slots(i) // block)
    tail = {n: _take(x, fields[n], block, number) for n, x in pool.store.items()}
    host = {}
    for name, x in pool.store.items():
        axis = 2 + len(fields[name].before)
        part = jax.lax.slice_in_dim(x, 0, plan.host_slots(i) // fields[name].per, axis=axis)
        pinned = jax.default_backend() != "cpu" and not lp.on_disk
        host[name] = jax.device_put(part, jax.memory.Space.Host) if pinned else part
    if lp.on_disk:
        start, host = paging.write(plan, cache, i, start, host), {}
    return cache.put(i, layer.replace(start=start), lp.pool, pool.replace(store=tail, host=host))


def whole_store(plan: Plan, cache: KVCache, i: int) -> dict[str, Array]:
    """Layer i's fields as if they had stayed on the device [batch, kv_heads, capacity / per, ...]: reads all of them."""
    lp, layer = plan.layers[i], cache.layers[i]
    pool, block, fields = cache.pools[lp.pool], plan.block(i), _fields(plan, i)
    number = jnp.broadcast_to(jnp.arange(lp.capacity // block), (*layer.fill.shape, lp.capacity // block))
    late = number - layer.start[..., None] // block
    out, pages = {}, {}
    if lp.on_disk:
        pages = paging.read(plan, cache, i, number, late < 0, tuple(pool.store))
    for name, tail in pool.store.items():
        field = fields[name]
        far = pages[name] if lp.on_disk else _take(pool.host[name], field, block, number)
        far = _restore(far, tail.dtype)
        near = _take(tail, field, block, late)
        out[name] = jnp.where(_spread(late >= 0, field, block, near), near, far)
    return out


def join(plan: Plan, cache: KVCache, i: int) -> KVCache:
    """Undo `split`: the whole layer on the device, to be compressed together with more tokens."""
    j, pool = plan.layers[i].pool, cache.pools[plan.layers[i].pool]
    layer = cache.layers[i].replace(start=None)
    return cache.put(i, layer, j, Pool(whole_store(plan, cache, i), pool.pos, pool.slot_state))


def _restore(x: Array, dtype: Any) -> Array:
    """Views of host memory may have an integer dtype of the same width."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def fetch(plan: Plan, cache: KVCache, i: int, table: Array, supplied: dict[str, Array]) -> KVCache:
    """Layer i with the blocks of an ascending `table` int32 [batch, kv_heads, n] side by side in its index.

    supplied: fields [batch, kv_heads, n * block, ...] that the selector computes instead of fetching them.
    """
    return put(plan, cache, i, prefetch(plan, cache, i, table, supplied))


def prefetch(plan: Plan, cache: KVCache, i: int, table: Array, supplied: dict[str, Array]) -> Fetched:
    """What `fetch` moves, but for the blocks of the tail, whatever is stored there meanwhile; `put` adds those."""
    lp, layer = plan.layers[i], cache.layers[i]
    pool, block, fields = cache.pools[lp.pool], plan.block(i), _fields(plan, i)
    late = table - layer.start[..., None] // block
    same = (table[..., None] == layer.index["held"][:, :, None]) & (table >= 0)[..., None]
    hit, place = jnp.any(same, axis=-1), jnp.argmax(same, axis=-1).astype(jnp.int32)
    missing = (table >= 0) & (late < 0) & ~hit
    names = tuple(n for n in pool.store if n not in supplied)
    if lp.on_disk:
        missing &= ~cache.disk.failed[:, None, None]
        moved = paging.read(plan, cache, i, table, missing, names)
    source = jnp.where(missing, table, -1 - place)
    if not lp.on_disk:
        moved = {n: _far_blocks(pool.host[n], fields[n], block, source) for n in names}
    return Fetched(table, source, moved, supplied)


def put(plan: Plan, cache: KVCache, i: int, fetched: Fetched) -> KVCache:
    """The blocks that layer i reads at this step in its index, those of its tail as the tail is now."""
    layer, block, fields = cache.layers[i], plan.block(i), _fields(plan, i)
    index = dict(layer.index)
    source = fetched.source
    late = fetched.table - layer.start[..., None] // block
    for name, tail in cache.pools[plan.layers[i].pool].store.items():
        field = fields[name]
        if name in fetched.supplied:
            far = fetched.supplied[name].astype(tail.dtype)
        else:
            kept = _take(index[f"held.{name}"], field, block, -1 - jnp.minimum(source, -1))
            moved = _restore(fetched.fields[name], tail.dtype)
            far = jnp.where(_spread(source >= 0, field, block, kept), moved, kept)
        near = _take(tail, field, block, late)
        index[f"held.{name}"] = jnp.where(_spread(late >= 0, field, block, near), near, far)
    index["held"] = fetched.table
    index["moved"] = jnp.sum(source >= 0, axis=-1, dtype=jnp.int32)
    layers = list(cache.layers)
    layers[i] = layer.replace(index=index)
    return cache.replace(layers=tuple(layers))


def detach(cache: KVCache) -> tuple[KVCache, Host]:
    """The cache without its host part, to be donated, and the host part."""
    host = tuple(None if p is None else p.host for p in cache.pools)
    return cache.replace(pools=tuple(p if p is None else p.replace(host=None) for p in cache.pools)), host


def attach(cache: KVCache, host: Host | None) -> KVCache:
    """Undo `detach`; None: the cache has its host part."""
    if host is None:
        return cache
    pools = tuple(p if p is None or h is None else p.replace(host=h) for p, h in zip(cache.pools, host))
    return cache.replace(pools=pools)


def readable(host: Host) -> Host:
    """Host parts that leave a jitted prefill, as arguments that kernels of later calls read in place."""
    return jax.tree.map(device_view, host)


def offloads(plan: Plan) -> bool:
    """True when any layer is offloaded."""
    return any(lp.offloaded for lp in plan.layers)


def tail_places(cache: KVCache, i: int, slots: Array) -> Array:
    """Slots int32 [batch, kv_heads, n] as places in `Pool.store`; -1 stays, and what lies in the host part becomes -1."""
    start = cache.layers[i].start
    if start is None:
        return slots
    return jnp.maximum(slots - start[..., None], -1)
