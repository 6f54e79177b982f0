"""Attention over everything that a layer stores: encoded slots, and the window of a deferred codec."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache import deferred, ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache
from kvjax.codecs.blocked import blocked_attention
from kvjax.sharded_kernels import decode_attention
from kvjax.types import AttentionInputs
from pallas_kernels.formats import KVStore
from pallas_kernels.merge_partials import merge_partials

Array = jax.Array


def stored_positions(plan: Plan, cache: KVCache, i: int) -> Array:
    """int32 [batch, kv_heads, slots]: positions of everything layer i holds, windows included; -1 = empty."""
    if cache.layers[i].residual is None:
        return ops.view(plan, cache, i).pos
    return jnp.concatenate(deferred.positions(plan, cache, i), axis=-1)


def stored_attention(
    plan: Plan,
    cache: KVCache,
    x: AttentionInputs,
    *,
    return_mass: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array | None]:
    """(out [batch, q_heads, tokens, head_dim] in q's dtype, mass f32 [batch, q_heads, slots] or None).

    Every stored entry is visible. One fused kernel where the codec has one for its whole state; otherwise two
    partial results, of the encoded slots and of the window, merged by their log-sum-exp.
    """
    i = x.layer
    codec, layer = plan.layers[i].policy.codec, cache.layers[i]
    pool, res = cache.pools[plan.layers[i].pool], layer.residual
    common = dict(scale=x.scale, softcap=x.softcap, implementation=implementation)
    fused = codec.kv_store(pool.store)
    if fused is not None and not codec.rotates:
        if res is not None:
            fused = dataclasses.replace(fused, k_res=res.k, v_res=res.v, res_lengths=res.count)
        result = decode_attention(
            x.q, fused, lengths=layer.fill, table=layer.table, return_mass=return_mass, **common
        )
        return (result.out, result.mass) if return_mass else (result, None)  # type: ignore[return-value]
    if fused is not None:
        q = codec.rotate_query(x.q)
        part = decode_attention(q, fused, lengths=layer.fill, table=layer.table, return_lse=True, **common)
        out, lse, mass = codec.unrotate_out(part.out), part.lse, None
    else:
        slots = plan.layers[i].capacity if layer.table is None else plan.page(codec)
        before = None
        if codec.predicts:
            known = ops.context(plan, i - 1, None, x.inv_freq)
            last = plan.layers[i - 1]
            before = (last.policy.codec, cache.pools[last.pool].store, known)
        out, lse, mass = blocked_attention(
            x.q,
            codec,
            pool.store,
            lengths=layer.fill,
            pos=pool.pos,
            table=layer.table,
            slots=slots,
            ctx=ops.context(plan, i, None, x.inv_freq),
            dtype=plan.shape.dtype,
            scale=x.scale,
            softcap=x.softcap,
            return_mass=return_mass,
            before=before,
        )
    if res is None:
        return out.astype(x.q.dtype), mass
    late = decode_attention(x.q, KVStore(res.k, res.v), lengths=res.count, return_lse=True, **common)
    with jax.named_scope("merge"):
        merged = merge_partials(jnp.stack([out, late.out]), jnp.stack([lse, late.lse]))[0]
    return merged.astype(x.q.dtype), None
