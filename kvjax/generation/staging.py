"""Prompts in chunks under a policy that evicts and a codec that encodes groups: encoded once, when the prompt ends.

What such a codec has encoded cannot be scored against later chunks without decoding it, and would be encoded again. So
the chunks run with entries in model dtype, evicted to the budget after each as always, and `settle` then encodes what is
left: every entry once. Until then memory is bounded by the budget in model dtype and a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.arrays import init
from kvjax.cache import deferred, ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, View
from kvjax.codecs.base import Plain
from kvjax.generation.engine import LanguageModel
from kvjax.types import Array, AttentionInputs


def staged(plan: Plan) -> Plan | None:
    """The plan that the chunks of a prompt run with, None where they run with `plan` itself.

    ValueError for what needs more than the entries themselves when the prompt has ended: codecs that rank a prompt's
    entries by its queries, selectors, and caches that live elsewhere than on the device.
    """
    codec, policy = plan.policy.codec, plan.policy
    if not codec.deferred or not policy.compresses:
        return None
    for part, what in (
        (codec.scorer, f"{type(codec).__name__}, which ranks entries by the prompt's queries"),
        (policy.selector, f"{type(policy.selector).__name__}, which indexes entries as they are stored"),
        (policy.placement, f"{type(policy.placement).__name__}"),
    ):
        if part is not None:
            raise ValueError(
                f"{policy.name}: {what}, does not compose with a codec of groups and eviction in chunked prefill; "
                "prefill the whole prompt at once"
            )
    return dataclasses.replace(plan, policy=dataclasses.replace(policy, codec=Plain()))


@functools.partial(jax.jit, static_argnames=("lm", "before", "plan"))
def settle(lm: LanguageModel, before: Plan, plan: Plan, params: Any, cache: KVCache) -> KVCache:
    """The cache of `plan` with the entries of `cache`, a cache of `before` = `staged(plan)`, encoded.

    The model is called with one token of padding, for the RoPE tables of its layers alone.
    """
    new = ops.empty(plan).replace(
        length=cache.length,
        next_position=cache.next_position,
        expected=cache.expected,
        compressed=cache.compressed,
    )

    def attend(x: AttentionInputs, state: tuple) -> tuple[Array, tuple]:
        new, shared = state
        return jnp.zeros_like(x.q), _settle_layer(before, plan, cache, new, shared, x)

    nothing = jnp.zeros((plan.batch, 1), jnp.int32)
    return lm.hidden(params, nothing, nothing - 1, (new, (None, 0)), attend)[1][0]


def _settle_layer(
    before: Plan, plan: Plan, cache: KVCache, new: KVCache, shared: tuple, x: AttentionInputs
) -> tuple[KVCache, tuple]:
    """Layer `x.layer` of the new cache; shared: (pool, first free page) of layers that share one."""
    i = x.layer
    lp, entries = plan.layers[i], ops.view(before, cache, i)
    limit = cache.layers[i].limit
    if not lp.policy.codec.deferred:  # a sliding layer, whose codec is Plain in both
        index = ops.all_entries(entries.pos >= 0, min(lp.capacity, entries.pos.shape[2]))
        return ops.rebuild(plan, new, i, entries, index, limit)[0], shared
    index = ops.all_entries(entries.pos >= 0, entries.pos.shape[2])
    entries = View(entries.store, entries.pos, {})
    if not lp.shares_pool:
        return deferred.rebuild(plan, new, i, entries, index, limit, None, 0, x.inv_freq)[0], shared
    pool, page = shared
    pool = init(plan.pool_specs[lp.pool]) if pool is None else pool
    new, page = deferred.rebuild(plan, new, i, entries, index, limit, pool, page, x.inv_freq)
    return new, (new.pools[lp.pool], page)
