"""Attention over everything that a layer stores: encoded slots, and the window of a deferred codec."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache import deferred, ops, placing, selecting
from kvjax.cache.plan import Plan
from kvjax.cache.state import Fetched, KVCache
from kvjax.codecs.blocked import blocked_attention
from kvjax.sharded_kernels import decode_attention, fuses
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
    return_lse: bool = False,
    blocks: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array | None]:
    """(out [batch, q_heads, tokens, head_dim] in q's dtype, mass f32 [batch, q_heads, slots] or None).

    Every stored entry is visible; with `blocks` int32 [batch, kv_heads, n], only those of these blocks (of
    `plan.block(i)` slots) and of the window. One fused kernel where the codec has one for its whole state; otherwise two
    partial results, of the encoded slots and of the window, merged by their log-sum-exp. return_lse: (out f32, lse f32
    [batch, q_heads, tokens]) instead.
    """
    i = x.layer
    codec, layer = plan.layers[i].policy.codec, cache.layers[i]
    res, tables = layer.residual, {}
    part = _whole(plan, cache, i) if blocks is None or not placing.offloaded(plan, i) else None
    common = dict(scale=x.scale, softcap=x.softcap, implementation=implementation)
    fused = None if part is None else codec.kv_store(part.store)
    if blocks is not None:
        tables = dict(blocks=blocks, block_size=plan.block(i), blocks_ascend=True)
        if (
            part is None
            or fused is None
            or not fuses(x.q, fused, lengths=part.lengths, table=part.table, **tables, **common)
        ):
            part, tables = _chosen(plan, cache, i, blocks), {}
            fused = codec.kv_store(part.store)
    common.update(tables)
    if fused is not None and not codec.rotates:
        if res is not None:
            fused = dataclasses.replace(fused, k_res=res.k, v_res=res.v, res_lengths=res.count)
        result = decode_attention(
            x.q,
            fused,
            lengths=part.lengths,
            table=part.table,
            return_mass=return_mass,
            return_lse=return_lse,
            **common,
        )
        if return_lse:
            return result.out, result.lse
        return (result.out, result.mass) if return_mass else (result, None)  # type: ignore[return-value]
    if fused is not None:
        q = codec.rotate_query(x.q)
        got = decode_attention(q, fused, lengths=part.lengths, table=part.table, return_lse=True, **common)
        out, lse, mass = codec.unrotate_out(got.out), got.lse, None
    else:
        before = None
        if codec.predicts:
            known = ops.context(plan, i - 1, None, x.inv_freq)
            last = _whole(plan, cache, i - 1) if blocks is None else _chosen(plan, cache, i - 1, blocks)
            before = (plan.layers[i - 1].policy.codec, last.store, known)
        out, lse, mass = blocked_attention(
            x.q,
            codec,
            part.store,
            lengths=part.lengths,
            pos=part.pos,
            table=part.table,
            slots=part.slots,
            ctx=ops.context(plan, i, None, x.inv_freq),
            dtype=plan.shape.dtype,
            scale=x.scale,
            softcap=x.softcap,
            return_mass=return_mass,
            before=before,
        )
    if res is None:
        return (out, lse) if return_lse else (out.astype(x.q.dtype), mass)
    plain = dict(scale=x.scale, softcap=x.softcap, implementation=implementation)
    late = decode_attention(x.q, KVStore(res.k, res.v), lengths=res.count, return_lse=True, **plain)
    with jax.named_scope("merge"):
        merged, total = merge_partials(jnp.stack([out, late.out]), jnp.stack([lse, late.lse]))
    return (merged, total) if return_lse else (merged.astype(x.q.dtype), None)


class _Part(NamedTuple):
    """Encoded slots of a layer, or some of them, as attention reads them."""

    store: dict[str, Array]
    pos: Array | None
    lengths: Array  # int32 [batch, kv_heads]
    table: Array | None
    slots: int  # per head (Dense) or per page (Ragged)


def _whole(plan: Plan, cache: KVCache, i: int) -> _Part:
    lp, layer = plan.layers[i], cache.layers[i]
    pool = cache.pools[lp.pool]
    slots = lp.capacity if layer.table is None else plan.page(lp.policy)
    store = pool.store if pool.host is None else placing.whole_store(plan, cache, i)
    return _Part(store, pool.pos, layer.fill, layer.table, slots)


def _chosen(plan: Plan, cache: KVCache, i: int, blocks: Array) -> _Part:
    """The chosen blocks, gathered side by side."""
    with jax.named_scope("gather"):
        store, pos, lengths = selecting.gather(plan, cache, i, blocks)
    if pos is None:
        pos = plan.layers[i].policy.codec.sink + selecting.slot_numbers(blocks, plan.block(i))
    return _Part(store, pos, lengths, None, blocks.shape[2] * plan.block(i))


def _arrived(
    plan: Plan, cache: KVCache, x: AttentionInputs, fetched: Fetched
) -> tuple[AttentionInputs, KVCache, Array]:
    """(x, the cache with the blocks on the device, their table).

    What a fetch reads is in use until this layer has its queries: or what computes them could take its place in memory, and
    would wait for the fetch.
    """
    i = x.layer
    index = cache.layers[i].index
    held = {n: a for n, a in index.items() if n.startswith("held")}
    q, fetched, held = jax.lax.optimization_barrier((x.q, fetched, held))
    layers = list(cache.layers)
    layers[i] = layers[i].replace(index={**index, **held})
    cache = placing.put(plan, cache.replace(layers=tuple(layers)), i, fetched)
    return x.replace(q=q), cache, fetched.table


def selected_attention(
    plan: Plan,
    cache: KVCache,
    x: AttentionInputs,
    *,
    return_lse: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array | None, KVCache]:
    """(out [batch, q_heads, 1, head_dim] in q's dtype, None, cache): attention over what the layer's selector chooses.

    Where `Foreseen.fetched` is given, `selecting.choose_ahead` has chosen and fetched. return_lse: (out f32, lse f32 [batch,
    q_heads, 1], cache).
    """
    selector = plan.layers[x.layer].policy.selector
    if cache.ahead is not None and cache.ahead.fetched is not None:
        with jax.named_scope("fetch"):
            x, cache, blocks = _arrived(plan, cache, x, cache.ahead.fetched)
    else:
        with jax.named_scope("select"):
            blocks, cache = selecting.choose(plan, cache, x)
        if placing.offloaded(plan, x.layer):
            with jax.named_scope("fetch"):
                cache = selecting.fetch(plan, cache, x, blocks)
    if not (selector.biased or selector.estimates):
        out, lse = stored_attention(
            plan, cache, x, blocks=blocks, return_lse=return_lse, implementation=implementation
        )
        return out, lse if return_lse else None, cache
    if selector.biased:
        out, lse = _biased_attention(plan, cache, x, blocks)
    else:
        out, lse = stored_attention(
            plan, cache, x, blocks=blocks, return_lse=True, implementation=implementation
        )
    rest = selecting.estimate(plan, cache, x, blocks)
    if rest is not None:
        with jax.named_scope("merge"):
            out, lse = merge_partials(jnp.stack([out, rest[0]]), jnp.stack([lse, rest[1]]))
    return (out, lse, cache) if return_lse else (out.astype(x.q.dtype), None, cache)


def _biased_attention(plan: Plan, cache: KVCache, x: AttentionInputs, blocks: Array) -> tuple[Array, Array]:
    """(out f32 [batch, q_heads, 1, head_dim], lse f32 [batch, q_heads, 1]) with the selector's bias on chosen slots."""
    i, codec = x.layer, plan.layers[x.layer].policy.codec
    part = _chosen(plan, cache, i, blocks)
    slots = selecting.slot_numbers(blocks, plan.block(i))
    valid = jnp.arange(part.slots) < part.lengths[..., None]
    ctx = ops.context(plan, i, part.pos, x.inv_freq)
    if codec.predicts:
        ctx = ctx.replace(previous=deferred.previous(plan, cache, i, slots, part.pos, x.inv_freq))
    k, v = codec.decode(part.store, plan.shape.dtype, ctx)
    bias = selecting.bias(plan, cache, x, jnp.where(valid, slots, -1))
    res = cache.layers[i].residual
    if res is not None:
        k, v = jnp.concatenate([k, res.k], axis=2), jnp.concatenate([v, res.v], axis=2)
        waiting = jnp.arange(res.k.shape[2]) < res.count[..., None]
        valid = jnp.concatenate([valid, waiting], axis=2)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, res.k.shape[2])))
    b, heads, _, d = x.q.shape
    q = x.q.reshape(b, k.shape[1], -1, d).astype(jnp.float32)
    logits = jnp.einsum("bhgd,bhnd->bhgn", q, k.astype(jnp.float32), precision="highest") * x.scale
    if x.softcap is not None:
        logits = x.softcap * jnp.tanh(logits / x.softcap)
    logits = jnp.where(valid[:, :, None], logits + bias.reshape(logits.shape), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
    v = jnp.where(valid[..., None], v, 0).astype(jnp.float32)
    out = jnp.einsum("bhgn,bhnd->bhgd", p, v, precision="highest")
    return out.reshape(b, heads, 1, d), lse.reshape(b, heads, 1)
