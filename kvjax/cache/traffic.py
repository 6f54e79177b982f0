"""Bytes that one decode step reads of a cache, from what the cache holds."""

from __future__ import annotations

import math

import numpy as np

from kvjax.arrays import itembits, nbytes
from kvjax.cache import disk, index_layout, selecting
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache
from kvjax.sharding import to_host


def read_bytes(plan: Plan, cache: KVCache) -> float:
    """Bytes of keys, values, scales and index that a decode step on this cache reads, all layers and rows together.

    A layer with a selector counts what its last step read (before the first step: what it plans to read) and its index,
    the latter divided by the steps that share a selection.
    """
    return sum(_layer_bytes(plan, cache, i) for i in range(plan.shape.layers))


def read_fraction(plan: Plan, cache: KVCache) -> float:
    """`read_bytes` over what a step on the full cache of the same tokens reads; 1.0 for the full cache."""
    shape = plan.shape
    tokens = to_host(cache.length).astype(np.int64)
    full = 0.0
    for window in shape.windows:
        seen = tokens if window is None else np.minimum(tokens, window)
        full += float(seen.sum()) * 2 * shape.kv_heads * shape.head_dim * itembits(shape.dtype) / 8
    return read_bytes(plan, cache) / full if full else 1.0


def _layer_bytes(plan: Plan, cache: KVCache, i: int) -> float:
    lp, layer = plan.layers[i], cache.layers[i]
    policy, shape = lp.policy, plan.shape
    slot = policy.codec.bits_per_element(shape.head_dim, shape.dtype) * 2 * shape.head_dim / 8
    stored = to_host(layer.fill).astype(np.int64)
    total = 0.0
    if layer.residual is not None:
        waiting = to_host(layer.residual.count).astype(np.int64)
        total += float(waiting.sum()) * 2 * shape.head_dim * itembits(shape.dtype) / 8
    selector = policy.selector
    if selector is None:
        return total + float(stored.sum()) * slot
    filled = float(stored.sum()) / max(1, stored.size * lp.capacity)
    scanned = index_layout.scanned(plan, i) * min(1.0, filled)
    if index_layout.retrieving(plan, i):
        last = to_host(layer.index["reads"]).astype(np.int64)
        read = np.where(last > 0, last, index_layout.planned(plan, i, stored))
    else:
        read = to_host(selecting.streamed(plan, cache, i)).astype(np.int64)
    shared = selector.interval if not selector.triggered else 1
    return total + float(read.sum()) * slot + scanned / shared


def moved_bytes(plan: Plan, cache: KVCache) -> float:
    """Bytes that the last decode step moved from host memory to the device, all layers and rows together.

    What lives on disk passes through host memory, so that it counts here too; `disk_bytes` is what came from the disk.
    """
    total = 0.0
    for i, lp in enumerate(plan.layers):
        if not lp.offloaded:
            continue
        layer = cache.layers[i]
        if lp.policy.selector is None:
            start = to_host(layer.start).astype(np.int64)
            slots = int(start.sum() if cache.disk is None else start[~to_host(cache.disk.failed)].sum())
        else:
            slots = int(to_host(layer.index["moved"]).astype(np.int64).sum()) * plan.block(i)
        total += slots * moved_per_slot(plan, i)
    return total


def disk_bytes(plan: Plan, cache: KVCache) -> int:
    """Bytes that the last call on this cache (a decode step, a question) read from disk: whole pages and their checksums."""
    if cache.disk is None:
        return 0
    pages = to_host(cache.disk.pages)
    return sum(int(pages[i]) * section.record_bytes for i, section in disk.sections(plan).items())


def moved_per_slot(plan: Plan, i: int) -> float:
    """Bytes that fetching one entry of an offloaded layer moves: its fields but for those that the selector supplies."""
    lp, shape = plan.layers[i], plan.shape
    specs = lp.policy.codec.specs((), ("slots",), plan.block(i), shape.head_dim, shape.dtype)
    supplied = frozenset() if lp.policy.selector is None else lp.policy.selector.supplies
    return nbytes([s for n, s in specs.items() if n not in supplied]) / plan.block(i)


def selector_memory(plan: Plan) -> int:
    """Bytes of all indices, as allocated."""
    specs = [plan.index_specs(i) for i, lp in enumerate(plan.layers) if lp.policy.selector is not None]
    return sum(math.ceil(nbytes(s)) for s in specs)
