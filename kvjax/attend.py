"""The attention of one layer on a cache: the functions that a model calls as `kvjax.types.AttendFn`.

`prefill(plan)` attends over what is stored plus the new tokens, observes, and compresses; `decode(plan)`
appends one token, attends over what is stored, and lets the policy evict. Both are pure; `plan` is static.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.cache import deferred, ops
from kvjax.cache.plan import Plan
from kvjax.cache.read import stored_attention
from kvjax.cache.state import KVCache, Pool, View
from kvjax.policies.observation import Observation
from kvjax.sharding import constrain
from kvjax.types import Array, AttendFn, AttentionInputs
from pallas_kernels.prefill_attention import prefill_attention


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
        out = constrain(out, ("batch", "q_heads", None, None))
        if only_append and not fresh:
            return out, _append(plan, cache, x)
        obs = _observe(plan, x, cache, k, v, entries.pos, prefilling=True).replace(lse=lse)
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


def _observe(
    plan: Plan, x: AttentionInputs, cache: KVCache, k: Array, v: Array, pos: Array, *, prefilling: bool
) -> Observation:
    seen = cache.length + jnp.sum(x.positions >= 0, axis=1, dtype=jnp.int32)
    return Observation(
        q=x.q,
        q_pos=x.positions,
        k=k,
        v=v,
        pos=pos,
        length=seen,
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


def _store(
    plan: Plan, cache: KVCache, obs: Observation, entries: View, *, compress: bool, fresh: bool
) -> KVCache:
    """Score, allocate, select, reduce and store the candidates of one layer."""
    i = obs.layer
    lp, policy, limit = plan.layers[i], plan.layers[i].policy, cache.layers[i].limit
    if not policy.compresses or (fresh and not compress and not lp.fixed_limit):
        places = entries.pos.shape[2] if policy.codec.deferred else min(lp.capacity, entries.pos.shape[2])
        index = ops.all_entries(entries.pos >= 0, places)
        return _rebuild(plan, cache, obs, entries, index, limit)[0]
    assert policy.scorer is not None
    with jax.named_scope("score"):
        state = {n: x for n, x in entries.slot_state.items() if n != "saliency"}
        scores, state = policy.scorer.score(obs, state)
        if "saliency" in entries.slot_state:
            state = {**state, "saliency": entries.slot_state["saliency"]}
        entries = entries.replace(slot_state=state)
        scores = policy.protect(scores, entries.pos, obs.length)
    if compress and policy.allocator.scope == "model":
        return cache.replace(pending=(*cache.pending, Pending(entries, scores, obs)))
    with jax.named_scope("allocate"):
        if compress:
            length = jnp.maximum(obs.length, cache.expected)
            counts = _counts(plan, i, scores, entries.pos >= 0, length)
            limit = _limit(plan, i, counts, obs.length)
        else:
            limit = jnp.full_like(limit, lp.keep_capacity) if lp.fixed_limit else limit
            counts = limit
    return _compact(plan, cache, Pending(entries, scores, obs), counts, limit)[0]


def _counts(plan: Plan, i: int, scores: Array, valid: Array, length: Array) -> Array:
    policy = plan.layers[i].policy
    keep = policy.keep_counts(length, plan.prompt)
    keep = policy.allocator.layer_keep(i, plan.shape.layers, keep, length)
    return policy.allocator.counts(scores, valid, keep, i)


def _limit(plan: Plan, i: int, counts: Array, length: Array) -> Array:
    """Most entries per head while decoding: what the prompt kept, or the whole budget if the prompt was short."""
    lp = plan.layers[i]
    if not lp.fixed_limit:
        return counts
    if not lp.ragged:
        return jnp.full_like(counts, lp.keep_capacity)
    return jnp.where((length >= lp.policy.budget)[:, None], counts, lp.policy.budget)


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
        counts = jnp.minimum(counts, jnp.sum(entries.pos >= 0, axis=-1, dtype=jnp.int32))
        index = policy.selection.select(scores, entries.pos >= 0, counts, min(lp.keep_capacity, slots))
        if policy.reducer.merges:
            k, v = policy.reducer.reduce(obs, index, scores)
            pos, codec = ops.take_slots(entries.pos, index, fill=-1), policy.codec
            entries = View(
                store={"k": k.astype(plan.shape.dtype), "v": v.astype(plan.shape.dtype)}
                if codec.deferred
                else codec.encode(k, v, ops.context(plan, obs.layer, pos, obs.inv_freq)),
                pos=pos,
                slot_state={n: ops.take_slots(s, index) for n, s in entries.slot_state.items()},
            )
            index = jnp.where(index < slots, jnp.arange(index.shape[2]), index.shape[2])
        return _rebuild(plan, cache, obs, entries, index, limit, pool, first_page)


def finish(plan: Plan, cache: KVCache, positions: Array) -> KVCache:
    """After all layers: compact the layers that had to wait for each other, and count the tokens.

    positions int32 [batch, tokens], -1 = padding.
    """
    new = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    if cache.pending:
        pending = cache.pending
        policy, length = plan.layers[pending[0].obs.layer].policy, pending[0].obs.length
        keep = policy.keep_counts(jnp.maximum(length, cache.expected), plan.prompt)
        with jax.named_scope("allocate"):
            counts = policy.allocator.model_counts(
                [p.scores for p in pending], [p.entries.pos >= 0 for p in pending], keep
            )
        cache, pool, page = cache.replace(pending=()), None, 0
        for p, count in zip(pending, counts):
            i = p.obs.layer
            cache, page = _compact(plan, cache, p, count, _limit(plan, i, count, length), pool, page)
            pool = cache.pools[plan.layers[i].pool]
    return cache.replace(length=cache.length + new, next_position=cache.next_position + new)


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
            result = stored_attention(plan, cache, x, return_mass=want_mass, implementation=implementation)
        out, mass = result
        out = constrain(out, ("batch", "q_heads", None, None))
        if not evict:
            return out, cache
        with jax.named_scope("evict"):
            seen = ops.view(plan, cache, i)
            ctx = ops.context(plan, i, seen.pos, x.inv_freq)
            k, v = policy.codec.decode(seen.store, plan.shape.dtype, ctx)
            obs = _observe(plan, x, cache, k, v, seen.pos, prefilling=False)
            if mass is not None:
                obs = obs.replace(mass=mass[..., : seen.pos.shape[2]])
            assert policy.scorer is not None
            scores, state = policy.scorer.score(obs, seen.slot_state)
            cache = ops.write_slot_state(plan, cache, i, state)
            cache = ops.evict_one(plan, cache, i, policy.protect(scores, seen.pos, obs.length))
        return out, cache

    return attend
