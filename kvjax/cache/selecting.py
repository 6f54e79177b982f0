"""From a selector's scores to the slots that a decode step reads; the contract is `kvjax.policies.selectors.base`.

A *block* is what is chosen and read as one: the selector's unit, raised to whole blocks of the codec. The index counts
slots as `Layer` does; tokens that still wait in a deferred codec's window have their future slot already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import arrays
from kvjax.cache import deferred, index_layout, ops, placing, streaming
from kvjax.cache.index_layout import FRAMEWORK, of_heads, put_heads
from kvjax.cache.plan import Plan
from kvjax.cache.state import Fetched, KVCache
from kvjax.codecs.base import Field
from kvjax.policies.observation import Observation
from kvjax.policies.selectors.base import ALWAYS, NEVER, Call, Entries
from kvjax.sharded_kernels import select_top
from kvjax.sharding import constrain
from kvjax.types import Array, AttentionInputs


def active(plan: Plan, i: int) -> bool:
    """True when layer i reads a selection."""
    return plan.layers[i].policy.selector is not None


def _heads(plan: Plan, i: int) -> Callable[[Array], Array]:
    """Arrays [batch, kv_heads or q_heads, ...] of layer i's retrieval heads only."""
    return lambda x: of_heads(x, index_layout.retrieving(plan, i), plan.shape.kv_heads)


def _indexed_entries(plan: Plan, cache: KVCache, i: int, inv_freq: Array | None) -> Entries:
    """`stored_entries` of the heads that the selector chooses for."""
    return jax.tree.map(_heads(plan, i), stored_entries(plan, cache, i, inv_freq))


def stored_entries(plan: Plan, cache: KVCache, i: int, inv_freq: Array | None) -> Entries:
    """Everything layer i holds, decoded; entries of a deferred codec's window have the slots they will get."""
    lp, layer = plan.layers[i], cache.layers[i]
    codec = lp.policy.codec
    if not codec.deferred:
        view = ops.view(plan, cache, i)
        k, v = codec.decode(view.store, plan.shape.dtype, ops.context(plan, i, view.pos, inv_freq))
        valid = view.pos >= 0
        k, v = (jnp.where(valid[..., None], x, 0) for x in (k, v))
        return Entries(k, v, view.pos, jnp.where(valid, jnp.arange(view.pos.shape[2]), -1))
    k, v, pos = deferred.decoded(plan, cache, i, inv_freq)
    place = jnp.arange(pos.shape[2]) - lp.capacity
    waiting = jnp.where(place < codec.sink, -1, layer.fill[..., None] + place - codec.sink)
    slots = jnp.where(place < 0, place + lp.capacity, waiting)
    return Entries(k, v, pos, jnp.where(pos >= 0, slots, -1).astype(jnp.int32))


def new_slots(plan: Plan, cache: KVCache, i: int, positions: Array) -> Array:
    """int32 [batch, kv_heads, tokens]: where tokens at `positions` int32 [batch, tokens] will be stored by an append."""
    layer, codec = cache.layers[i], plan.layers[i].policy.codec
    new = (positions >= 0)[:, None]
    rank = jnp.cumsum(new, axis=-1, dtype=jnp.int32) - 1
    if layer.residual is None:
        start = layer.next_slot if positions.shape[1] == 1 else layer.fill
    else:
        start = layer.fill + layer.residual.count - codec.sink  # below 0: one of the exact first entries
    slots = start[..., None] + rank
    return jnp.where(new & (slots >= 0), slots, -1)


