"""Attention in which one slot of a head may stand for many tokens.

The slot's exponential counts N times. Kernels know nothing of it: they count it once, and N - 1 more are merged in
as a partial result of their own, with logit s + ln(N - 1) and the slot's value as output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache import ops, read
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache
from kvjax.policies.reducing import LOG_COUNT
from kvjax.types import Array, AttentionInputs
from pallas_kernels.merge_partials import merge_partials


def counts_slots(plan: Plan, i: int) -> bool:
    """True when a slot of layer i may stand for more than one token."""
    policy = plan.layers[i].policy
    return policy.compresses and policy.scorer is not None and LOG_COUNT in policy.scorer.slot_state()


def add_counts(x: AttentionInputs, out: Array, lse: Array, k: Array, v: Array, log_count: Array) -> Array:
    """`out` with the heads' most numerous slot counted in full, in the dtype of q.

    out [batch, q_heads, tokens, head_dim] and lse f32 [batch, q_heads, tokens] count every slot once; k, v [batch,
    kv_heads, head_dim] and log_count f32 [batch, kv_heads] are those of that slot.
    """
    b, heads, t, d = x.q.shape
    kv = k.shape[1]
    q = x.q.reshape(b, kv, heads // kv, t, d).astype(jnp.float32)
    logit = jnp.einsum("bkgtd,bkd->bkgt", q, k.astype(jnp.float32), precision="highest") * x.scale
    if x.softcap is not None:
        logit = x.softcap * jnp.tanh(logit / x.softcap)
    more = jnp.expm1(log_count)
    more = jnp.where(more > 0, jnp.log(jnp.maximum(more, 1e-30)), -jnp.inf)
    extra = (logit + more[:, :, None, None]).reshape(b, heads, t)
    value = jnp.broadcast_to(v.astype(jnp.float32)[:, :, None, None], (b, kv, heads // kv, t, d))
    merged, _ = merge_partials(
        jnp.stack([out.astype(jnp.float32), value.reshape(b, heads, t, d)]), jnp.stack([lse, extra])
    )
    return merged.astype(x.q.dtype)


def most_numerous(log_count: Array, *fields: Array) -> tuple[Array, ...]:
    """(log_count [batch, kv_heads], and each field [batch, kv_heads, slots, ...] at the slot of largest log_count."""
    slot = jnp.argmax(log_count, axis=-1)
    pick = jax.vmap(jax.vmap(lambda a, s: a[s]))
    return jnp.max(log_count, axis=-1), *(pick(f, slot) for f in fields)


def stored_attention(
    plan: Plan, cache: KVCache, x: AttentionInputs, *, implementation: str | None = None
) -> Array:
    """`kvjax.cache.read.stored_attention` for a layer whose slots may stand for several tokens."""
    i = x.layer
    codec, pool = plan.layers[i].policy.codec, cache.pools[plan.layers[i].pool]
    out, lse = read.stored_attention(plan, cache, x, return_lse=True, implementation=implementation)
    # Only one slot a head is read here, not the whole view.
    count, slot = _numerous_slot(plan, cache, i)
    store = {n: _read(plan, cache, i, a, slot) for n, a in pool.store.items()}
    k, v = codec.decode(store, plan.shape.dtype, ops.context(plan, i, slot, x.inv_freq))
    return add_counts(x, out, lse, k[:, :, 0], v[:, :, 0], count)


def _numerous_slot(plan: Plan, cache: KVCache, i: int) -> tuple[Array, Array]:
    layer, pool = cache.layers[i], cache.pools[plan.layers[i].pool]
    log_count = pool.slot_state[LOG_COUNT]
    if layer.table is not None:
        pages = jnp.take(log_count, jnp.maximum(layer.table, 0), axis=0)
        log_count = pages.reshape(*layer.table.shape[:2], -1)
    used = jnp.arange(log_count.shape[-1]) < layer.fill[..., None]
    log_count = jnp.where(used, log_count, 0.0)
    return jnp.max(log_count, axis=-1), jnp.argmax(log_count, axis=-1)[..., None]


def _read(plan: Plan, cache: KVCache, i: int, array: Array, slot: Array) -> Array:
    """array at slot int32 [batch, kv_heads, 1]: [batch, kv_heads, 1, ...]."""
    layer = cache.layers[i]
    if layer.table is None:
        return ops.take_slots(array, slot)
    page = plan.page(plan.layers[i].policy)
    page_id = jnp.take_along_axis(layer.table, slot // page, axis=2)
    return array[jnp.maximum(page_id, 0), slot % page]
