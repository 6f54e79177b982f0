"""The decoder that every family configures: pure functions over `Params`.

A model knows no cache: each layer hands its queries, keys and values to `attend`, which stores what it wants
in the opaque `cache` and returns the attention output (see `kvjax.types`). Layers are unrolled in Python, so
that each may own a different cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.types import AttendFn, AttentionInputs, Cache
from models import rope as rope_lib
from models.config import ModelConfig
from models.mlp import gated_mlp, mixture
from models.params import Layer, Mlp, Params

Array = jax.Array


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,  # int32 [batch, tokens]
    positions: Array,  # int32 [batch, tokens], -1 is padding
    cache: Cache,
    attend: AttendFn,
    *,
    last_only: bool = False,
) -> tuple[Array, Cache]:
    """f32 logits [batch, tokens, vocab] and the new cache.

    With `last_only`, logits [batch, 1, vocab] of the last token of each row: a prefill needs no others.
    """
    x, cache = hidden(params, config, tokens, positions, cache, attend)
    if last_only:
        x = last_token(x, positions)
    return logits(params, config, x), cache


def hidden(
    params: Params,
    config: ModelConfig,
    tokens: Array,  # int32 [batch, tokens]
    positions: Array,  # int32 [batch, tokens], -1 is padding
    cache: Cache,
    attend: AttendFn,
) -> tuple[Array, Cache]:
    """Hidden states [batch, tokens, embed] after the last norm, and the new cache.

    Padding tokens give finite values of no meaning and have no effect on other tokens.
    """
    with jax.named_scope("embed"):
        x = jnp.take(params.embedding, tokens, axis=0, mode="clip")
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
    ropes = _rope_tables(config, positions)
    for index, layer in enumerate(params.layers):
        with jax.named_scope(f"layer_{index}"):
            following = params.layers[index + 1] if index + 1 < config.layers else None
            x, cache = _block(layer, following, config, index, x, positions, ropes, cache, attend)
    return rms_norm(x, params.final_norm, config), cache


def last_token(x: Array, positions: Array) -> Array:
    """[batch, 1, embed]: of x [batch, tokens, embed] each row's token with the highest position."""
    return jnp.take_along_axis(x, jnp.argmax(positions, axis=1)[:, None, None], axis=1)


def logits(params: Params, config: ModelConfig, x: Array) -> Array:
    """f32 logits [batch, tokens, vocab] of hidden states [batch, tokens, embed]."""
    with jax.named_scope("logits"):
        head = params.embedding if params.head is None else params.head
        out = jnp.einsum("bte,ve->btv", x, head, preferred_element_type=jnp.float32)
        if config.final_softcap is not None:
            out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out


def rms_norm(x: Array, weight: Array, config: ModelConfig) -> Array:
    """RMS norm over the last axis, in float32; returns x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    scale = weight.astype(jnp.float32)
    return (y * (1.0 + scale if config.unit_offset_norm else scale)).astype(x.dtype)


def causal_attend(inputs: AttentionInputs, cache: Cache) -> tuple[Array, Cache]:
    """Full attention among the tokens given, for tests and for models used without a cache."""
    queries, keys = inputs.positions[:, :, None], inputs.positions[:, None, :]
    mask = (keys >= 0) & (keys <= queries)
    if inputs.window is not None:
        mask &= queries - keys < inputs.window
    return masked_attention(inputs, inputs.k, inputs.v, mask[:, None, None]), cache


def masked_attention(inputs: AttentionInputs, k: Array, v: Array, mask: Array) -> Array:
    """Attention [batch, q_heads, tokens, head_dim] over k, v [batch, kv_heads, slots, head_dim].

    `mask` (True: visible) broadcasts to [batch, kv_heads, group, tokens, slots]. The softmax is in float32.
    """
    batch, q_heads, tokens, dim = inputs.q.shape
    kv_heads = k.shape[1]
    q = inputs.q.reshape(batch, kv_heads, q_heads // kv_heads, tokens, dim)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * jnp.tanh(scores / inputs.softcap)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)  # finite: a padded query sees nothing
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksd->bkgtd", probs, v).reshape(inputs.q.shape)


def _rope_tables(config: ModelConfig, positions: Array) -> dict[Any, tuple[np.ndarray, Array, Array]]:
    """(inv_freq, cos, sin) of each distinct rope; Gemma 3 has two, every other family one."""
    tables = {}
    with jax.named_scope("rope"):
        for rope in dict.fromkeys(config.ropes):
            freq = rope_lib.inv_freq(rope, config.head_dim, config.max_context)
            tables[rope] = (freq, *rope_lib.cos_sin(rope, freq, positions))
    return tables


def _block(
    layer: Layer,
    following: Layer | None,  # the next one
    config: ModelConfig,
    index: int,
    x: Array,
    positions: Array,
    ropes: dict[Any, tuple[np.ndarray, Array, Array]],
    cache: Cache,
    attend: AttendFn,
) -> tuple[Array, Cache]:
    with jax.named_scope("attention"):
        h = rms_norm(x, layer.attention_norm, config)
        inputs = _attention_inputs(layer, config, index, h, positions, ropes[config.ropes[index]])
        if following is not None:
            tables = ropes[config.ropes[index + 1]]
            # All of the projection, though only q may be asked for: a slice of the weights would be copied at every step.
            inputs = inputs.replace(
                ahead=lambda: _attention_inputs(following, config, index + 1, h, positions, tables)
            )
        out, cache = attend(inputs, cache)
        # Tokens before heads here, or XLA would transpose the weight instead.
        y = jnp.einsum("bthd,hde->bte", out.astype(x.dtype).swapaxes(1, 2), layer.wo)
        if layer.out_bias is not None:
            y = y + layer.out_bias
        if layer.attention_post_norm is not None:
            y = rms_norm(y, layer.attention_post_norm, config)
        x = x + y
    with jax.named_scope("mlp"):
        h = rms_norm(x, layer.mlp_norm, config)
        y = gated_mlp(layer.mlp, h, config) if isinstance(layer.mlp, Mlp) else mixture(layer.mlp, h, config)
        if layer.mlp_post_norm is not None:
            y = rms_norm(y, layer.mlp_post_norm, config)
    return x + y, cache


def _attention_inputs(
    layer: Layer,
    config: ModelConfig,
    index: int,
    h: Array,  # [batch, tokens, embed]
    positions: Array,
    tables: tuple[np.ndarray, Array, Array],
) -> AttentionInputs:
    freq, cos, sin = tables
    batch, tokens, _ = h.shape
    qkv = jnp.einsum("bte,ekgd->btkgd", h, layer.qkv)
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias
    qkv = qkv.transpose(0, 2, 3, 1, 4)  # [batch, kv_heads, group + 2, tokens, head_dim]
    q = qkv[:, :, :-2].reshape(batch, config.q_heads, tokens, config.head_dim)
    k, v = qkv[:, :, -2], qkv[:, :, -1]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, config), rms_norm(k, layer.k_norm, config)
    return AttentionInputs(
        q=rope_lib.rotate(q, cos, sin),
        k=rope_lib.rotate(k, cos, sin),
        v=v,
        positions=positions,
        hidden=h,
        wo=layer.wo,
        inv_freq=jnp.asarray(freq),
        layer=index,
        scale=config.attention_scale,
        window=config.windows[index],
        softcap=config.attention_softcap,
    )