def _call(plan: Plan, cache: KVCache, x: AttentionInputs | Observation, ahead: bool = False) -> Call:
    """What a selector sees of a model's call, or of an observation of one; ahead: with foreseen queries, if there are any.

    All of it is of the heads that it chooses for.
    """
    i, ours = x.layer, _heads(plan, x.layer)
    lse = x.lse if isinstance(x, Observation) else None
    observed = isinstance(x, Observation)
    prefix = "selector."
    const = {n.removeprefix(prefix): a for n, a in cache.layers[i].const.items() if n.startswith(prefix)}
    return Call(
        q=ours(cache.ahead.q if ahead and cache.ahead is not None else x.q),
        q_pos=x.q_pos if observed else x.positions,
        fill=ours(cache.layers[i].fill),
        stored=functools.partial(_indexed_entries, plan, cache, i, x.inv_freq),
        lse=None if lse is None else ours(lse),
        hidden=x.hidden,
        before=cache.hidden,
        token_ids=cache.token_ids,
        inv_freq=x.inv_freq,
        const=const,
        layer=i,
        scale=x.scale,
        softcap=x.softcap,
    )


def _put(plan: Plan, cache: KVCache, i: int, index: dict[str, Array]) -> KVCache:
    specs = plan.index_specs(i)
    index = {n: constrain(a.astype(specs[n].dtype), specs[n].axes) for n, a in index.items()}
    layers = list(cache.layers)
    layers[i] = layers[i].replace(index=index)
    return cache.replace(layers=tuple(layers))


