"""Attention in which every slot may count other than once: merged entries, and samples that stand for many.

With log-weights b and a of its denominator and numerator, a slot with logit l enters the output as

    out = sum_j e^(l_j + a_j) v_j / sum_j e^(l_j + b_j),      lse = log sum_j e^(l_j + b_j)

b is the slot state LOG_COUNT and a is LOG_VALUE where there is one, else b; both are 0 for an ordinary entry. a = b = log n
is a slot that stands for n tokens; a != b serves estimators that sample the two sums apart (SubGen). (out, lse) is a
partial result like any other: `merge_partials` multiplies `out` by its denominator, which gives back the numerator.

Kernels read no weight per slot, so that this runs in XLA, on decoded keys and values. A layer takes the kernels' path as
long as none of its slots has a weight. Scorers see the attention that one token of a slot receives: e^(l_j) / sum.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.cache import ops, read
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, View
from kvjax.policies.reducing import LOG_COUNT, LOG_VALUE
from kvjax.types import Array, AttentionInputs
from pallas_kernels.merge_partials import merge_partials

_BLOCK = 128  # queries at a time: O(block * slots) memory
_MOST = 60.0  # largest logarithm of a probability: a sampled numerator far above its denominator stays finite


def weighs(plan: Plan, i: int) -> bool:
    """True when any slot of layer i may have a weight."""
    policy = plan.layers[i].policy
    return policy.compresses and policy.reducer.weighs


def attention(x: AttentionInputs, k: Array, v: Array, view: View) -> tuple[Array, Array, Array]:
    """(out f32 [batch, q_heads, tokens, head_dim], lse f32 [batch, q_heads, tokens], mass f32 [batch, q_heads, slots]).

    k, v [batch, kv_heads, slots, head_dim]: all of them precede the queries. view: their positions and slot state. mass:
    attention to one token of each slot, summed over the queries.
    """
    b, heads, t, d = x.q.shape
    valid, kv = view.pos >= 0, k.shape[1]
    count = jnp.where(valid, view.slot_state[LOG_COUNT], -jnp.inf)[:, :, None, None]
    value = jnp.where(valid, view.slot_state.get(LOG_VALUE, view.slot_state[LOG_COUNT]), -jnp.inf)[
        :, :, None, None
    ]
    k = jnp.where(valid[..., None], k, 0).astype(jnp.float32)
    v = jnp.where(valid[..., None], v, 0).astype(jnp.float32)

    def some(q: Array) -> tuple[Array, Array, Array]:
        logits = jnp.einsum("bkgtd,bknd->bkgtn", q.astype(jnp.float32), k, precision="highest") * x.scale
        if x.softcap is not None:
            logits = x.softcap * jnp.tanh(logits / x.softcap)
        lse = jax.nn.logsumexp(logits + count, axis=-1)
        logits = logits - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None]
        out = jnp.einsum(
            "bkgtn,bknd->bkgtd", jnp.exp(jnp.minimum(logits + value, _MOST)), v, precision="highest"
        )
        mass = jnp.where(valid[:, :, None, None], jnp.exp(jnp.minimum(logits, 0.0)), 0.0)
        return out, lse, mass

    q = x.q.reshape(b, kv, heads // kv, t, d)
    if t <= _BLOCK:
        out, lse, mass = some(q)
        mass = jnp.sum(mass, axis=3)
    else:
        parts = -(-t // _BLOCK)
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, parts * _BLOCK - t), (0, 0)))
        q = jnp.moveaxis(q.reshape(b, kv, heads // kv, parts, _BLOCK, d), 3, 0)
        real = jnp.arange(parts * _BLOCK).reshape(parts, _BLOCK) < t

        def one(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            out, lse, mass = some(part[0])
            return out, lse, jnp.einsum("bkgtn,t->bkgn", mass, part[1].astype(jnp.float32))

        out, lse, mass = jax.lax.map(one, (q, real))
        out = jnp.moveaxis(out, 0, 3).reshape(b, kv, heads // kv, -1, d)[:, :, :, :t]
        lse = jnp.moveaxis(lse, 0, 3).reshape(b, kv, heads // kv, -1)[..., :t]
        mass = jnp.sum(mass, axis=0)
    return out.reshape(b, heads, t, d), lse.reshape(b, heads, t), mass.reshape(b, heads, -1)


def _some(view: View) -> Array:
    """bool []: a slot has a weight."""
    weights = [view.slot_state[n] for n in (LOG_COUNT, LOG_VALUE) if n in view.slot_state]
    return jnp.any((view.pos >= 0) & jnp.any(jnp.stack(weights) != 0, axis=0))


def stored_attention(
    plan: Plan,
    cache: KVCache,
    x: AttentionInputs,
    *,
    return_mass: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array | None]:
    """`kvjax.cache.read.stored_attention` for a layer that weighs its slots."""
    i = x.layer
    view = ops.view(plan, cache, i)

    def weighted() -> tuple[Array, Array | None]:
        codec = plan.layers[i].policy.codec
        k, v = codec.decode(view.store, plan.shape.dtype, ops.context(plan, i, view.pos, x.inv_freq))
        out, _, mass = attention(x, k, v, view)
        return out.astype(x.q.dtype), mass if return_mass else None

    def plain() -> tuple[Array, Array | None]:
        out, mass = read.stored_attention(
            plan, cache, x, return_mass=return_mass, implementation=implementation
        )
        return out, None if mass is None else mass[..., : view.pos.shape[2]]

    return jax.lax.cond(_some(view), weighted, plain)


def extended(
    x: AttentionInputs,
    past: View,
    k: Array,
    v: Array,
    own: Callable[[], tuple[Array, Array]],
    plain: Callable[[], tuple[Array, Array]],
) -> tuple[Array, Array]:
    """(out in q's dtype, lse) of new tokens that follow weighted entries k, v [batch, kv_heads, slots, head_dim].

    own: attention among the new tokens, as a partial result. plain: attention over everything, for when nothing is weighted.
    """

    def weighted() -> tuple[Array, Array]:
        mine, (late, total) = attention(x, k, v, past), own()
        out, lse = merge_partials(jnp.stack([mine[0], late]), jnp.stack([mine[1], total]))
        return out.astype(x.q.dtype), lse

    return jax.lax.cond(_some(past), weighted, plain)
