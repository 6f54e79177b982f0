"""The gated MLP, plain and as a mixture of experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.params import Mlp, Moe

Array = jax.Array


def gated_mlp(mlp: Mlp, x: Array, config: ModelConfig) -> Array:
    """[batch, tokens, embed] -> the same."""
    gate_up = jnp.einsum("bte,enf->btnf", x, mlp.gate_up)
    return jnp.einsum("btf,fe->bte", _gated(gate_up[..., 0, :], gate_up[..., 1, :], config), mlp.down)


def mixture(moe: Moe, x: Array, config: ModelConfig) -> Array:
    """Each token's `top_k` experts, weighted by the router; [batch, tokens, embed] -> the same."""
    settings = config.moe
    assert settings is not None
    weights, chosen = _route(moe, x, config)
    compute = _ragged if settings.dispatch == "ragged" else _dense
    out = compute(moe, x, weights, chosen, config)
    if moe.shared is not None:
        gate = jax.nn.sigmoid(jnp.einsum("bte,e->bt", x, moe.shared_gate))
        out = out + gate[..., None] * gated_mlp(moe.shared, x, config)
    return out


def _gated(gate: Array, up: Array, config: ModelConfig) -> Array:
    """act(gate) * up."""
    act = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return act * up


def _route(moe: Moe, x: Array, config: ModelConfig) -> tuple[Array, Array]:
    """f32 weights and int32 expert ids, each [batch, tokens, top_k]."""
    settings = config.moe
    assert settings is not None
    scores = jnp.einsum("bte,ex->btx", x, moe.router, preferred_element_type=jnp.float32)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), settings.top_k)
    if settings.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def _ragged(moe: Moe, x: Array, weights: Array, chosen: Array, config: ModelConfig) -> Array:
    """Sorts (token, expert) pairs by expert and multiplies each group by its expert's weights."""
    experts, embed, _ = moe.gate.shape
    top_k = chosen.shape[-1]
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    rows = x.reshape(-1, embed)[order // top_k]  # [batch * tokens * top_k, embed]
    gate, up = (jax.lax.ragged_dot(rows, w, sizes) for w in (moe.gate, moe.up))
    out = jax.lax.ragged_dot(_gated(gate, up, config), moe.down, sizes)
    out = out * weights.reshape(-1)[order, None].astype(x.dtype)
    unsorted = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
    return unsorted.reshape(*x.shape[:2], top_k, embed).sum(axis=2)


def _dense(moe: Moe, x: Array, weights: Array, chosen: Array, config: ModelConfig) -> Array:
    """Every expert for every token, weighted by 0 where it was not chosen."""
    one_hot = jax.nn.one_hot(chosen, moe.gate.shape[0], dtype=jnp.float32)
    share = jnp.einsum("btk,btkx->btx", weights, one_hot).astype(x.dtype)
    gate, up = (jnp.einsum("bte,xef->btxf", x, w) for w in (moe.gate, moe.up))
    return jnp.einsum("btxf,xfe->bte", _gated(gate, up, config) * share[..., None], moe.down)