def _own(index: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """(the selector's arrays, the framework's)."""
    ours = {n for n in index if n in FRAMEWORK or n.startswith("held.")}
    return {n: a for n, a in index.items() if n not in ours}, {n: a for n, a in index.items() if n in ours}


def reorder(plan: Plan, cache: KVCache, obs: Observation, index: Array, pos: Array) -> Array:
    """The survivors' index int32 [batch, kv_heads, places] in the order that the selector wants them stored."""
    if not active(plan, obs.layer) or not plan.layers[obs.layer].policy.selector.reorders:
        return index
    kept = Entries(
        ops.take_slots(obs.k, index), ops.take_slots(obs.v, index), ops.take_slots(pos, index, fill=-1), index
    )
    order = plan.layers[obs.layer].policy.selector.order(kept, _call(plan, cache, obs))
    return jnp.take_along_axis(index, order, axis=2)


def build(plan: Plan, cache: KVCache, obs: Observation) -> KVCache:
    """The index of layer `obs.layer` after all its entries were stored anew."""
    i = obs.layer
    if not active(plan, i):
        return cache
    with jax.named_scope("index"):
        empty, ours = _own(arrays.init(plan.index_specs(i)))
        if not index_layout.retrieving(plan, i):
            return _put(plan, cache, i, ours)
        entries = _indexed_entries(plan, cache, i, obs.inv_freq)
        previous = _own(cache.layers[i].index or {})[0]
        made = plan.layers[i].policy.selector.build(empty, entries, _call(plan, cache, obs), previous)
        return _put(plan, cache, i, {**made, **ours})


def append(plan: Plan, before: KVCache, after: KVCache, x: AttentionInputs) -> KVCache:
    """`after` with the index of layer x.layer grown by the tokens of x, which were stored between the two caches."""
    i = x.layer
    if not active(plan, i) or not index_layout.retrieving(plan, i):
        return after
    with jax.named_scope("index"):
        slots = new_slots(plan, before, i, x.positions)
        pos = jnp.broadcast_to(x.positions[:, None], slots.shape)
        own, ours = _own(before.layers[i].index)
        new = jax.tree.map(_heads(plan, i), Entries(x.k, x.v, pos, slots))
        made = plan.layers[i].policy.selector.append(own, new, _call(plan, after, x))
        return _put(plan, after, i, {**made, **ours})


def block_counts(plan: Plan, i: int, stored: Array) -> Array:
    """int32, like `stored` (entries per head): blocks to read, sinks and recent ones included. Exact: tabulated."""
    lp, longest, block = plan.layers[i], plan.longest(i), plan.block(i)
    reads = lp.policy.head_reads
    if reads is not None:
        always = jnp.minimum(stored, lp.policy.selector.sink + lp.policy.selector.recent)
        return -(-jnp.maximum(reads.entries(lp.policy.selector.read, i, stored), always) // block)
    table = np.array([-(-lp.policy.selector.entries(n) // block) for n in range(longest + 1)], np.int32)
    return jnp.asarray(table)[jnp.clip(stored, 0, longest)]


def streamed(plan: Plan, cache: KVCache, i: int) -> Array:
    """int32 [batch, kv_heads]: slots that heads of layer i would read if all of them streamed."""
    fill = cache.layers[i].fill
    return jnp.sum(
        slots_read(streaming.table(plan, i, fill, _stored(cache, i)), fill, plan.block(i)), axis=-1
    )


def choose(plan: Plan, cache: KVCache, x: AttentionInputs) -> tuple[Array, KVCache]:
    """Blocks that this step reads: int32 [batch, kv_heads, n], ascending, -1 at the end."""
    i = x.layer
    layer, heads = cache.layers[i], index_layout.retrieving(plan, i)
    own, ours = _own(layer.index)
    table, every = None, plan.shape.kv_heads
    if heads:
        table, own, ours = _chosen(plan, cache, x, own, ours)
    if len(heads) < every:
        streamed = streaming.table(plan, i, layer.fill, _stored(cache, i))
        table = streamed if table is None else streaming.beside(table, streamed, heads, plan.table_width(i))
    assert table is not None
    if "reads" in ours:
        read = jnp.sum(slots_read(table, layer.fill, plan.block(i)), axis=-1)
        ours["reads"] = read.astype(jnp.int32)
    return table, _put(plan, cache, i, {**own, **ours})


def _chosen(
    plan: Plan, cache: KVCache, x: AttentionInputs, own: dict[str, Array], ours: dict[str, Array]
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """(blocks of the heads that the selector chooses for, both parts of the index)."""
    i, narrow = x.layer, _heads(plan, x.layer)
    selector = plan.layers[i].policy.selector
    call = _call(plan, cache, x, ahead=True)
    total, exact = _stored(cache, i)
    counts = narrow(block_counts(plan, i, total) - exact // plan.block(i))

    def select(own: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        scores, own = selector.score(own, call)
        return _best(plan, i, scores, call.fill, counts), own

    if "chosen" not in ours:
        table, own = select(own)
    else:
        steps = jnp.max(call.q_pos, axis=1) % selector.interval == 0
        due, own = selector.due(own, call) if selector.triggered else (steps, own)
        first = jnp.all(ours["chosen"] < 0, axis=(1, 2))
        due = due | first

        def again(own: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            table, own = select(own)
            return jnp.where(due[:, None, None], table, ours["chosen"]), own

        chosen, own = jax.lax.cond(jnp.any(due), again, lambda own: (ours["chosen"], own), own)
        ours["chosen"] = chosen
        table = _with_newest(plan, i, chosen, call.fill)
    return table, own, ours


def _stored(cache: KVCache, i: int) -> tuple[Array, Array]:
    """int32 [batch, kv_heads]: entries that layer i holds, and those of them outside the slots (always read)."""
    layer = cache.layers[i]
    exact = jnp.zeros_like(layer.fill) if layer.residual is None else layer.residual.count
    return layer.fill + exact, exact


def _forced(plan: Plan, i: int, fill: Array) -> tuple[Array, Array, Array]:
    """(end of the sink blocks, first recent block, end of the valid blocks), int32 [batch, kv_heads]."""
    selector, codec, block = plan.layers[i].policy.selector, plan.layers[i].policy.codec, plan.block(i)
    end = -(-fill // block)
    sink = max(0, selector.sink - codec.sink)
    recent = max(0, selector.recent - codec.residual)
    first = jnp.maximum(fill - recent, 0) // block
    return jnp.minimum(-(-sink // block), end), jnp.where(recent > 0, first, end), end


def _best(plan: Plan, i: int, scores: Array, fill: Array, counts: Array) -> Array:
    """The table of the best blocks, from scores f32 [batch, heads, units]; counts int32 [batch, heads]: how many to read."""
    ratio = plan.block(i) // plan.layers[i].policy.selector.unit
    if ratio > 1:
        scores = jnp.max(scores.reshape(*scores.shape[:2], -1, ratio), axis=-1)
    number = jnp.arange(scores.shape[2], dtype=jnp.int32)
    sinks, recent, end = (a[..., None] for a in _forced(plan, i, fill))
    scores = jnp.where((number < sinks) | (number >= recent), ALWAYS, scores)
    scores = jnp.where(number < end, scores, NEVER)
    count = jnp.maximum(counts, sinks[..., 0] + (end - recent)[..., 0])
    width = min(index_layout.choice_width(plan, i), scores.shape[2])
    return select_top(scores, count.astype(jnp.int32), width=width)


def _with_newest(plan: Plan, i: int, chosen: Array, fill: Array) -> Array:
    """An earlier choice and the blocks of the newest entries, some of which came after it; ascending as the choice is."""
    _, recent, end = (a[..., None] for a in _forced(plan, i, fill))
    late = index_layout.late_width(plan, i)
    kept = (chosen >= 0) & (chosen < recent)
    old = jnp.pad(jnp.where(kept, chosen, -1), ((0, 0), (0, 0), (0, late)), constant_values=-1)
    newest = recent + jnp.arange(old.shape[2]) - jnp.sum(kept, axis=-1, keepdims=True)
    return jnp.where(old >= 0, old, jnp.where(newest < end, newest, -1))


def fetch(plan: Plan, cache: KVCache, x: AttentionInputs, table: Array) -> KVCache:
    """The cache with the blocks of an ascending table on the device, for an offloaded layer."""
    return placing.fetch(plan, cache, x.layer, table, _supplied(plan, cache, x, table))


def _supplied(plan: Plan, cache: KVCache, x: AttentionInputs, table: Array) -> dict[str, Array]:
    """Fields of the table's blocks that the selector computes."""
    selector = plan.layers[x.layer].policy.selector
    if not selector.supplies:
        return {}
    own = _own(cache.layers[x.layer].index)[0]
    slots = slot_numbers(jnp.maximum(table, 0), plan.block(x.layer))
    return selector.supply(own, _call(plan, cache, x), slots)


def foresees(plan: Plan, x: AttentionInputs) -> bool:
    """True when the layer after x's has its blocks chosen and fetched while x's layer computes (`choose_ahead`)."""
    i = x.layer + 1
    if x.ahead is None or x.q.shape[2] > 1 or not plan.policy.looks_ahead or not active(plan, i):
        return False
    return placing.offloaded(plan, i) and not plan.layers[i].policy.codec.deferred


def choose_ahead(plan: Plan, cache: KVCache, x: AttentionInputs) -> tuple[KVCache, Fetched]:
    """`choose` and `fetch` for inputs that the layer before foresaw: (cache, what is on its way).

    cache: as layer x.layer will find it, but for the token's own entry. Nothing here waits for what the layer before makes
    of its input, so that the fetch may run beside it. Selectors always read the newest entry, so the token's own block is
    chosen; once the token is stored, `placing.put` fills it in.
    """
    i, before = x.layer, cache.layers[x.layer].fill
    new = jnp.any(x.positions >= 0, axis=1).astype(before.dtype)[:, None]
    table, cache = choose(plan, _with_fill(cache, i, before + new), x)
    fetched = placing.prefetch(plan, cache, i, table, _supplied(plan, cache, x, table))
    return _with_fill(cache, i, before), fetched


def _with_fill(cache: KVCache, i: int, fill: Array) -> KVCache:
    layers = list(cache.layers)
    layers[i] = layers[i].replace(fill=fill)
    return cache.replace(layers=tuple(layers))


def slots_read(table: Array, fill: Array, block: int) -> Array:
    """int32 [batch, kv_heads, n]: filled slots in each block of a table, 0 where it is -1."""
    return jnp.where(table < 0, 0, jnp.clip(fill[..., None] - table * block, 0, block))


def gather(plan: Plan, cache: KVCache, i: int, table: Array) -> tuple[dict[str, Array], Array | None, Array]:
    """The chosen blocks of layer i side by side: fields [batch, kv_heads, n * block / per, ...], positions int32 [batch,
    kv_heads, n * block] (None: not stored) and lengths int32 [batch, kv_heads]. The table must ascend: then only the last
    block has a gap."""
    lp, layer, block = plan.layers[i], cache.layers[i], plan.block(i)
    pool = cache.pools[lp.pool]
    fields = lp.policy.codec.fields(plan.shape.head_dim, plan.shape.dtype)
    lengths = jnp.sum(slots_read(table, layer.fill, block), axis=-1)
    at = jnp.maximum(table, 0)
    if pool.host is not None:  # `fetch` has put this table's blocks into the index
        store = {n: layer.index[f"held.{n}"] for n in pool.store}
        return store, None if pool.pos is None else ops.take_slots(pool.pos, slot_numbers(at, block)), lengths

    def take(x: Array, field: Field) -> Array:
        inner, part = len(field.before), block // field.per
        lead = 2 if layer.table is None else 1
        axis = lead + inner
        x = x.reshape(*x.shape[:axis], -1, part, *x.shape[axis + 1 :])
        if layer.table is None:
            got = jax.vmap(jax.vmap(lambda a, n: jnp.take(a, n, axis=inner, mode="clip")))(x, at)
        else:
            ratio = x.shape[axis]  # blocks per page
            page = jnp.take_along_axis(layer.table, at // ratio, axis=2)
            got = x[(jnp.maximum(page, 0), *(slice(None),) * inner, at % ratio)]
            got = jnp.moveaxis(got, 2, 2 + inner)
        return got.reshape(*got.shape[: 2 + inner], -1, *got.shape[4 + inner :])

    store = {name: take(x, fields[name]) for name, x in pool.store.items()}
    return store, None if pool.pos is None else take(pool.pos, ops.ONE_EACH), lengths


def slot_numbers(table: Array, block: int) -> Array:
    """int32 [batch, kv_heads, n * block]: the slots of a table's blocks; of unused places, anything."""
    slots = table[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    return slots.reshape(*table.shape[:2], -1)


def estimate(plan: Plan, cache: KVCache, x: AttentionInputs, table: Array) -> tuple[Array, Array] | None:
    """The selector's partial result over what was not chosen; see `Selector.estimate`."""
    selector, index = plan.layers[x.layer].policy.selector, _own(cache.layers[x.layer].index)[0]
    heads, kv_heads = index_layout.retrieving(plan, x.layer), plan.shape.kv_heads
    if not selector.estimates or not heads:
        return None
    ratio = plan.block(x.layer) // selector.unit
    blocks = -(-plan.layers[x.layer].capacity // plan.block(x.layer))
    at = jnp.where(table < 0, blocks, table)
    put = jax.vmap(jax.vmap(lambda n: jnp.zeros((blocks,), bool).at[n].set(True, mode="drop")))
    chosen = jnp.repeat(put(of_heads(at, heads, kv_heads)), ratio, axis=2)
    found = selector.estimate(index, _call(plan, cache, x), chosen)
    if found is None:
        return None
    return put_heads(found[0], heads, kv_heads), put_heads(found[1], heads, kv_heads, -jnp.inf)


def bias(plan: Plan, cache: KVCache, x: AttentionInputs, slots: Array) -> Array:
    """The selector's logit bias f32 [batch, q_heads, n] of slots int32 [batch, kv_heads, n] (-1: unused, 0)."""
    selector, index = plan.layers[x.layer].policy.selector, _own(cache.layers[x.layer].index)[0]
    heads, kv_heads = index_layout.retrieving(plan, x.layer), plan.shape.kv_heads
    if not heads:
        return jnp.zeros((slots.shape[0], x.q.shape[1], slots.shape[2]), jnp.float32)
    found = selector.bias(index, _call(plan, cache, x), of_heads(slots, heads, kv_heads))
    found = put_heads(found, heads, kv_heads)
    used = jnp.repeat(slots >= 0, x.q.shape[1] // slots.shape[1], axis=1)
    return jnp.where(used, found, 0.0)
