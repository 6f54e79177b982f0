"""From attention to storage: score, allocate, select, reduce and store the candidates of a layer.

`store` handles one layer of a prefill or extend call, `evict_step` one layer of a decode step, and `finish` closes a
call: it compacts the layers that had to wait for each other and counts the tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.cache import cascade, deferred, ops, paging, selecting
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, Pool, View
from kvjax.policies.allocators import shares
from kvjax.policies.base import Policy, Tokens
from kvjax.policies.observation import NEG, Observation
from kvjax.policies.reducing import Survivors
from kvjax.types import Array


def _rebuild(
    plan: Plan,
    cache: KVCache,
    obs: Observation,
    entries: View,
    index: Array,
    limit: Array,
    pool: Pool | None = None,
    first_page: Array | int = 0,
) -> tuple[KVCache, Array | int]:
    i = obs.layer
    index = selecting.reorder(plan, cache, obs, index, entries.pos)
    if not plan.layers[i].policy.codec.deferred:
        cache, page = ops.rebuild(plan, cache, i, entries, index, limit, pool, first_page)
    else:
        cache, page = deferred.rebuild(plan, cache, i, entries, index, limit, pool, first_page, obs.inv_freq)
    return selecting.build(plan, cache, obs), page


@struct.dataclass
class Pending:
    """A scored layer before compaction."""

    entries: View
    scores: Array  # f32 [batch, kv_heads, slots], protected
    obs: Observation
    stats: Any = None  # what the allocator measured
    counts: Array | None = None  # int32 [batch, kv_heads] when they are known already
    limit: Array | None = None  # int32 [batch, kv_heads], with `counts`


def store(
    plan: Plan, cache: KVCache, obs: Observation, entries: View, *, compress: bool, fresh: bool
) -> KVCache:
    """Score, allocate, select, reduce and store the candidates of one layer."""
    i = obs.layer
    lp, policy, limit = plan.layers[i], plan.layers[i].policy, cache.layers[i].limit
    if not policy.compresses or (fresh and not compress and not lp.fixed_limit):
        places = entries.pos.shape[2] if policy.codec.deferred else min(lp.capacity, entries.pos.shape[2])
        index = ops.all_entries(entries.pos >= 0, places)
        if lp.shares_pool:
            held = jnp.sum(entries.pos >= 0, axis=-1, dtype=jnp.int32)
            scores = jnp.where(entries.pos >= 0, entries.pos, NEG).astype(jnp.float32)
            return _wait(cache, Pending(entries, scores, obs, counts=held, limit=limit))
        return _rebuild(plan, cache, obs, entries, index, limit)[0]
    assert policy.scorer is not None
    length = jnp.maximum(tokens_seen(cache, obs), cache.expected)
    obs = obs.replace(keep=layer_keep(plan, i, length) if compress else limit.max(1))
    with jax.named_scope("score"):
        state = {n: x for n, x in entries.slot_state.items() if n != "saliency"}
        scores, state = policy.scorer.score(obs, state)
        if "saliency" in entries.slot_state:
            state = {**state, "saliency": entries.slot_state["saliency"]}
    entries = entries.replace(slot_state=state)
    return keep_best(plan, cache, obs, entries, scores, compress=compress, fresh=fresh)


def tokens_seen(cache: KVCache, obs: Observation) -> Array:
    """True number of tokens seen, this call included; int32 [batch]."""
    return obs.length + cache.length - cache.next_position


def keep_best(
    plan: Plan, cache: KVCache, obs: Observation, entries: View, scores: Array, *, compress: bool, fresh: bool
) -> KVCache:
    """Protect, allocate, select, reduce and store the scored candidates of layer `obs.layer`.

    Layers that share a pool wait for `finish`.
    """
    i = obs.layer
    lp, policy, limit = plan.layers[i], plan.layers[i].policy, cache.layers[i].limit
    scores = policy.protect(scores, entries.pos, obs.length)
    cache, scores = _share(policy, cache, i, scores)
    length = tokens_seen(cache, obs)
    if compress:
        cache = cache.replace(compressed=length)
    if compress and lp.shares_pool and fresh and policy.allocator.ahead:
        return _compact_now(plan, cache, Pending(entries, scores, obs))
    if compress and cascade.applies(plan, i):
        return _cascade(plan, cache, obs, entries, scores, fresh=fresh)
    if compress and lp.shares_pool:
        with jax.named_scope("allocate"):
            stats = policy.allocator.measure(obs, scores)
        return _wait(cache, _shortlist(plan, Pending(entries, scores, obs, stats)))
    with jax.named_scope("allocate"):
        if compress:
            counts = _counts(plan, obs, scores, entries.pos >= 0, jnp.maximum(length, cache.expected))
            limit = _limit(plan, i, counts, length)
        else:
            # Heads of different sizes keep theirs: a common size would overflow the pool.
            if lp.fixed_limit and policy.room is None and (fresh or not lp.ragged):
                limit = jnp.full_like(limit, policy.budget if lp.ragged else lp.keep_capacity)
            counts = limit
    pending = Pending(entries, scores, obs, counts=counts, limit=limit)
    if lp.shares_pool:
        return _wait(cache, pending)
    return _compact(plan, cache, pending, counts, limit)[0]


def _compact_now(plan: Plan, cache: KVCache, pending: Pending) -> KVCache:
    """Compact a layer of a shared pool at once: its counts are known ahead, and its pages follow the last layer's."""
    obs, valid = pending.obs, pending.entries.pos >= 0
    policy, sharing = plan.layers[obs.layer].policy, [i for i, lp in enumerate(plan.layers) if lp.shares_pool]
    if cache.counts is None:
        with jax.named_scope("allocate"):
            # In a fresh prompt all layers hold the same positions, and scores tell only what is protected.
            total, n = jnp.maximum(tokens_seen(cache, obs), cache.expected), len(sharing)
            keep = policy.keep_counts(total, plan.prompt)
            stats = [policy.allocator.measure(obs.replace(layer=i), pending.scores) for i in sharing]
            counts = policy.allocator.model_counts([pending.scores] * n, [valid] * n, keep, total, stats)
        cache = cache.replace(counts=(dict(zip(sharing, counts)), 0))
    found, page = cache.counts
    count = _unless_idle(obs, found[obs.layer], valid)
    limit = _limit(plan, obs.layer, count, obs.length)
    pool = None if obs.layer == sharing[0] else cache.pools[plan.layers[obs.layer].pool]
    cache, page = _compact(plan, cache, pending, count, limit, pool, page)
    return cache.replace(counts=(found, page))


