"""A cache filled with random entries, without running a model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, View
from kvjax.compress import finish, store
from kvjax.policies.observation import Observation


@functools.partial(jax.jit, static_argnums=0)
def random_cache(plan: Plan, key: jax.Array) -> KVCache:
    """The cache after a prompt of `plan.prompt` tokens a row with normal keys and values; the policy is applied.

    The policy sees one random query. Needs a few times the memory of one layer beyond the cache itself.
    """
    cache, shape = ops.empty(plan), plan.shape
    positions = jnp.broadcast_to(jnp.arange(plan.prompt, dtype=jnp.int32), (plan.batch, plan.prompt))
    pos = jnp.broadcast_to(positions[:, None], (plan.batch, shape.kv_heads, plan.prompt))
    for i, lp in enumerate(plan.layers):
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        k, v = (jax.random.normal(x, (*pos.shape, shape.head_dim), shape.dtype) for x in keys[:2])
        codec = lp.policy.codec
        entries = View(
            store={"k": k, "v": v} if codec.deferred else codec.encode(k, v, ops.context(plan, i, pos, None)),
            pos=pos,
            slot_state={},
        )
        obs = Observation(
            q=jax.random.normal(keys[2], (plan.batch, shape.q_heads, 1, shape.head_dim), shape.dtype),
            q_pos=positions[:, -1:],
            k=k,
            v=v,
            pos=pos,
            length=jnp.full((plan.batch,), plan.prompt, jnp.int32),
            layer=i,
            layers=shape.layers,
            scale=shape.head_dim**-0.5,
        )
        cache = store(plan, cache, obs, entries, compress=True, fresh=True)
    return finish(plan, cache, positions)
