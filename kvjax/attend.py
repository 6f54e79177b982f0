"""The attention of one layer on a cache: the functions that a model calls as `kvjax.types.AttendFn`.

`prefill(plan)` attends over what is stored plus the new tokens, observes, and compresses; `decode(plan)`
appends one token, attends over what is stored, and lets the policy evict. Both are pure; `plan` is static.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.cache import compensation, deferred, ops, placing, selecting, weighted
from kvjax.cache import prefix as shared
from kvjax.cache.plan import Plan
from kvjax.cache.prefix import Prefix
from kvjax.cache.read import selected_attention, stored_attention
from kvjax.cache.state import Foreseen, KVCache, View
from kvjax.compress import evict_step, store
from kvjax.policies.observation import Observation
from kvjax.policies.reducing import LOG_COUNT
from kvjax.sharded_kernels import prefill_attention
from kvjax.sharding import constrain
from kvjax.sparse_prefill import sparse_attention
from kvjax.types import Array, AttendFn, AttentionInputs


def prefill(
    plan: Plan,
    *,
    fresh: bool,
    compress: bool = True,
    prefix: Prefix | None = None,
    implementation: str | None = None,
) -> AttendFn:
    """AttendFn for a prompt or a chunk of one. Call `finish` once after all layers.

    fresh: the cache is empty (whole-prompt prefill), so attention covers the new tokens only. compress: apply
    the policy, its prefill pattern included; False appends the new tokens (a question after a compressed context), except that policies which
    evict while decoding, and sliding layers, return to their limit. prefix: what all rows attend to beside their
    own entries; it precedes them.
    """

    def attend(x: AttentionInputs, cache: KVCache) -> tuple[Array, KVCache]:
        i = x.layer
        lp = plan.layers[i]
        codec = lp.policy.codec
        if not fresh and compress and placing.offloaded(plan, i):
            cache = placing.join(plan, cache, i)
        only_append = not (lp.policy.compresses and (compress or lp.policy.evict_decode))
        if codec.deferred and not fresh and not only_append:
            raise ValueError(
                f"{lp.policy.name}: entries that {type(codec).__name__} has encoded cannot be scored against later "
                "chunks; prefill the whole prompt at once or through `Generator(chunk=...)`, or use a codec of single "
                "tokens without a window"
            )
        new = new_entries(plan, x)
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
        pattern = lp.policy.prefill if fresh or compress else None
        with jax.named_scope("prefill_attention"):
            if pattern is not None and pattern.applies(k.shape[2]):
                seen = observation(plan, x, cache, k, v, pos, prefilling=True)
                out, lse = sparse_attention(
                    pattern, seen, aligned=fresh, partial=prefix is not None, implementation=implementation
                )
            else:
                common = dict(
                    q_positions=x.positions,
                    scale=x.scale,
                    window=x.window,
                    softcap=x.softcap,
                    return_lse=True,
                    implementation=implementation,
                )
                whole = functools.partial(
                    prefill_attention,
                    x.q,
                    k,
                    v,
                    k_positions=x.positions if fresh else pos,
                    causal_aligned=fresh,
                    partial=prefix is not None,
                    **common,
                )
                if not fresh and weighted.weighs(plan, i):
                    own = functools.partial(
                        prefill_attention, x.q, x.k, x.v, k_positions=x.positions, partial=True, **common
                    )
                    out, lse = weighted.extended(x, past, past_k, past_v, own, whole)
                else:
                    out, lse = whole()
            if prefix is not None:
                out, lse = shared.attend(x, prefix.layers[i], out, lse, implementation)
                out = out.astype(x.q.dtype)
        if not fresh and compensation.counts_slots(plan, i) and not weighted.weighs(plan, i):
            count = jnp.where(entries.pos >= 0, entries.slot_state[LOG_COUNT], 0.0)
            count, key, value = compensation.most_numerous(count, k, v)
            out = compensation.add_counts(x, out, lse, key, value, count)
        out = constrain(out, ("batch", "q_heads", None, None))
        if only_append and not fresh:
            return out, _remember(plan, _settle(plan, _append(plan, cache, x), i), x)
        dense = pattern is None or not pattern.applies(k.shape[2])
        cache = score_and_store(
            plan, cache, x, entries, k, v, lse, compress=compress, fresh=fresh,
            aligned=fresh and dense and prefix is None,
        )  # fmt: skip
        return _in_turn(plan, i, out, cache)

    return attend


def _in_turn(plan: Plan, i: int, out: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """Both unchanged, with `out` available only once layer i is compressed.

    Nothing else makes the next layer wait for this one's scores, and a scheduler that leaves them for later holds the
    queries, keys and values of every layer.
    """
    if cache.pending:
        last = cache.pending[-1]
        held = last.entries, last.scores, last.stats
        out, (entries, scores, stats) = jax.lax.optimization_barrier((out, held))
        last = last.replace(entries=entries, scores=scores, stats=stats)
        return out, cache.replace(pending=(*cache.pending[:-1], last))
    if cache.cascade is not None and cache.cascade.pool is not None:
        out, now = jax.lax.optimization_barrier((out, cache.cascade))
        return out, cache.replace(cascade=now)
    j = plan.layers[i].pool
    if plan.layers[i].offloaded:  # what it stores is in host memory by now
        out, layer = jax.lax.optimization_barrier((out, cache.layers[i]))
        return out, cache.put(i, layer, j, cache.pools[j])
    out, (layer, pool) = jax.lax.optimization_barrier((out, (cache.layers[i], cache.pools[j])))
    return out, cache.put(i, layer, j, pool)


def score_and_store(
    plan: Plan,
    cache: KVCache,
    x: AttentionInputs,
    entries: View,
    k: Array,
    v: Array,
    lse: Array,
    *,
    compress: bool,
    fresh: bool,
    aligned: bool,
) -> KVCache:
    """What follows attention in prefill: observe all entries k, v, score them, and store what the policy keeps.

    aligned: as in `Observation`.
    """
    scorer = plan.layers[x.layer].policy.codec.scorer
    obs = observation(plan, x, cache, k, v, entries.pos, prefilling=True)
    obs = obs.replace(lse=lse, aligned=aligned)
    if scorer is not None:
        with jax.named_scope("saliency"):
            saliency = scorer.score(obs, {})[0]
        entries = entries.replace(slot_state={**entries.slot_state, "saliency": saliency})
    cache = store(plan, cache, obs, entries, compress=compress, fresh=fresh)
    return _remember(plan, _settle(plan, cache, x.layer), x)


def new_entries(plan: Plan, x: AttentionInputs) -> View:
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
            after = deferred.append(plan, cache, x.layer, x.k, x.v, x.positions, x.inv_freq, x.q)
        else:
            after = ops.append(plan, cache, x.layer, x.k, x.v, x.positions, x.inv_freq)
    return selecting.append(plan, cache, after, x)


def _settle(plan: Plan, cache: KVCache, i: int) -> KVCache:
    """The cache after a prefill call, an offloaded layer's prompt in host memory."""
    if placing.offloaded(plan, i) and cache.pools[plan.layers[i].pool].host is None:
        return placing.split(plan, cache, i)
    return cache


