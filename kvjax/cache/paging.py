"""The disk tier inside a program: callbacks that write, read and report on the store of a cache.

The calls are ordered, so that a page is written before it is read and a report follows what it reports on. A callback
raises for no row: what goes wrong is kept in the store, and `settle` turns it into `Disk.failed` after every call.
A callback hands over whole buffers: on a GPU a table's worth of blocks crosses the link, whatever is missing of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from kvjax.cache import disk
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache

Array = jax.Array


def open_files(plan: Plan, cache: KVCache) -> KVCache:
    """The cache with a store of its own. Under `jit` each run of the program opens one.

    `Generator` closes it with the session; who calls `engine.prefill` closes it by `disk.close(cache.disk.handle)`. What is
    open when the process exits is closed then.
    """
    if not plan.on_disk:
        return cache
    handle = io_callback(
        lambda: np.int32(disk.open_store(plan)), jax.ShapeDtypeStruct((), jnp.int32), ordered=True
    )
    return cache.replace(disk=cache.disk.replace(handle=handle))


def write(plan: Plan, cache: KVCache, i: int, slots: Array, fields: dict[str, Array]) -> Array:
    """Write layer i's first `slots` int32 [batch, kv_heads], whole pages; `fields` are those of the host part.

    Returns `slots`, available once the pages are written.
    """
    if plan.host_slots(i) == 0:
        return slots

    def put(handle: Array, pages: Array, fields: dict[str, Array]) -> np.ndarray:
        disk.store(handle).write(i, np.asarray(pages), {n: np.asarray(x) for n, x in fields.items()})
        return np.int32(0)

    raw = {n: _raw(x) for n, x in fields.items()}
    pages = slots // plan.span(i)
    shape = jax.ShapeDtypeStruct((), jnp.int32)
    return slots + io_callback(put, shape, cache.disk.handle, pages, raw, ordered=True)


def read(
    plan: Plan, cache: KVCache, i: int, table: Array, wanted: Array, names: tuple[str, ...]
) -> dict[str, Array]:
    """Fields `names` of layer i's blocks `table` int32 [batch, kv_heads, n] where `wanted` (bool, likewise), else zeros.

    Side by side as in a pool, [batch, kv_heads, before, n * block / per, ...], of unsigned integers.
    """
    section = disk.sections(plan)[i]
    parts = {part.name: part for part in section.parts if part.name in names}
    shapes = {n: jax.ShapeDtypeStruct((*table.shape, *p.shape), p.dtype) for n, p in parts.items()}

    def get(handle: Array, table: Array, wanted: Array) -> dict[str, np.ndarray]:
        return disk.store(handle).read(i, np.asarray(table), np.asarray(wanted), tuple(parts))

    wanted &= (table >= 0) & (table < section.pages * section.blocks)
    got = io_callback(get, shapes, cache.disk.handle, table, wanted, ordered=True) if parts else {}
    out = {}
    for name, x in got.items():
        axis = 2 + parts[name].axis
        x = jnp.moveaxis(x, 2, axis)
        out[name] = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return out


def settle(plan: Plan, cache: KVCache) -> KVCache:
    """The cache with the rows that failed, and the pages read, since the last report."""
    if not plan.on_disk:
        return cache
    failed, pages = cache.disk.failed, cache.disk.pages
    shapes = jax.ShapeDtypeStruct(failed.shape, jnp.bool_), jax.ShapeDtypeStruct(pages.shape, jnp.int32)
    new, pages = io_callback(
        lambda handle: disk.store(handle).report(), shapes, cache.disk.handle, ordered=True
    )
    return cache.replace(disk=cache.disk.replace(failed=failed | new, pages=pages))


def _raw(x: Array) -> Array:
    """The same bits as unsigned integers, which every version of numpy knows."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
