"""The attention of one layer on a cache: the functions that a model calls as `kvjax.types.AttendFn`.

`prefill(plan)` attends over what is stored plus the new tokens, observes, and compresses; `decode(plan)`
appends one token, attends over what is stored, and lets the policy evict. Both are pure; `plan` is static.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.cache import compensation, deferred, ops
from kvjax.cache.plan import Plan
from kvjax.cache.read import stored_attention
from kvjax.cache.state import KVCache, Pool, View
from kvjax.policies.base import LOG_COUNT, Policy, Tokens
from kvjax.policies.observation import NEG, Observation
from kvjax.sharded_kernels import prefill_attention
from kvjax.sharding import constrain
from kvjax.types import Array, AttendFn, AttentionInputs


def prefill(plan: Plan, *, fresh: bool, compress: bool = True, implementation: str | None = None) -> AttendFn:
    """AttendFn for a prompt or a chunk of one. Call `finish` once after all layers.

    fresh: the cache is empty (whole-prompt prefill), so attention covers the new tokens only. compress: apply
    the policy; False appends the new tokens (a question after a compressed context), except that policies which
    evict while decoding, and sliding layers, return to their limit.
    """

    def attend(x: AttentionInputs, cache: KVCache) -> tuple[Array, KVCache]:
        i = x.layer
        lp = plan.layers[i]
        codec = lp.policy.codec
        only_append = not (lp.policy.compresses and (compress or lp.policy.evict_decode))
        if codec.deferred and not fresh and not only_append:
            raise ValueError(
                f"{lp.policy.name}: entries that {type(codec).__name__} has encoded cannot be scored against later "
                "chunks; prefill the whole prompt at once, or use a codec of single tokens without a window"
            )
        new = _new_entries(plan, x)
        if fresh:
            entries, k, v = new, x.k, x.v
            pos = entries.pos
        elif codec.deferred:
            entries = new  # what is encoded stays where it is
            k, v, pos = deferred.decoded(plan, cache, i, x.inv_freq)
            k, v, pos = (jnp.concatenate(p, axis=2) for p in ((k, x.k), (v, x.v), (pos, new.pos)))
        else:
            past = ops.view(plan, cache, i)
            entries = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), past, new)
            past_k, past_v = codec.decode(
                past.store, plan.shape.dtype, ops.context(plan, i, past.pos, x.inv_freq)
            )
            k = jnp.concatenate([past_k, x.k], axis=2)
            v = jnp.concatenate([past_v, x.v], axis=2)
            pos = entries.pos
        with jax.named_scope("prefill_attention"):
            out, lse = prefill_attention(
                x.q,
                k,
                v,
                q_positions=x.positions,
                k_positions=x.positions if fresh else pos,
                scale=x.scale,
                window=x.window,
                softcap=x.softcap,
                causal_aligned=fresh,
                return_lse=True,
                implementation=implementation,
            )
        if not fresh and compensation.counts_slots(plan, i):
            count = jnp.where(entries.pos >= 0, entries.slot_state[LOG_COUNT], 0.0)
            count, key, value = compensation.most_numerous(count, k, v)
            out = compensation.add_counts(x, out, lse, key, value, count)
        out = constrain(out, ("batch", "q_heads", None, None))
        if only_append and not fresh:
            return out, _append(plan, cache, x)
        obs = observation(plan, x, cache, k, v, entries.pos, prefilling=True).replace(lse=lse)
        if codec.scorer is not None:
            with jax.named_scope("saliency"):
                saliency = codec.scorer.score(obs, {})[0]
            entries = entries.replace(slot_state={**entries.slot_state, "saliency": saliency})
        return out, _store(plan, cache, obs, entries, compress=compress, fresh=fresh)

    return attend


def _new_entries(plan: Plan, x: AttentionInputs) -> View:
    """This call's tokens as candidates for storage."""
    lp = plan.layers[x.layer]
    b, h, t, _ = x.k.shape
    pos = jnp.broadcast_to(x.positions[:, None], (b, h, t))
    scorer = lp.policy.scorer if lp.policy.compresses else None
    state = {} if scorer is None else scorer.slot_state()
    codec = lp.policy.codec
    return View(
        store={"k": x.k, "v": x.v}
        if codec.deferred
        else codec.encode(x.k, x.v, ops.context(plan, x.layer, pos, x.inv_freq)),
        pos=pos,
        slot_state={n: jnp.zeros((b, h, t, *suffix), dtype) for n, (suffix, dtype) in state.items()},
    )


def _append(plan: Plan, cache: KVCache, x: AttentionInputs) -> KVCache:
    with jax.named_scope("append"):
        if plan.layers[x.layer].policy.codec.deferred:
            return deferred.append(plan, cache, x.layer, x.k, x.v, x.positions, x.inv_freq, x.q)
        return ops.append(plan, cache, x.layer, x.k, x.v, x.positions, x.inv_freq)


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
    if not plan.layers[i].policy.codec.deferred:
        return ops.rebuild(plan, cache, i, entries, index, limit, pool, first_page)
    return deferred.rebuild(plan, cache, i, entries, index, limit, pool, first_page, obs.inv_freq)


def observation(
    plan: Plan, x: AttentionInputs, cache: KVCache, k: Array, v: Array, pos: Array, *, prefilling: bool
) -> Observation:
    """What a policy may look at: this call's inputs, and all entries k, v, pos [batch, kv_heads, slots, ...]."""
    new = jnp.sum(x.positions >= 0, axis=1, dtype=jnp.int32)
    return Observation(
        q=x.q,
        q_pos=x.positions,
        k=k,
        v=v,
        pos=pos,
        length=cache.next_position + new,
        steps=cache.length + new - cache.compressed,
        token_ids=cache.token_ids,
        hidden=x.hidden,
        wo=x.wo,
        inv_freq=x.inv_freq,
        const=cache.layers[x.layer].const,
        layer=x.layer,
        layers=plan.shape.layers,
        scale=x.scale,
        window=x.window,
        softcap=x.softcap,
        prefilling=prefilling,
    )