def _remember(plan: Plan, cache: KVCache, x: AttentionInputs) -> KVCache:
    """The cache with this layer's input, for a selector that looks one layer back."""
    if "before" in plan.policy.needs:
        cache = cache.replace(hidden=x.hidden)
    if plan.policy.looks_ahead and x.q.shape[2] == 1:
        cache = cache.replace(ahead=None if x.ahead is None else Foreseen(x.ahead().q))
    return cache


def _foresee(plan: Plan, cache: KVCache, x: AttentionInputs) -> tuple[AttentionInputs, KVCache, Foreseen]:
    """(x, cache, what the next layer will need): the next layer's blocks are on their way.

    The barrier orders the program, not the work: the fetch is issued before this layer's attention, so that its buffers are
    none that attention and MLP use and, in a CUDA graph, neither waits for the other (`read._arrived` has the other half).
    """
    assert x.ahead is not None
    following = x.ahead()
    i = following.layer
    seen, fetched = selecting.choose_ahead(plan, _remember(plan, cache, x), following)
    q, fetched = jax.lax.optimization_barrier((x.q, fetched))
    layers = list(cache.layers)
    layers[i] = seen.layers[i]
    return x.replace(q=q), cache.replace(layers=tuple(layers)), Foreseen(seen.ahead.q, fetched)


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
        state=cache.layers[x.layer].state,
        layer=x.layer,
        layers=plan.shape.layers,
        scale=x.scale,
        window=x.window,
        softcap=x.softcap,
        prefilling=prefilling,
    )


def decode(plan: Plan, *, prefix: Prefix | None = None, implementation: str | None = None) -> AttendFn:
    """AttendFn for one new token a row (positions -1: the row is finished and nothing changes).

    prefix: what all rows attend to beside their own entries.
    """

    def attend(x: AttentionInputs, cache: KVCache) -> tuple[Array, KVCache]:
        i = x.layer
        lp = plan.layers[i]
        policy = lp.policy
        evict = policy.compresses and policy.evict_decode
        if not evict and selecting.foresees(plan, x):
            with jax.named_scope("prefetch"):
                x, cache, foreseen = _foresee(plan, cache, x)
        else:
            foreseen = None
        cache = _append(plan, cache, x)
        want_mass = evict and "mass" in policy.needs
        with jax.named_scope("decode_attention"):
            if weighted.weighs(plan, i):
                result = weighted.stored_attention(
                    plan, cache, x, return_mass=want_mass, implementation=implementation
                )
            elif compensation.counts_slots(plan, i):
                result = compensation.stored_attention(plan, cache, x, implementation=implementation), None
            elif selecting.active(plan, i):
                out, second, cache = selected_attention(
                    plan,
                    cache,
                    x,
                    return_lse=prefix is not None,
                    implementation=implementation,
                )
                result = out, second
            else:
                result = stored_attention(
                    plan,
                    cache,
                    x,
                    return_mass=want_mass,
                    return_lse=prefix is not None,
                    implementation=implementation,
                )
            if prefix is not None:
                out, _ = shared.attend(x, prefix.layers[i], *result, implementation)
                result = out.astype(x.q.dtype), None
        out, mass = result
        out = constrain(out, ("batch", "q_heads", None, None))
        if not evict:
            cache = _remember(plan, cache, x)
            return out, cache if foreseen is None else cache.replace(ahead=foreseen)
        with jax.named_scope("evict"):
            entries = ops.view(plan, cache, i)
            ctx = ops.context(plan, i, entries.pos, x.inv_freq)
            k, v = policy.codec.decode(entries.store, plan.shape.dtype, ctx)
            obs = observation(plan, x, cache, k, v, entries.pos, prefilling=False)
            if mass is not None:
                obs = obs.replace(mass=mass[..., : entries.pos.shape[2]])
            obs = obs.replace(keep=cache.layers[i].limit.max(1))
            cache = evict_step(plan, cache, obs, entries)
        return out, cache.replace(ahead=None)

    return attend
