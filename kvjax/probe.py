"""Prefill of a policy with a probe: the prompt uncompressed, the probe's passes, then one compaction.

The uncompressed entries live in a temporary Dense cache of the same call; only the compressed one leaves it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kvjax import attend
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, View
from kvjax.compress import finish, keep_best, layer_keep, tokens_seen
from kvjax.policies.base import Policy
from kvjax.sharded_kernels import prefill_attention
from kvjax.types import Array, AttendFn, AttentionInputs


@struct.dataclass
class Scored:
    """What the passes accumulate for one layer: scores f32 [batch, kv_heads, slots] and per-slot state."""

    scores: Array
    state: dict[str, Array]


@struct.dataclass
class Carry:
    """The cache, as the model threads it through one probe pass."""

    cache: KVCache  # of the temporary plan; read only
    layers: tuple[Scored, ...]
    span: tuple[Array, Array]


def prefill(
    lm: Any,
    plan: Plan,
    params: Any,
    cache: KVCache,
    tokens: Array,
    positions: Array,
    implementation: str | None,
    *,
    fresh: bool,
) -> tuple[Array, KVCache]:
    """(hidden [batch, tokens, embed] of the prompt or chunk, the compressed cache).

    lm: an `engine.LanguageModel`. tokens, positions int32 [batch, tokens], -1 = padding.
    """
    past = 0 if fresh else max(lp.capacity for lp in plan.layers)
    uncompressed = Policy(prefill=plan.policy.prefill)
    whole = dataclasses.replace(plan, policy=uncompressed, prompt=past + tokens.shape[1], reserve=0)
    scratch = ops.empty(whole)
    if not fresh:
        scratch = _copy(plan, cache, whole, scratch)
    store = attend.prefill(whole, fresh=fresh, implementation=implementation)
    inputs: dict[int, AttentionInputs] = {}  # of the prompt, for the compaction at the end

    def fn(x: AttentionInputs, c: KVCache) -> tuple[Array, KVCache]:
        inputs[x.layer] = x
        return store(x, c)

    hidden, scratch = lm.hidden(params, tokens, positions, scratch, fn)
    scratch = finish(whole, scratch, positions)

    passes = plan.policy.probe.passes(tokens, positions)
    layers = tuple(_start(plan, cache, whole, i) for i in range(plan.shape.layers))
    observe = _observer(plan, cache, whole, implementation)

    def one(layers: tuple[Scored, ...], x: Any) -> tuple[tuple[Scored, ...], None]:
        at = jnp.where(x.offsets >= 0, scratch.next_position[:, None] + x.offsets, -1)
        _, carry = lm.hidden(params, x.tokens, at, Carry(scratch, layers, (x.start, x.end)), observe)
        return carry.layers, None

    with jax.named_scope("probe"):
        layers, _ = jax.lax.scan(one, layers, passes)
    for i, scored in enumerate(layers):
        cache = _compress(plan, cache, whole, scratch, inputs[i], scored)
    return hidden, finish(plan, cache, positions)


def _copy(plan: Plan, cache: KVCache, whole: Plan, scratch: KVCache) -> KVCache:
    """What `cache` stores, decoded, as the first entries of the temporary cache."""
    for i in range(plan.shape.layers):
        seen = ops.view(plan, cache, i)
        codec = plan.layers[i].policy.codec
        if codec.deferred:
            raise ValueError(
                f"{plan.policy.name}: a probe needs the entries of earlier chunks, which {type(codec).__name__} has "
                "encoded in groups; prefill the whole prompt at once"
            )
        k, v = codec.decode(seen.store, plan.shape.dtype, ops.context(plan, i, seen.pos, None))
        places = min(seen.pos.shape[2], whole.layers[i].capacity)
        index = ops.all_entries(seen.pos >= 0, places)
        entries = View(store={"k": k, "v": v}, pos=seen.pos, slot_state={})
        scratch = ops.rebuild(whole, scratch, i, entries, index, scratch.layers[i].limit)[0]
    return scratch.replace(length=cache.length, next_position=cache.next_position)


def _start(plan: Plan, cache: KVCache, whole: Plan, i: int) -> Scored:
    """Zero scores, and the state that entries of `cache` bring along, in the temporary cache's slots."""
    lead = (plan.batch, plan.shape.kv_heads, whole.layers[i].capacity)
    scorer = plan.layers[i].policy.scorer
    state = {}
    if scorer is not None and plan.layers[i].policy.compresses:
        seen = ops.view(plan, cache, i)
        index = ops.all_entries(seen.pos >= 0, lead[2])
        for name, (suffix, dtype) in scorer.slot_state().items():
            if (
                name not in seen.slot_state
            ):  # a deferred codec: the prompt is compressed once, nothing came before
                state[name] = jnp.zeros((*lead, *suffix), dtype)
                continue
            held = ops.take_slots(seen.slot_state[name], index)
            state[name] = held.astype(dtype).reshape(*lead, *suffix)
    return Scored(jnp.zeros(lead, jnp.float32), state)