@struct.dataclass
class Pending:
    """A scored layer before compaction."""

    entries: View
    scores: Array  # f32 [batch, kv_heads, slots], protected
    obs: Observation
    stats: Any = None  # what the allocator measured
    counts: Array | None = None  # int32 [batch, kv_heads] when they are known already
    limit: Array | None = None  # int32 [batch, kv_heads], with `counts`


def _store(
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
    length = jnp.maximum(seen(cache, obs), cache.expected)
    obs = obs.replace(keep=layer_keep(plan, i, length) if compress else limit.max(1))
    with jax.named_scope("score"):
        state = {n: x for n, x in entries.slot_state.items() if n != "saliency"}
        scores, state = policy.scorer.score(obs, state)
        if "saliency" in entries.slot_state:
            state = {**state, "saliency": entries.slot_state["saliency"]}
    entries = entries.replace(slot_state=state)
    return keep_best(plan, cache, obs, entries, scores, compress=compress, fresh=fresh)


def seen(cache: KVCache, obs: Observation) -> Array:
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
    length = seen(cache, obs)
    if compress:
        cache = cache.replace(compressed=length)
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
                k, v, state = policy.reducer.apply(obs, index, scores, entries.slot_state)
            else:
                k, v, state = ops.take_slots(obs.k, index), ops.take_slots(obs.v, index), None
            if state is None:
                state = {n: ops.take_slots(s, index) for n, s in entries.slot_state.items()}
            pos, codec = ops.take_slots(entries.pos, index, fill=-1), policy.codec
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
            index = jnp.where(index < slots, jnp.arange(index.shape[2]), index.shape[2])
        return _rebuild(plan, cache, obs, entries, index, limit, pool, first_page)


def _evict(plan: Plan, cache: KVCache, obs: Observation, entries: View) -> KVCache:
    """Bring layer `obs.layer` back to its limit: one entry per step, or a compaction every `interval` steps."""
    i = obs.layer
    policy, limit = plan.layers[i].policy, cache.layers[i].limit
    if policy.room is not None:
        limit = limit - policy.room.missing(obs.need("steps"))[:, None]
    scorer = policy.scorer
    assert scorer is not None

    def scored() -> tuple[Array, dict[str, Array]]:
        scores, state = scorer.score(obs, entries.slot_state)
        return policy.protect(scores, entries.pos, obs.length), state

    if policy.interval == 1 and not policy.rerotate:
        scores, state = scored()
        return ops.evict_one(plan, ops.write_slot_state(plan, cache, i, state), i, scores, limit)
    fill = jnp.sum(entries.pos >= 0, axis=-1, dtype=jnp.int32)
    due = jnp.any(fill >= limit + policy.interval, axis=1)
    moved = jnp.where(due, jnp.max(limit, axis=1), obs.length)
    # Scores with state are due every step; others only when something leaves.
    scores, state = scored() if entries.slot_state else (None, {})

    def compact(cache: KVCache) -> KVCache:
        ranked = scored()[0] if scores is None else scores
        counts = jnp.where(due[:, None], limit, fill)
        pending = Pending(entries.replace(slot_state=state), ranked, obs)
        done = _compact(plan, cache, pending, counts, cache.layers[i].limit)[0]
        return done.replace(moved=cache.moved)

    def leave(cache: KVCache) -> KVCache:
        return ops.write_slot_state(plan, cache, i, state)

    cache = jax.lax.cond(jnp.any(due), compact, leave, cache)
    return cache.replace(moved=moved) if policy.rerotate else cache


def finish(plan: Plan, cache: KVCache, positions: Array) -> KVCache:
    """After all layers: compact the layers that had to wait for each other, and count the tokens.

    positions int32 [batch, tokens], -1 = padding.
    """
    new = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
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
    following = cache.next_position + new if cache.moved is None else cache.moved
    return cache.replace(
        length=cache.length + new, next_position=following, token_ids=None, shared=None, moved=None
    )


def decode(plan: Plan, *, implementation: str | None = None) -> AttendFn:
    """AttendFn for one new token a row (positions -1: the row is finished and nothing changes)."""

    def attend(x: AttentionInputs, cache: KVCache) -> tuple[Array, KVCache]:
        i = x.layer
        lp = plan.layers[i]
        policy = lp.policy
        evict = policy.compresses and policy.evict_decode
        cache = _append(plan, cache, x)
        want_mass = evict and "mass" in policy.needs
        with jax.named_scope("decode_attention"):
            if compensation.counts_slots(plan, i):
                result = compensation.stored_attention(plan, cache, x, implementation=implementation), None
            else:
                result = stored_attention(
                    plan, cache, x, return_mass=want_mass, implementation=implementation
                )
        out, mass = result
        out = constrain(out, ("batch", "q_heads", None, None))
        if not evict:
            return out, cache
        with jax.named_scope("evict"):
            entries = ops.view(plan, cache, i)
            ctx = ops.context(plan, i, entries.pos, x.inv_freq)
            k, v = policy.codec.decode(entries.store, plan.shape.dtype, ctx)
            obs = observation(plan, x, cache, k, v, entries.pos, prefilling=False)
            if mass is not None:
                obs = obs.replace(mass=mass[..., : entries.pos.shape[2]])
            obs = obs.replace(keep=cache.layers[i].limit.max(1))
            cache = _evict(plan, cache, obs, entries)
        return out, cache

    return attend
