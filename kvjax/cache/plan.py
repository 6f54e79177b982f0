"""The static side of a cache: which policy, which layout, how many slots per layer.

A `Plan` is hashable and is passed to `jit` as a static argument; it decides every shape. The arrays are in
`kvjax.cache.state.KVCache`, whose specs derive from the plan.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from kvjax.arrays import ArraySpec, nbytes
from kvjax.cache import disk, index_layout
from kvjax.cache.index_layout import LEAD
from kvjax.cache.state import Disk, KVCache, Layer, Pool, Residual
from kvjax.codecs.base import Plain
from kvjax.codecs.widened import widen
from kvjax.policies.base import Policy, specs_of_slot_state
from kvjax.policies.placement import PAGE
from kvjax.policies.reducing import LOG_COUNT
from kvjax.policies.scorers.recency import Recency
from kvjax.types import ModelShape


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Shapes of one layer.

    `capacity` is slots per head (Dense) or the width of the page table in slots (Ragged); of a deferred codec it
    counts encoded slots only, the rest is in the residual window.
    """

    policy: Policy
    capacity: int
    keep_capacity: int  # the most entries that one head keeps when the prompt is compressed
    ragged: bool = False
    pages: int = 0  # Ragged: pages that this layer adds to its pool
    pool: int = 0  # index of the pool that holds the layer's entries
    shares_pool: bool = False  # layers of this kind are compacted together, after the last
    offloaded: bool = False  # the prompt's entries live in host memory or on disk: `kvjax.cache.placing`

    @property
    def implied(self) -> bool:
        """True when no positions are stored: the slots of a deferred codec without eviction are in order."""
        return self.policy.codec.deferred and not self.policy.compresses

    @property
    def on_disk(self) -> bool:
        """True when the prompt's complete pages live in files."""
        return self.offloaded and bool(self.policy.placement.disk)

    @property
    def fixed_limit(self) -> bool:
        """True when the layer keeps a fixed number of entries while decoding, whatever the prompt."""
        return self.policy.compresses and self.policy.evict_decode and isinstance(self.policy.budget, int)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static description of a cache.

    prompt: most prompt tokens of a row. reserve: tokens that may be appended after the prompt. page_size: slots per page
    of the Ragged layout. pages: of the pool of each layer, for a cache that was fitted after its prompt
    (`kvjax.cache.shrink`); a layer with 0 uses the pool before it. Rows shorter than `prompt` are fine. platform: "cpu",
    "gpu" or "tpu", for codecs that store another dtype on one of them (`Codec.for_platform`); "" settles for none.
    devices: of the mesh that the pages of a Ragged pool are spread over; their number is a multiple of it.
    """

    policy: Policy
    shape: ModelShape
    batch: int
    prompt: int
    reserve: int
    page_size: int = 16
    pages: tuple[int, ...] = ()
    platform: str = ""
    devices: int = 1

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.reserve < 0 or self.batch < 1:
            raise ValueError(
                "a cache needs batch >= 1, prompt >= 1 and reserve >= 0, got "
                f"{self.batch}, {self.prompt}, {self.reserve}"
            )
        codec = self.policy.codec
        if codec.deferred and self.policy.compresses and self.policy.evict_decode:
            raise ValueError(
                f"{self.policy.name}: entries that were encoded in groups of {codec.group} behind a window of "
                f"{codec.residual} cannot be evicted one by one while decoding; use a codec of single tokens "
                "without a window (int8, fp8, int4 with residual=0), or a method that evicts once, after the prompt"
            )
        sliding = any(w is not None and w < self.prompt + self.reserve for w in self.shape.windows)
        if self.policy.rerotate and self.policy.compresses and sliding:
            raise ValueError(
                f"{self.policy.name}: rerotate needs full attention in every layer; this model has sliding windows"
            )
        if self.policy.compresses and codec.for_layer(1, self.shape).predicts:
            raise ValueError(
                f"{self.policy.name}: a codec that predicts a layer from the one before needs the same tokens in both; "
                "it does not compose with methods that evict"
            )
        codec.check(self.shape)
        if self.policy.scorer is not None:
            self.policy.scorer.constants(0, self.shape)  # refuses another model's calibration file
        if self.policy.prefill is not None:
            self.policy.prefill.check(self.shape)
        if self.policy.placement is not None:
            self.policy.placement.check(self.policy, self.shape)
        if self.policy.selector is not None:
            self.policy.selector.check(self.shape)
            if self.policy.head_reads is not None:
                self.policy.head_reads.check(self.shape, self.policy.selector, self.policy.name)
            if self.policy.selector.reorders and codec.deferred:
                raise ValueError(
                    f"{self.policy.name}: {type(self.policy.selector).__name__} moves entries to other slots, which a "
                    "codec that encodes groups behind a window cannot follow; use int8, fp8 or the model's dtype"
                )
        if self.policy.compresses:
            self.policy.allocator.check(self.shape)
            self._check_parts()

    def _check_parts(self) -> None:
        """ValueError for parts that exclude each other."""
        policy, codec = self.policy, self.policy.codec
        state, reducer = policy.scorer.slot_state(), policy.reducer
        counted = LOG_COUNT in state
        if counted and (codec.deferred or codec.rotates or (policy.evict_decode and not reducer.weighs)):
            raise ValueError(
                f"{policy.name}: a token that stands for many needs a codec of single tokens (the model's dtype, int8, "
                "fp8)" + ("" if reducer.weighs else " and no eviction while decoding")
            )
        if not set(reducer.slot_state()) <= set(state) or (reducer.weighs and policy.prefill is not None):
            what = "another scorer" if policy.prefill is None else "a prefill pattern"
            raise ValueError(
                f"{policy.name}: {type(reducer).__name__} weighs slots, which {what} does not know of"
            )
        if counted and policy.selector is not None:
            raise ValueError(f"{policy.name}: a token that stands for many does not compose with a selector")
        alloc = policy.allocator
        apart = policy.spare > 1 or reducer.resamples
        if policy.evict_decode and apart and alloc.ragged and alloc.scope == "model":
            raise ValueError(
                f"{policy.name}: layers that share one pool of pages cannot be compacted one by one while decoding; "
                "use interval=1 without rerotate"
            )

    @functools.cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Plans of all layers. Layers that compete for entries (allocator scope 'model') share one pool."""
        out, shared = [], None
        for i in range(self.shape.layers):
            lp = self._layer(i)
            pool = i
            together = lp.ragged and lp.policy.allocator.scope == "model"
            if lp.ragged and self.pages:
                together = together or sum(n > 0 for n in self.pages) == 1
                pool = shared = i if self.pages[i] else shared
            elif together:
                pool = shared = i if shared is None else shared
            skipped = self.policy.selector is not None and lp.policy.selector is None
            offloaded = lp.policy.placement is not None and not skipped
            out.append(dataclasses.replace(lp, pool=pool, shares_pool=together, offloaded=offloaded))
        return self._one_layout(out)

    def _one_layout(self, layers: list[LayerPlan]) -> tuple[LayerPlan, ...]:
        """Layers that share a pool store fields of one shape, even where a codec chooses its precision by layer."""
        shared = [lp.policy.codec for lp in layers if lp.shares_pool]
        if not shared:
            return tuple(layers)
        wide = iter(widen(shared, self.shape.head_dim, self.shape.dtype, self.policy.name))

        def swap(lp: LayerPlan) -> LayerPlan:
            return dataclasses.replace(lp, policy=dataclasses.replace(lp.policy, codec=next(wide)))

        return tuple(swap(lp) if lp.shares_pool else lp for lp in layers)

    def _layer(self, i: int) -> LayerPlan:
        policy, total = self.policy, self.prompt + self.reserve
        window = self.shape.windows[i]
        if window is not None and window < total:
            # A sliding layer never needs more than its window: keep the newest, at no loss. The new token makes
            # `window` visible entries, so window - 1 stay behind.
            keep = max(window - 1, 1)
            # It evicts one entry a step, which a deferred codec cannot: such a layer keeps the model's dtype.
            codec = Plain() if policy.codec.deferred else policy.codec
            policy = Policy(policy.name, Recency(), codec=codec, budget=keep, evict_decode=True)
        codec = policy.codec.for_platform(self.platform).for_layer(i, self.shape)
        selector = policy.selector
        if selector is not None and i < selector.skip_layers:
            selector = None
        policy = dataclasses.replace(policy, codec=codec, selector=selector)
        if not policy.compresses:
            return LayerPlan(policy, self._slots(policy, total), self.prompt)
        alloc, mean = policy.allocator, policy.keep(self.prompt)
        if isinstance(policy.budget, int) and policy.evict_decode:
            mean = min(policy.budget, total)
        keep = int(alloc.layer_keep(i, self.shape.layers, mean, self.prompt))
        grow = policy.spare if policy.evict_decode else self.reserve
        if not alloc.ragged:
            return LayerPlan(policy, self._slots(policy, min(keep + grow, total)), min(keep, total))
        heads, page = self.shape.kv_heads, self.page(policy)
        head = min(int(alloc.head_capacity(keep, self.prompt, heads)), total)
        if isinstance(policy.budget, int) and policy.evict_decode:
            head = max(head, mean)  # a row shorter than the budget grows up to it
        capacity = self._slots(policy, min(head + grow, total))
        entries = int(alloc.total_capacity(keep, self.prompt, heads))
        # Every head owns whole pages: at most one page is partly filled by the prompt, then the reserve follows.
        pages = self.batch * (entries // page + heads * (1 + -(-(grow + codec.group - 1) // page)))
        pages = min(pages, self.batch * heads * -(-capacity // page))
        return LayerPlan(policy, capacity, head, True, pages)

    def _slots(self, policy: Policy, entries: int) -> int:
        """Slots that `entries` entries a head need: whole blocks of the codec and of the selector, without what stays
        unencoded. Also whole tiles of 8 slots: the copy engines of GPU and TPU address no less.
        """
        codec, block = policy.codec, math.lcm(_block(policy), 8)
        return max(1, -(-(codec.encoded(entries) if codec.deferred else entries) // block)) * block

    def page(self, policy: Policy) -> int:
        """Slots per page of the Ragged layout: `page_size`, raised to whole blocks of the codec and the selector, and to
        what the platform's kernels read (`Codec.page_slots`)."""
        return math.lcm(self.page_size, _block(policy), policy.codec.page_slots(self.platform))

    def block(self, i: int) -> int:
        """Slots that a selector of layer i chooses and reads as one."""
        return _block(self.layers[i].policy)

    def longest(self, i: int) -> int:
        """Most entries that a head of layer i holds, unencoded ones included."""
        lp = self.layers[i]
        return lp.capacity + lp.policy.codec.residual + lp.policy.codec.sink

    def table_width(self, i: int) -> int:
        """Most blocks that a step of layer i reads."""
        return index_layout.table_width(self, i)

    def tail_recent(self, i: int) -> int:
        """Newest entries of an offloaded layer's prompt that stay on the device, beside a codec's window."""
        policy = self.layers[i].policy
        always = 0 if policy.selector is None else max(0, policy.selector.recent - policy.codec.residual)
        return always + policy.placement.recent

    def tail_slots(self, i: int) -> int:
        """Slots of an offloaded layer that stay on the device: the newest, and room for new tokens."""
        lp, block = self.layers[i], self.block(i)
        most = self.tail_recent(i) + self.span(i) - 1 + self.reserve + lp.policy.codec.group
        return min(-(-most // block) * block, lp.capacity)

    def span(self, i: int) -> int:
        """Slots that leave the device together: a block, or a page on disk."""
        block = self.block(i)
        return block * max(1, PAGE // block) if self.layers[i].on_disk else block

    def host_slots(self, i: int) -> int:
        """Slots of an offloaded layer's prompt in host memory, a multiple of the block; on disk, of complete pages."""
        lp, span = self.layers[i], self.span(i)
        most = lp.keep_capacity + (0 if lp.on_disk else span - 1)
        return min(most // span, lp.capacity // span) * span

    def index_specs(self, i: int) -> dict[str, ArraySpec]:
        """The index of layer i, {} where no head of it is chosen for."""
        return index_layout.specs(self, i)

    @functools.cached_property
    def pool_specs(self) -> tuple[Pool | None, ...]:
        """Specs of every pool; None where a layer uses another layer's pool."""
        pages: dict[int, int] = {}
        for lp in self.layers:
            pages[lp.pool] = pages.get(lp.pool, 0) + lp.pages
        if self.pages:
            pages = {i: self.pages[i] for i in pages}
        pages = {i: -(-n // self.devices) * self.devices for i, n in pages.items()}
        return tuple(
            self._pool_specs(self.layers[i], pages[i]) if i in pages else None
            for i in range(self.shape.layers)
        )

    def specs(self) -> KVCache:
        """The cache as a pytree of `ArraySpec`."""
        row = ArraySpec((self.batch,), "int32", ("batch",))
        layers = tuple(self._layer_specs(i, lp) for i, lp in enumerate(self.layers))
        rows = {n: row for n in ("length", "next_position", "expected", "compressed")}
        pools = list(self.pool_specs)
        for i, lp in enumerate(self.layers):
            if lp.offloaded:
                pools[lp.pool] = self._split_specs(i, lp)
        failed = dataclasses.replace(row, dtype="bool")
        files = Disk(ArraySpec((), "int32", ()), failed, ArraySpec((len(layers),), "int32", (None,)))
        return KVCache(layers=layers, pools=tuple(pools), disk=files if self.on_disk else None, **rows)

    @property
    def on_disk(self) -> bool:
        """True when any layer's pages live in files."""
        return any(lp.on_disk for lp in self.layers)

    def _split_specs(self, i: int, lp: LayerPlan) -> Pool:
        """Specs of an offloaded layer's pool; `pool_specs` describes it before it is split."""
        pool, codec = self.pool_specs[lp.pool], lp.policy.codec
        assert pool is not None
        sizes = ((*LEAD, "slots"), self.shape.head_dim, self.shape.dtype)
        lead = (self.batch, self.shape.kv_heads)
        tail = codec.specs(lead, sizes[0], self.tail_slots(i), *sizes[1:])
        host = codec.specs(lead, sizes[0], self.host_slots(i), *sizes[1:])
        host = {} if lp.on_disk else {n: dataclasses.replace(s, memory="host") for n, s in host.items()}
        return pool.replace(store=tail, host=host)  # type: ignore[attr-defined]

    def _pool_specs(self, lp: LayerPlan, pages: int) -> Pool:
        lead: tuple[int, ...] = (self.batch, self.shape.kv_heads)
        axes: tuple[str, ...] = (*LEAD, "slots")
        slots = lp.capacity
        if lp.ragged:
            lead, axes, slots = (pages,), ("pages", "page_slots"), self.page(lp.policy)
        # A deferred codec's entries are never scored again, so that no state follows them.
        scorer = lp.policy.scorer if lp.policy.compresses and not lp.policy.codec.deferred else None
        return Pool(
            store=lp.policy.codec.specs(lead, axes, slots, self.shape.head_dim, self.shape.dtype),
            pos=None if lp.implied else ArraySpec((*lead, slots), "int32", axes, fill=-1),
            slot_state=specs_of_slot_state(scorer, (*lead, slots), axes),
        )

    def _layer_specs(self, i: int, lp: LayerPlan) -> Layer:
        b, h = self.batch, self.shape.kv_heads
        head = ArraySpec((b, h), "int32", LEAD)
        table = None
        if lp.ragged:
            width = -(-lp.capacity // self.page(lp.policy))
            table = ArraySpec((b, h, width), "int32", (*LEAD, None), fill=-1)
        const = {}
        if lp.policy.scorer is not None and lp.policy.compresses:
            for name, value in lp.policy.scorer.constants(i, self.shape).items():
                value = np.asarray(value)
                const[name] = ArraySpec(value.shape, value.dtype.name, (None,) * value.ndim)
        remembered = lp.policy.reducer.state() if lp.policy.compresses else {}
        state = {n: ArraySpec((b, h), "float32", LEAD, fill=x) for n, x in remembered.items()}
        index = None
        if lp.policy.selector is not None:
            index = self.index_specs(i)
            for name, value in index_layout.constants(self, i).items():
                const[f"selector.{name}"] = ArraySpec(value.shape, value.dtype.name, (None,) * value.ndim)
        return Layer(
            table=table,
            fill=head,
            next_slot=head,
            limit=head,
            const=const,
            residual=self._residual_specs(lp),
            index=index,
            start=head if lp.offloaded else None,
            state=state,
        )

    def _residual_specs(self, lp: LayerPlan) -> Residual | None:
        codec, lead = lp.policy.codec, (self.batch, self.shape.kv_heads)
        if not codec.deferred:
            return None
        width = codec.sink + codec.residual
        axes = (*LEAD, None)  # small: never split over a sequence axis
        kv = ArraySpec((*lead, width, self.shape.head_dim), self.shape.dtype, (*axes, "head_dim"))
        pos = None if lp.implied else ArraySpec((*lead, width), "int32", axes, fill=-1)
        return Residual(k=kv, v=kv, pos=pos, count=ArraySpec(lead, "int32", LEAD))

    def nbytes(self) -> int:
        """Bytes of the cache as allocated, in all memories and on disk."""
        return self.device_nbytes() + self.host_nbytes() + self.disk_nbytes()

    def device_nbytes(self) -> int:
        """Bytes of it in device memory."""
        return nbytes(self.specs(), "device")

    def host_nbytes(self) -> int:
        """Bytes of it in host memory; of pages on disk, the most that are held there."""
        held = min(self.policy.placement.memory, self.disk_nbytes()) if self.on_disk else 0
        return nbytes(self.specs(), "host") + held

    def disk_nbytes(self) -> int:
        """Bytes of all files, checksums included."""
        return self.batch * sum(section.nbytes for section in disk.sections(self).values())

    def prompt_only(self) -> Plan:
        """The same plan without room for generated tokens: what the compressed prompt itself costs."""
        return dataclasses.replace(self, reserve=0)


def _block(policy: Policy) -> int:
    """Slots of the smallest part of a layer that is encoded, chosen and read as one."""
    return math.lcm(policy.codec.block, 1 if policy.selector is None else policy.selector.unit)