def _observer(plan: Plan, cache: KVCache, whole: Plan, implementation: str | None) -> AttendFn:
    """AttendFn of a probe pass: attends over the stored entries and the pass itself, scores, stores nothing."""

    def fn(x: AttentionInputs, carry: Carry) -> tuple[Array, Carry]:
        i = x.layer
        scratch, policy = carry.cache, plan.layers[i].policy
        seen = ops.view(whole, scratch, i)
        slots, (b, h, t, _) = seen.pos.shape[2], x.k.shape
        k = jnp.concatenate([seen.store["k"].astype(x.k.dtype), x.k], axis=2)
        v = jnp.concatenate([seen.store["v"].astype(x.v.dtype), x.v], axis=2)
        pos = jnp.concatenate([seen.pos, jnp.broadcast_to(x.positions[:, None], (b, h, t))], axis=2)
        out, lse = prefill_attention(
            x.q,
            k,
            v,
            q_positions=x.positions,
            k_positions=pos,
            scale=x.scale,
            window=x.window,
            softcap=x.softcap,
            causal_aligned=False,
            return_lse=True,
            implementation=implementation,
        )
        if policy.scorer is None or policy.scorer != plan.policy.scorer:
            return out, carry  # a sliding layer keeps its newest entries, whatever the probe says
        obs = attend.observation(whole, x, scratch, k, v, pos, prefilling=True).replace(
            lse=lse, span=carry.span, const=cache.layers[i].const
        )
        own = {n: jnp.zeros((b, h, t, *s), d) for n, (s, d) in policy.scorer.slot_state().items()}
        before = carry.layers[i]
        state = {n: jnp.concatenate([before.state[n], z], axis=2) for n, z in own.items()}
        scores, state = policy.scorer.score(obs, state)
        after = Scored(scores[:, :, :slots], {n: s[:, :, :slots] for n, s in state.items()})
        return out, carry.replace(layers=(*carry.layers[:i], after, *carry.layers[i + 1 :]))

    return fn


def _compress(
    plan: Plan, cache: KVCache, whole: Plan, scratch: KVCache, x: AttentionInputs, scored: Scored
) -> KVCache:
    """Store the best entries of one layer of the temporary cache in the real one."""
    i, policy = x.layer, plan.layers[x.layer].policy
    seen = ops.view(whole, scratch, i)
    k, v = seen.store["k"], seen.store["v"]
    obs = attend.observation(plan, x, cache, k, v, seen.pos, prefilling=True)
    obs = obs.replace(keep=layer_keep(plan, i, jnp.maximum(tokens_seen(cache, obs), cache.expected)))
    codec = policy.codec
    ctx = ops.context(plan, i, seen.pos, x.inv_freq)
    store = {"k": k, "v": v} if codec.deferred else codec.encode(k, v, ctx)
    entries = View(store=store, pos=seen.pos, slot_state=scored.state)
    scores = scored.scores
    if policy.scorer != plan.policy.scorer:
        scores = seen.pos.astype(jnp.float32)
    return keep_best(plan, cache, obs, entries, scores, compress=True, fresh=False)
