"""Quantizers of one tensor, keys or values; `Pair` makes a codec of two of them.

A quantizer maps x f32 [batch, kv_heads, slots, head_dim] to fields with the slots on axis 2, and back. Those that
look at several tokens at once declare `unit`. Wrappers (rotations, outliers, low rank, tiers) nest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import packing, transforms
from kvjax.codecs.base import NO_CONTEXT, Codec, Context, Field, Store
from kvjax.types import ModelShape

Array = jax.Array
META = "float16"  # dtype of scales and zeros


class Quantizer:
    """Base class; instances are frozen dataclasses."""

    unit: int = 1  # slots that are encoded together

    def fields(self, dim: int) -> dict[str, Field]:
        """Stored fields for `dim` channels."""
        raise NotImplementedError

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """x f32 [batch, kv_heads, slots, dim] -> fields."""
        raise NotImplementedError

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """Fields -> f32 [batch, kv_heads, slots, dim]."""
        raise NotImplementedError

    def for_layer(self, layer: int, shape: ModelShape, side: str) -> Quantizer:
        """The quantizer of one layer; side is 'k' or 'v'."""
        return self

    def constants(self, layer: int, shape: ModelShape, side: str) -> dict[str, np.ndarray]:
        """Calibration arrays of one layer, each [kv_heads, ...]."""
        return {}


def _prefixed(prefix: str, items: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: x for name, x in items.items()}


def _strip(prefix: str, items: dict[str, Any]) -> dict[str, Any]:
    return {name[len(prefix) :]: x for name, x in items.items() if name.startswith(prefix)}


def enter(ctx: Context, prefix: str) -> Context:
    """The context of a nested quantizer: its constants lose the prefix."""
    return ctx.replace(const=_strip(prefix, ctx.const))


@dataclasses.dataclass(frozen=True)
class Pair(Codec):
    """Keys by one quantizer, values by another. pre_rope: keys are encoded as they were before RoPE.

    scorer: supplies `Context.saliency` of a prompt, for quantizers that give salient tokens more bits.
    """

    k: Quantizer
    v: Quantizer
    residual: int = 0
    sink: int = 0
    pre_rope: bool = False
    scorer: Any = None

    @property
    def self_contained(self) -> bool:
        """Unless keys lose their RoPE first, or tokens are ranked."""
        return not self.pre_rope and self.scorer is None

    @property
    def group(self) -> int:  # type: ignore[override]
        """Tokens encoded at once."""
        return math.lcm(self.k.unit, self.v.unit)

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """Both quantizers' fields, named k_... and v_..."""
        return _prefixed("k_", self.k.fields(head_dim)) | _prefixed("v_", self.v.fields(head_dim))

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        if self.pre_rope and ctx.inv_freq is not None:
            k = transforms.rope(k, ctx.pos, ctx.inv_freq, inverse=True)
        keys = self.k.encode(k, enter(ctx, "k_"))
        return _prefixed("k_", keys) | _prefixed("v_", self.v.encode(v, enter(ctx, "v_")))

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """See the class."""
        dim = ctx.head_dim
        k = self.k.decode(_strip("k_", store), dim, enter(ctx, "k_"))
        v = self.v.decode(_strip("v_", store), dim, enter(ctx, "v_"))
        if self.pre_rope and ctx.inv_freq is not None:
            k = transforms.rope(k, ctx.pos, ctx.inv_freq)
        return k.astype(dtype), v.astype(dtype)

    def for_layer(self, layer: int, shape: ModelShape) -> Pair:
        """Quantizers of one layer."""
        k, v = self.k.for_layer(layer, shape, "k"), self.v.for_layer(layer, shape, "v")
        return dataclasses.replace(self, k=k, v=v)

    def constants(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        """Both quantizers' arrays."""
        keys = _prefixed("k_", self.k.constants(layer, shape, "k"))
        return keys | _prefixed("v_", self.v.constants(layer, shape, "v"))


def _groups(dim: int, group: int, what: str) -> int:
    if group < 1 or dim % group:
        raise ValueError(f"{what}: head_dim={dim} is not whole groups of {group} channels")
    return dim // group


@dataclasses.dataclass(frozen=True)
class Affine(Quantizer):
    """Uniform codes with a scale, and unless symmetric a zero, per group.

    axis 'token': `group` channels of a token share them (0: all channels). axis 'channel': `group` tokens of a
    channel do, and are encoded together. Asymmetric: x' = c * s + m, m = min, s = (max - min) / (2^bits - 1),
    |x - x'| <= s / 2 up to the rounding of s and m. Symmetric: s = max|x| / (2^(bits-1) - 1). clip shrinks the
    range. scale: dtype of s; zero: dtype of m, or 'int8' for m as a multiple of s. A constant group has s = 1.
    """

    bits: int = 4
    group: int = 0
    axis: str = "token"
    symmetric: bool = False
    clip: float = 1.0
    scale: str = META
    zero: str = META

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return self.group if self.axis == "channel" else 1

    def fields(self, dim: int) -> dict[str, Field]:
        """codes, scale and zero."""
        if not 1 <= self.bits <= 8 or (self.symmetric and self.bits < 2):
            raise ValueError(f"affine codes have 1 to 8 bits (symmetric 2 to 8), got {self.bits}")
        out = {"codes": Field((packing.packed_bytes(dim, self.bits),), "uint8")}
        names = {"scale": self.scale} if self.symmetric else {"scale": self.scale, "zero": self.zero}
        for name, dtype in names.items():
            if self.axis == "channel":
                out[name] = Field((dim,), dtype, per=self.group)
            else:
                out[name] = Field((_groups(dim, self.group or dim, "affine"),), dtype)
        return out

    def _split(self, x: Array) -> tuple[Array, int]:
        b, h, n, d = x.shape
        if self.axis == "channel":
            return x.reshape(b, h, n // self.group, self.group, d), 3
        group = self.group or d
        return x.reshape(b, h, n, d // group, group), 4

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        y, axis = self._split(x)
        # A minimum may skip NaN, a sum may not: a value that is not finite must show in the stored zero or scale.
        bad = jnp.sum(y * 0.0, axis, keepdims=True)
        low, high = y.min(axis, keepdims=True) + bad, y.max(axis, keepdims=True) + bad
        mid, half = (low + high) / 2, (high - low) / 2 * self.clip
        low, high = (mid - half, mid + half) if self.clip < 1.0 else (low, high)
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            scale = _storable(jnp.maximum(-low, high) / top, self.scale)
            codes = jnp.clip(jnp.round(y / scale), -top, top) + top
            store = {"scale": scale}
        else:
            top = 2**self.bits - 1
            step = (high - low) / top
            if self.zero == "int8":
                # A constant group is one step from zero, a distant one 112: a byte, with room for an fp8 scale's rounding.
                step = jnp.where(step == 0, jnp.abs(low), jnp.maximum(step, jnp.abs(low) / 112))
            scale = _storable(step, self.scale)
            if self.zero == "int8":
                zero = jnp.clip(jnp.round(low / scale), -128, 127)
                codes = jnp.round(y / scale) - zero
            else:
                zero = low.astype(self.zero).astype(jnp.float32)
                codes = jnp.round((y - zero) / scale)
            codes = jnp.clip(codes, 0, top)
            store = {"scale": scale, "zero": zero}
        dtypes = {"scale": self.scale, "zero": self.zero}
        out = {name: jnp.squeeze(s, axis).astype(dtypes[name]) for name, s in store.items()}
        return {"codes": packing.pack(codes.reshape(x.shape).astype(jnp.int32), self.bits), **out}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        codes = packing.unpack(store["codes"], self.bits, dim).astype(jnp.float32)
        y, axis = self._split(codes)
        scale = jnp.expand_dims(store["scale"].astype(jnp.float32), axis)
        if self.symmetric:
            return ((y - (2 ** (self.bits - 1) - 1)) * scale).reshape(codes.shape)
        zero = jnp.expand_dims(store["zero"].astype(jnp.float32), axis)
        out = (y + zero) * scale if self.zero == "int8" else y * scale + zero
        return out.reshape(codes.shape)


def _storable(scale: Array, dtype: str) -> Array:
    """The scale as it will be read back, 1 where it would be 0."""
    info = jnp.finfo(dtype)
    stored = jnp.minimum(scale, float(info.max)).astype(dtype).astype(jnp.float32)
    return jnp.where(stored == 0, 1.0, stored)


@dataclasses.dataclass(frozen=True)
class Cast(Quantizer):
    """Values in a floating-point dtype, unscaled."""

    dtype: str = "bfloat16"

    def fields(self, dim: int) -> dict[str, Field]:
        """x."""
        return {"x": Field((dim,), self.dtype)}

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """Clipped to the dtype's range."""
        top = float(jnp.finfo(self.dtype).max)
        return {"x": jnp.clip(x, -top, top).astype(self.dtype)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """As f32."""
        return store["x"].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Scaled(Quantizer):
    """8-bit floating point with one float16 scale a token: x' = code * s, s = max|x| / largest code."""

    dtype: str = "float8_e4m3fn"

    def fields(self, dim: int) -> dict[str, Field]:
        """x and its scale."""
        return {"x": Field((dim,), self.dtype), "scale": Field((), META)}

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        top = float(jnp.finfo(self.dtype).max)
        scale = _storable(jnp.abs(x).max(-1) / top + jnp.sum(x * 0.0, -1), META)
        y = jnp.clip(x / scale[..., None], -top, top)
        return {"x": y.astype(self.dtype), "scale": scale.astype(META)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        return store["x"].astype(jnp.float32) * store["scale"].astype(jnp.float32)[..., None]
