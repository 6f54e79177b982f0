"""The plainest cache there is: every key and value, stored at the index of its position."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.types import AttentionInputs
from models import decoder
from models.config import ModelConfig


def init(config: ModelConfig, batch: int, slots: int, dtype=jnp.float32):
    """Per layer (k, v), each [batch, kv_heads, slots, head_dim]."""
    shape = (batch, config.kv_heads, slots, config.head_dim)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def attend(inputs: AttentionInputs, cache):
    """Stores the new tokens, then attends over all stored positions up to each query's own."""
    k, v = cache[inputs.layer]
    slots = k.shape[2]
    rows = jnp.arange(k.shape[0])[:, None]
    index = jnp.where(inputs.positions >= 0, inputs.positions, slots)  # padding falls off the end
    k = k.at[rows, :, index].set(inputs.k.transpose(0, 2, 1, 3), mode="drop")
    v = v.at[rows, :, index].set(inputs.v.transpose(0, 2, 1, 3), mode="drop")
    queries, keys = inputs.positions[:, :, None], jnp.arange(slots)[None, None]
    mask = keys <= queries
    if inputs.window is not None:
        mask &= queries - keys < inputs.window
    out = decoder.masked_attention(inputs, k, v, mask[:, None, None])
    return out, (*cache[: inputs.layer], (k, v), *cache[inputs.layer + 1 :])
