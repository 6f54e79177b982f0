"""Plain types shared by the models and the cache: the shape of a model, and what a layer hands to attention.

A model knows nothing about caches. For every attention layer it builds one `AttentionInputs` and calls

    out, cache = attend(inputs, cache)

where `attend` is an `AttendFn`. kvjax supplies the functions that prefill, extend and decode; a test may
supply plain causal attention. `cache` is an opaque pytree to the model: it only threads it through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import struct

Array = jax.Array
Cache = Any


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the cache must know of a model. Hashable, so that it can be a static argument of `jit`."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[
        int | None, ...
    ]  # per layer: sliding window in tokens (a query sees itself and window-1 before)
    dtype: str = "float32"  # dtype of keys and values before any codec
    max_context: int = 8192
    weights: str = ""  # digest of the weights: calibration files of other weights are refused; '' = unknown

    def __post_init__(self) -> None:
        if len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads={self.q_heads} is not a multiple of kv_heads={self.kv_heads}")


@struct.dataclass
class AttentionInputs:
    """One attention layer's operands for `tokens` new tokens of each row. Heads come before tokens everywhere."""

    q: Array  # [batch, q_heads, tokens, head_dim], after RoPE
    k: Array  # [batch, kv_heads, tokens, head_dim], after RoPE
    v: Array  # [batch, kv_heads, tokens, head_dim]
    positions: Array  # int32 [batch, tokens]; -1 marks padding; increasing along a row
    hidden: Array | None = None  # [batch, tokens, embed], input of the q/k/v projections (after the norm)
    wo: Array | None = None  # [q_heads, head_dim, embed], output projection
    inv_freq: Array | None = None  # f32 [rotary_dim // 2]; RoPE turns channels i and i + rotary_dim // 2
    # The next layer's operands, if this layer's input were its input too; None in the last layer.
    ahead: Callable[[], AttentionInputs] | None = struct.field(pytree_node=False, default=None)
    layer: int = struct.field(pytree_node=False, default=0)
    scale: float = struct.field(pytree_node=False, default=1.0)  # logits = scale * q.k
    window: int | None = struct.field(pytree_node=False, default=None)  # sliding window in tokens
    softcap: float | None = struct.field(pytree_node=False, default=None)  # logits = cap * tanh(logits / cap)


AttendFn = Callable[[AttentionInputs, Cache], tuple[Array, Cache]]
"""`(inputs, cache) -> (out [batch, q_heads, tokens, head_dim], cache)`."""