def _cascade(
    plan: Plan, cache: KVCache, obs: Observation, entries: View, scores: Array, *, fresh: bool
) -> KVCache:
    """Store a layer of a shared pool at once; the layers before it give up what the budget no longer leaves them."""
    policy, i = plan.layers[obs.layer].policy, obs.layer
    now = cascade.start(plan, i, fresh=fresh) if cache.cascade is None else cache.cascade
    with jax.named_scope("allocate"):
        keep = policy.keep_counts(jnp.maximum(tokens_seen(cache, obs), cache.expected), plan.prompt)
        stats = (*now.stats, policy.allocator.measure(obs, scores))
        fixed, had = (
            (*now.fixed, shares.count(shares.protected(scores))),
            (*now.had, shares.count(entries.pos >= 0)),
        )
        layers = len(cascade.sharing(plan))
        counts = jnp.stack(policy.allocator.cascade_counts(fixed, had, keep, layers, stats))
        # A row without tokens in this call has nothing to measure by: it keeps what it holds.
        counts = jnp.where((obs.tokens > 0)[:, None], counts, jnp.stack(had))
        if now.counts is not None:
            counts = counts.at[:-1].min(now.counts)
        limits = _limit(plan, i, counts, obs.length)
    now = now.replace(stats=stats, fixed=fixed, had=had, counts=counts, limits=limits)
    with jax.named_scope("compact"):
        return cascade.add(plan, cache, i, entries, scores, now)


def _share(policy: Policy, cache: KVCache, i: int, scores: Array) -> tuple[KVCache, Array]:
    """Scores of the first layer of a group instead of its own, where the selection reuses them."""
    group = policy.selection.reuse
    if group == 1:
        return cache, scores
    if i % group == 0 or cache.shared is None:
        return cache.replace(shared=scores), scores
    if cache.shared.shape != scores.shape:
        raise ValueError(f"{policy.name}: layers that share a choice need equal numbers of entries")
    return cache, jnp.where(scores > -jnp.inf, cache.shared, scores)


def layer_keep(plan: Plan, i: int, length: Array) -> Array:
    """int32 [batch]: mean entries per head of layer i for prompts of `length` tokens."""
    policy = plan.layers[i].policy
    keep = policy.keep_counts(length, plan.prompt)
    return policy.allocator.layer_keep(i, plan.shape.layers, keep, length)


def _wait(cache: KVCache, pending: Pending) -> KVCache:
    return cache.replace(pending=(*cache.pending, pending))


