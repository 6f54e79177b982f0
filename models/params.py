"""The weights of a decoder, declared once: shape, logical axes and initial scale of every array.

The abstract values, the logical axes (from which shardings are derived) and the random initialiser all come
from the same declaration. Query, key and value projections are one array, grouped by KV head, and gate and up
projections are one array, so that a decode step reads each layer's weights in four matrix products; both
still partition along "kv_heads" and "mlp".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.config import ModelConfig

Array = jax.Array
ShardingFn = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.Sharding]
"""`(logical axes, shape) -> where the array lives`."""


@struct.dataclass
class Mlp:
    """A gated MLP."""

    gate_up: Array  # [embed, 2, mlp]: gate, then up
    down: Array  # [mlp, embed]


@struct.dataclass
class Moe:
    """A mixture of gated MLPs, with Qwen2-MoE's shared expert if the model has one."""

    router: Array  # [embed, experts]
    gate: Array  # [experts, embed, mlp]
    up: Array  # [experts, embed, mlp]
    down: Array  # [experts, mlp, embed]
    shared: Mlp | None = None
    shared_gate: Array | None = None  # [embed]


@struct.dataclass
class Layer:
    """One decoder layer. Norm weights of absent norms, and absent biases, are None."""

    # [embed, kv_heads, group + 2, head_dim]: of each KV head its `group` query heads, then key, then value
    qkv: Array
    wo: Array  # [q_heads, head_dim, embed]
    mlp: Mlp | Moe
    attention_norm: Array  # [embed]
    mlp_norm: Array  # [embed]
    qkv_bias: Array | None = None  # [kv_heads, group + 2, head_dim]
    out_bias: Array | None = None  # [embed]
    q_norm: Array | None = None  # [head_dim]
    k_norm: Array | None = None  # [head_dim]
    attention_post_norm: Array | None = None  # [embed]
    mlp_post_norm: Array | None = None  # [embed]


@struct.dataclass
class Params:
    """All weights of a decoder."""

    embedding: Array  # [vocab, embed]
    layers: tuple[Layer, ...]
    final_norm: Array  # [embed]
    head: Array | None = None  # [vocab, embed]; None: the embedding is used


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Declares one array."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int = 0  # random init has variance 1 / fan_in; 0: the identity of a norm, or the zero of a bias


def declare(config: ModelConfig) -> Any:
    """`Params` whose leaves are `ParamSpec`."""
    table = _spec((config.vocab_size, config.embed_dim), ("vocab", "embed"), config.embed_dim)
    return Params(
        embedding=table,
        layers=tuple(_layer(config, i) for i in range(config.layers)),
        final_norm=_vector(config),
        head=None if config.tied else table,
    )


def _spec(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int = 0) -> Any:
    """A `ParamSpec` that stands where the dataclasses above say Array."""
    return ParamSpec(shape, axes, fan_in)


def _vector(config: ModelConfig) -> Any:
    return _spec((config.embed_dim,), ("embed",))


def _layer(config: ModelConfig, layer: int) -> Any:
    c = config
    kv, slots, dim = c.kv_heads, c.q_heads // c.kv_heads + 2, c.head_dim
    head_norm = _spec((dim,), ("head_dim",)) if c.qk_norm else None
    post = _vector(c) if c.post_norms else None
    qkv_axes = ("kv_heads", None, "head_dim")
    return Layer(
        qkv=_spec((c.embed_dim, kv, slots, dim), ("embed", *qkv_axes), c.embed_dim),
        qkv_bias=_spec((kv, slots, dim), qkv_axes) if c.qkv_bias else None,
        wo=_spec((c.q_heads, dim, c.embed_dim), ("q_heads", "head_dim", "embed"), c.q_heads * dim),
        out_bias=_vector(c) if c.out_bias else None,
        mlp=_moe(c) if c.has_experts(layer) else _mlp(c, c.mlp_dim),
        attention_norm=_vector(c),
        mlp_norm=_vector(c),
        q_norm=head_norm,
        k_norm=head_norm,
        attention_post_norm=post,
        mlp_post_norm=post,
    )


def _mlp(config: ModelConfig, mlp_dim: int) -> Any:
    e = config.embed_dim
    return Mlp(
        gate_up=_spec((e, 2, mlp_dim), ("embed", None, "mlp"), e),
        down=_spec((mlp_dim, e), ("mlp", "embed"), mlp_dim),
    )


def _moe(config: ModelConfig) -> Any:
    moe, e = config.moe, config.embed_dim
    assert moe is not None
    return Moe(
        router=_spec((e, moe.experts), ("embed", None), e),
        gate=_spec((moe.experts, e, moe.mlp_dim), ("experts", "embed", "mlp"), e),
        up=_spec((moe.experts, e, moe.mlp_dim), ("experts", "embed", "mlp"), e),
        down=_spec((moe.experts, moe.mlp_dim, e), ("experts", "mlp", "embed"), moe.mlp_dim),
        shared=_mlp(config, moe.shared_mlp_dim) if moe.shared_mlp_dim else None,
        shared_gate=_vector(config) if moe.shared_mlp_dim else None,
    )


def param_axes(config: ModelConfig) -> Params:
    """Logical axis names of every weight: a tuple of str or None per array dimension.

    Map it together with `param_specs` first, `jax.tree.map(f, param_specs(...), param_axes(...))`, so that
    the tuples arrive whole.
    """
    return jax.tree.map(lambda spec: spec.axes, declare(config))


def param_specs(config: ModelConfig, dtype: Any) -> Params:
    """`jax.ShapeDtypeStruct` of every weight."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype)), declare(config))


def init_params(config: ModelConfig, key: Array, dtype: Any, sharding: ShardingFn | None = None) -> Params:
    """Random weights, for benchmarks and tests: normal with variance 1 / fan_in, norms the identity.

    One small program per distinct shape, so that an 80-layer model compiles no longer than one layer;
    `sharding` maps (logical axes, shape) to where an array is made.
    """
    specs, tree = jax.tree.flatten(declare(config))
    norm = 0.0 if config.unit_offset_norm else 1.0

    def one(leaf_key: Array, spec: ParamSpec) -> Array:
        where = sharding(spec.axes, spec.shape) if sharding else None
        return _random(leaf_key, dataclasses.replace(spec, axes=()), jnp.dtype(dtype), where, norm)

    return jax.tree.unflatten(tree, [one(k, s) for k, s in zip(jax.random.split(key, len(specs)), specs)])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random(
    key: Array, spec: ParamSpec, dtype: Any, where: jax.sharding.Sharding | None, norm: float
) -> Array:
    if spec.fan_in:
        value = jax.random.normal(key, spec.shape, dtype) * jnp.asarray(spec.fan_in**-0.5, dtype)
    else:
        value = jnp.full(spec.shape, norm if len(spec.shape) == 1 else 0.0, dtype)
    return value if where is None else jax.lax.with_sharding_constraint(value, where)


def split_qkv(layer: Layer) -> tuple[Array, Array, Array]:
    """Views of the fused projection: q [embed, q_heads, head_dim], k and v [embed, kv_heads, head_dim]."""
    embed, kv, slots, dim = layer.qkv.shape
    q = layer.qkv[:, :, :-2].reshape(embed, kv * (slots - 2), dim)
    return q, layer.qkv[:, :, -2], layer.qkv[:, :, -1]
