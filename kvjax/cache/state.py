"""The cache pytrees. One `Layer` per model layer, its entries in a `Pool`; shapes differ between layers.

Dense layout: a pool's arrays lead with [batch, kv_heads, slots]. Ragged layout: they lead with
[pages, page_size], and `Layer.table` maps (row, head, page number) to a page of the pool. Both present the same
dense view (`kvjax.cache.ops.view`) to policies and to the XLA path; kernels read pages directly.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

Array = jax.Array


@struct.dataclass
class Pool:
    """What is stored: encoded keys and values, the position of each slot, and per-slot policy state."""

    # Codec fields [batch, kv_heads, slots / per, ...] or [pages, page_size / per, ...].
    store: dict[str, Array]
    # int32 [batch, kv_heads, slots] or [pages, page_size]: true position of the entry, -1 = empty.
    # None (deferred codecs without eviction): slot n holds position `codec.sink` + n.
    pos: Array | None
    slot_state: dict[str, Array]  # like `pos`, with a suffix per name; moves with the entry
    # Offloaded layers only: the prompt's fields in another memory ({}: on disk); `store` then holds the slots from
    # `Layer.start` on.
    host: dict[str, Array] | None = None


@struct.dataclass
class Residual:
    """Entries that a deferred codec holds in model dtype: first its sinks, then the newest ones in time order."""

    k: Array  # [batch, kv_heads, sink + residual, head_dim]
    v: Array  # [batch, kv_heads, sink + residual, head_dim]
    pos: Array | None  # int32 [batch, kv_heads, sink + residual]; None when the pool has none
    count: Array  # int32 [batch, kv_heads] valid entries, at the front


@struct.dataclass
class Layer:
    """Bookkeeping of one layer. Slots 0..fill-1 of a head are occupied, in time order after a compaction."""

    table: Array | None  # int32 [batch, kv_heads, pages per head] page of the pool, -1 = none; None = Dense
    fill: Array  # int32 [batch, kv_heads] occupied slots
    next_slot: Array  # int32 [batch, kv_heads] where the next entry goes: fill, or the slot evicted last
    limit: Array  # int32 [batch, kv_heads] most entries while decoding (policies that evict while decoding)
    const: dict[str, Array]  # calibration arrays of this layer's scorer, and 'selector.*' of its selector
    residual: Residual | None = None  # only with a deferred codec
    index: dict[str, Array] | None = None  # only with a selector: see `kvjax.policies.selectors.base`
    start: Array | None = (
        None  # int32 [batch, kv_heads], offloaded layers only: slot of the first entry of `Pool.store`
    )
    # f32 [batch, kv_heads] each: what the reducer remembers (`kvjax.policies.reducing`)
    state: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Disk:
    """What a cache with pages on disk carries; the files themselves belong to `kvjax.cache.disk`."""

    handle: Array  # int32 [] which open store
    failed: Array  # bool [batch] rows whose pages could not be written or read: they are finished
    pages: Array  # int32 [layers] pages that the last call read from disk


@struct.dataclass
class View:
    """A layer seen as dense arrays, whatever its layout."""

    store: dict[str, Array]  # codec fields [batch, kv_heads, slots / per, ...]
    pos: Array  # int32 [batch, kv_heads, slots]
    slot_state: dict[str, Array]  # [batch, kv_heads, slots, ...]


@struct.dataclass
class Fetched:
    """Blocks for an offloaded layer that are on their way (`kvjax.cache.placing`)."""

    table: Array  # int32 [batch, kv_heads, n], ascending
    source: (
        Array  # int32 [batch, kv_heads, n]: a block of the host part, or -1 - place among those held already
    )
    fields: dict[str, Array]  # [batch, kv_heads, n * block / per, ...], of use where source >= 0
    supplied: dict[str, Array]  # fields of all blocks that the selector computed instead


@struct.dataclass
class Foreseen:
    """What a layer foresaw for the next one in a decode step."""

    q: Array  # [batch, q_heads, 1, head_dim], the next layer's queries if this layer's input were its input too
    fetched: Fetched | None = None


@struct.dataclass
class KVCache:
    """The whole state that prefill and decode thread through `jit`. Donate it.

    `LayerPlan.pool` says which pool holds a layer's entries: its own, or one that all layers share because an
    allocator lets them compete. Indices of `pools` that no layer uses hold None.
    """

    layers: tuple[Layer, ...]
    pools: tuple[Pool | None, ...]
    length: Array  # int32 [batch] true number of tokens seen
    next_position: (
        Array  # int32 [batch] RoPE position of the next token; = length unless keys were re-rotated
    )
    expected: Array  # int32 [batch] length of the whole prompt while it is prefilled in chunks; 0 = unknown
    compressed: Array  # int32 [batch] length when the prompt was last compressed
    pending: tuple[
        Any, ...
    ] = ()  # within one call: layers whose compaction waits (allocators of scope 'model')
    disk: Disk | None = None  # only with pages on disk

    # Within one call only, None between calls:
    token_ids: Any = None  # int32 [batch, tokens] this call's tokens, for scorers that need them
    hidden: Any = None  # [batch, tokens, embed] of the layer before, for selectors that need 'before'
    ahead: Foreseen | None = None  # by the layer before, for policies that look ahead
    shared: Any = None  # scores of the first layer of a group that reuses them
    counts: Any = None  # ({layer: counts int32 [batch, kv_heads]}, first free page), for allocators that know them ahead
    cascade: Any = None  # the layers so far of those that compete: `kvjax.cache.cascade`
    moved: Any = None  # int32 [batch] next position after keys were re-rotated in this call

    def put(self, i: int, layer: Layer, j: int, pool: Any) -> KVCache:
        """The cache with layer i and pool j replaced."""
        layers = (*self.layers[:i], layer, *self.layers[i + 1 :])
        pools = (*self.pools[:j], pool, *self.pools[j + 1 :])
        return self.replace(layers=layers, pools=pools)  # type: ignore[attr-defined]