def _shortlist(plan: Plan, pending: Pending) -> Pending:
    """Only the candidates that the layer could keep at most, so that waiting layers hold no more than those."""
    lp, slots = plan.layers[pending.obs.layer], pending.scores.shape[2]
    policy = lp.policy
    changed = policy.reducer.merges or policy.rerotate  # then the original keys are needed
    plain = type(policy.selection) is Tokens and not changed and policy.codec.group == 1
    if not plain or lp.keep_capacity >= slots:
        return pending
    entries = pending.entries
    full = jnp.full(pending.scores.shape[:2], lp.keep_capacity)
    index = policy.selection.select(pending.scores, entries.pos >= 0, full, lp.keep_capacity)
    return pending.replace(
        entries=View(
            store={n: ops.take_slots(x, index) for n, x in entries.store.items()},
            pos=ops.take_slots(entries.pos, index, fill=-1),
            slot_state={n: ops.take_slots(x, index) for n, x in entries.slot_state.items()},
        ),
        scores=ops.take_slots(pending.scores, index, fill=-jnp.inf),
    )


def _counts(plan: Plan, obs: Observation, scores: Array, valid: Array, length: Array) -> Array:
    i, layers, policy = obs.layer, plan.shape.layers, plan.layers[obs.layer].policy
    keep = obs.need("keep")
    stats = policy.allocator.measure(obs, scores)
    counts = policy.allocator.layer_counts(scores, valid, keep, i, layers, length, stats)
    return _unless_idle(obs, counts, valid)


def _unless_idle(obs: Observation, counts: Array, valid: Array) -> Array:
    """A row without tokens in this call has nothing to measure by: it keeps what it holds."""
    held = jnp.sum(valid, axis=-1, dtype=jnp.int32)
    return jnp.where((obs.tokens > 0)[:, None], counts, held)


def _limit(plan: Plan, i: int, counts: Array, length: Array) -> Array:
    """Most entries per head while decoding: what the prompt kept, or the whole budget if the prompt was short."""
    lp = plan.layers[i]
    room = 0 if lp.policy.room is None else lp.policy.room.slots
    if not lp.fixed_limit or room:
        return counts + room
    if not lp.ragged:
        return jnp.full_like(counts, lp.keep_capacity)
    budget = jnp.asarray(lp.policy.budget, jnp.int32)
    return jnp.where((length >= budget)[:, None], counts, budget)


def _compact(
    plan: Plan,
    cache: KVCache,
    pending: Pending,
    counts: Array,
    limit: Array,
    pool: Pool | None = None,
    first_page: Array | int = 0,
) -> tuple[KVCache, Array | int]:
    """Keep the best `counts` entries of every head of one layer."""
    entries, scores, obs = pending.entries, pending.scores, pending.obs
    lp, policy = plan.layers[obs.layer], plan.layers[obs.layer].policy
    with jax.named_scope("compact"):
        slots = entries.pos.shape[2]
        places = lp.keep_capacity + (0 if policy.room is None else policy.room.slots)
        counts = jnp.minimum(counts, jnp.sum(entries.pos >= 0, axis=-1, dtype=jnp.int32))
        index = policy.selection.select(scores, entries.pos >= 0, counts, min(places, slots))
        if policy.reducer.merges or policy.rerotate:
            if policy.reducer.merges:
                made = policy.reducer.survivors(obs, index, scores, entries.slot_state)
                cache = _with_state(plan, cache, obs.layer, made.state)
            else:
                made = Survivors(ops.take_slots(obs.k, index), ops.take_slots(obs.v, index))
            k, v, pos, state, codec = made.k, made.v, made.pos, made.slot_state, policy.codec
            if state is None:
                state = {n: ops.take_slots(s, index) for n, s in entries.slot_state.items()}
            if pos is None:
                pos = ops.take_slots(entries.pos, index, fill=-1)
            if policy.rerotate:
                rank = jnp.where(pos >= 0, jnp.arange(pos.shape[2], dtype=jnp.int32), -1)
                k, pos = obs.rotate(k, rank - pos), rank
                cache = cache.replace(moved=jnp.max(rank, axis=(1, 2)) + 1)
            entries = View(
                store={"k": k.astype(plan.shape.dtype), "v": v.astype(plan.shape.dtype)}
                if codec.deferred
                else codec.encode(k, v, ops.context(plan, obs.layer, pos, obs.inv_freq)),
                pos=pos,
                slot_state=state,
            )
            index = jnp.where(pos >= 0, jnp.arange(index.shape[2]), index.shape[2])
        return _rebuild(plan, cache, obs, entries, index, limit, pool, first_page)


def evict_step(plan: Plan, cache: KVCache, obs: Observation, entries: View) -> KVCache:
    """Bring layer `obs.layer` back to its limit: one entry per step, or a compaction every `interval` steps.

    Where what is kept is an outcome, a compaction leaves what passes, and is due every `interval` steps however many those are.
    """
    i = obs.layer
    policy, limit = plan.layers[i].policy, cache.layers[i].limit
    if policy.room is not None:
        limit = limit - policy.room.missing(obs.need("steps"))[:, None]
    scorer = policy.scorer
    assert scorer is not None

    def scored() -> tuple[Array, dict[str, Array]]:
        scores, state = scorer.score(obs, entries.slot_state)
        return policy.protect(scores, entries.pos, obs.length), state

    if policy.interval == 1 and not policy.rerotate and not policy.reducer.resamples:
        scores, state = scored()
        victim = ops.lowest(entries.pos, scores, limit)
        cache = ops.write_slot_state(plan, cache, i, state)
        if policy.reducer.absorbs:
            cache = _absorb(plan, cache, obs, victim)
        return ops.free(plan, cache, i, victim)
    fill = jnp.sum(entries.pos >= 0, axis=-1, dtype=jnp.int32)
    due = jnp.any(fill >= limit + policy.interval, axis=1)
    if policy.allocator.outcome:
        due |= (obs.need("steps") % policy.interval == 0) & jnp.any(
            obs.q_pos >= 0, axis=1
        )  # not for finished rows
    moved = jnp.where(due, jnp.max(limit, axis=1), obs.length)
    # Scores with state are due every step; others only when something leaves.
    scores, state = scored() if entries.slot_state else (None, {})

    def compact(cache: KVCache) -> KVCache:
        ranked = scored()[0] if scores is None else scores
        counts = policy.allocator.decode_counts(ranked, entries.pos >= 0, limit)
        counts = jnp.where(due[:, None], counts, fill)
        pending = Pending(entries.replace(slot_state=state), ranked, obs)
        done = _compact(plan, cache, pending, counts, cache.layers[i].limit)[0]
        return done.replace(moved=cache.moved)

    def leave(cache: KVCache) -> KVCache:
        return ops.write_slot_state(plan, cache, i, state)

    cache = jax.lax.cond(jnp.any(due), compact, leave, cache)
    return cache.replace(moved=moved) if policy.rerotate else cache


def _with_state(plan: Plan, cache: KVCache, i: int, state: dict[str, Array]) -> KVCache:
    """The cache with what layer i's reducer remembers replaced in part."""
    layer, j = cache.layers[i], plan.layers[i].pool
    return cache.put(i, layer.replace(state={**layer.state, **state}), j, cache.pools[j])


def _absorb(plan: Plan, cache: KVCache, obs: Observation, victim: Array) -> KVCache:
    """What the evicted slot int32 [batch, kv_heads] leaves behind in others."""
    i = obs.layer
    with jax.named_scope("merge"):
        new = plan.layers[i].policy.reducer.absorb(obs, victim)
        ctx = ops.context(plan, i, ops.take_slots(obs.pos, new.slots, fill=-1), obs.inv_freq)
        return _with_state(plan, ops.overwrite(plan, cache, i, new.slots, new.k, new.v, ctx), i, new.state)


def finish(plan: Plan, cache: KVCache, positions: Array) -> KVCache:
    """After all layers: compact the layers that had to wait for each other, and count the tokens.

    positions int32 [batch, tokens], -1 = padding.
    """
    new = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    if cache.cascade is not None:
        with jax.named_scope("compact"):
            cache = cascade.close(plan, cache)
    if cache.pending:
        pending = cache.pending
        policy, length = plan.layers[pending[0].obs.layer].policy, pending[0].obs.length
        keep = policy.keep_counts(jnp.maximum(length, cache.expected), plan.prompt)
        valid = [p.entries.pos >= 0 for p in pending]
        counts = [p.counts for p in pending]
        limits = [p.limit for p in pending]
        if pending[0].counts is None:
            with jax.named_scope("allocate"):
                total, stats = jnp.maximum(length, cache.expected), [p.stats for p in pending]
                counts = policy.allocator.model_counts([p.scores for p in pending], valid, keep, total, stats)
            counts = [_unless_idle(p.obs, c, v) for p, c, v in zip(pending, counts, valid)]
            limits = [_limit(plan, p.obs.layer, c, length) for p, c in zip(pending, counts)]
        page: Array | int = 0
        cache, pool = cache.replace(pending=()), None
        for p, count, limit in zip(pending, counts, limits):
            i = p.obs.layer
            cache, page = _compact(plan, cache, p, count, limit, pool, page)
            pool = cache.pools[plan.layers[i].pool]
    cache = paging.settle(plan, cache)
    following = cache.next_position + new if cache.moved is None else cache.moved
    return cache.replace(
        length=cache.length + new,
        next_position=following,
        token_ids=None,
        hidden=None,
        ahead=None,
        shared=None,
        moved=None,
        counts=None,
    )
