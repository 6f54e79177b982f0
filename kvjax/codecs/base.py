"""The codec contract: keys and values to stored fields and back.

A field has shape [lead..., before..., slots / per, suffix...], where lead is [batch, kv_heads] in the Dense
layout and [pages] in the Ragged one. A token is encoded exactly once:

- A codec of single tokens without a full-precision window (`deferred` is False) encodes a token when it enters
  the cache; compaction and eviction move or free encoded fields.
- Any other codec is *deferred*: entries wait in model dtype in `Layer.residual`, behind `sink` entries that stay
  there for good. When a token no longer fits into the window of `residual` entries, the oldest `group` of them are
  encoded together. A prompt is encoded after the policy has compressed it. Encoded entries stay where they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvjax.arrays import ArraySpec, itembits
from kvjax.types import ModelShape
from pallas_kernels import formats
from pallas_kernels.formats import KVStore

Array = jax.Array
Store = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Field:
    """One stored array: shape after the slot axis, dtype, how many slots share one entry, shape before the slots."""

    suffix: tuple[int, ...]
    dtype: str
    per: int = 1
    before: tuple[int, ...] = ()


@struct.dataclass
class Context:
    """What encoding and decoding of n slots may look at besides the slots."""

    pos: Array | None = None  # int32 [batch, kv_heads, n] positions, for codes of keys before RoPE
    inv_freq: Array | None = None  # f32 [rotary_dim // 2]
    saliency: Array | None = None  # f32 [batch, kv_heads, n], encode only; higher = more bits
    const: dict[str, Any] = struct.field(
        default_factory=dict
    )  # this layer's calibration, [kv_heads, ...] each
    previous: tuple[Array, Array] | None = (
        None  # the same slots of the layer before, decoded (`Codec.predicts`)
    )
    head_dim: int = struct.field(pytree_node=False, default=0)


NO_CONTEXT = Context()


class Codec:
    """Base class. Instances are frozen dataclasses (static under `jit`)."""

    group: int = 1  # slots that are encoded together
    residual: int = 0  # newest entries that wait in model dtype
    sink: int = 0  # first entries that stay in model dtype
    scorer: Any = None  # a Scorer whose scores of a prompt become `Context.saliency`
    predicts: bool = False  # needs `Context.previous`: the slots of the layer before must be this layer's
    rotates: bool = False  # the fused kernel works on rotated channels: see `rotate_query`

    @property
    def self_contained(self) -> bool:
        """True when `encode` looks at keys and values only: no RoPE tables, saliency or other layers."""
        return False

    @property
    def deferred(self) -> bool:
        """True when entries wait in the residual window before they are encoded."""
        return self.group > 1 or self.residual > 0 or self.sink > 0

    @property
    def block(self) -> int:
        """Slots and page sizes are multiples of this."""
        return self.group

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """The stored fields for keys and values of `head_dim` channels in the model's `dtype`."""
        raise NotImplementedError

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """k, v [batch, kv_heads, slots, head_dim] -> fields."""
        raise NotImplementedError

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """Fields -> k, v [batch, kv_heads, slots, head_dim] in `dtype`."""
        raise NotImplementedError

    def kv_store(self, store: Store) -> KVStore | None:
        """The fields as the operand of `pallas_kernels.decode_attention`; None: decoded tile by tile instead."""
        return None

    def rotate_query(self, q: Array) -> Array:
        """q [batch, q_heads, tokens, head_dim] for the fused kernel, when `rotates`."""
        return q

    def unrotate_out(self, out: Array) -> Array:
        """The fused kernel's output back in the model's channels, when `rotates`."""
        return out

    def for_layer(self, layer: int, shape: ModelShape) -> Codec:
        """The codec of one layer; codecs whose precision depends on the layer override it."""
        return self

    def for_platform(self, platform: str) -> Codec:
        """The codec of a cache that lives on "cpu", "gpu" or "tpu" ("": not known); for dtypes that one of them lacks."""
        return self

    def page_slots(self, platform: str) -> int:
        """Fewest slots of a page of the Ragged layout that a kernel of the platform reads.

        TPU: 32, the rows of a native tile of 1-byte codes.
        """
        return 32 if platform == "tpu" else 1

    def constants(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        """Calibration arrays of one layer, shared by all rows and requests as weights are; `Context.const`."""
        return {}

    def check(self, shape: ModelShape) -> None:
        """ValueError when group, residual and head_dim do not fit, or a calibration file is not of this model."""
        if self.group > 1 and self.group > self.residual:
            raise ValueError(
                f"{type(self).__name__}: groups of {self.group} tokens are larger than the residual window of "
                f"{self.residual}; raise residual or lower group"
            )
        self.fields(shape.head_dim, shape.dtype)
        for layer in range(min(2, shape.layers)):  # codecs that predict have constants from the second on
            self.for_layer(layer, shape).constants(layer, shape)

    def encoded(self, entries: Any) -> Any:
        """How many of `entries` (int or array) per head are encoded once they are all stored; the rest waits."""
        over = entries - self.sink - self.residual
        units = -(-over // self.group)
        return units * self.group * (units > 0)

    def specs(
        self, lead: tuple[int, ...], axes: tuple[str | None, ...], slots: int, head_dim: int, dtype: str
    ):
        """dict of `ArraySpec` for `slots` slots under the leading shape; `axes` names lead and the slot axis."""
        out = {}
        for name, field in self.fields(head_dim, dtype).items():
            if slots % field.per:
                raise ValueError(
                    f"{slots} slots are not a multiple of the group of {field.per} that {name} uses"
                )
            suffix_axes = tuple("head_dim" if s == head_dim else None for s in field.suffix)
            shape = (*lead, *field.before, slots // field.per, *field.suffix)
            names = (*axes[:-1], *(None,) * len(field.before), axes[-1], *suffix_axes)
            out[name] = ArraySpec(shape, field.dtype, names)
        return out

    def bits_per_element(self, head_dim: int, dtype: str) -> float:
        """Stored bits per encoded key or value element, metadata included; the residual window is not counted."""
        bits = 0.0
        for field in self.fields(head_dim, dtype).values():
            size = 1
            for s in (*field.suffix, *field.before):
                size *= s
            bits += size * itembits(field.dtype) / field.per
        return bits / (2 * head_dim)


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """Keys and values as the model computes them, in the model's dtype."""

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """k and v."""
        return {"k": Field((head_dim,), dtype), "v": Field((head_dim,), dtype)}

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """Identity."""
        return {"k": k, "v": v}

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """Identity."""
        return store["k"].astype(dtype), store["v"].astype(dtype)

    def kv_store(self, store: Store) -> KVStore:
        """Format 'dense'."""
        return KVStore(store["k"], store["v"])


@dataclasses.dataclass(frozen=True)
class PerToken(Codec):
    """8-bit codes with one symmetric scale per token, head and tensor; see `formats.quantize_tokens`.

    format: int8, fp8_e4m3 or fp8_e5m2. Error: int8 |x - x'| <= s/2; fp8 relative 2^-4 (e4m3) or 2^-3 (e5m2) in
    the normal range. The kernel multiplies logits by key scales and probabilities by value scales.
    """

    format: str = "int8"

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """Codes of k and v and their f32 scales."""
        code, scale = Field((head_dim,), jnp.dtype(formats.EIGHT_BIT[self.format]).name), Field((), "float32")
        return {"k": code, "v": code, "k_scale": scale, "v_scale": scale}

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        (kc, ks), (vc, vs) = (formats.quantize_tokens(x, self.format) for x in (k, v))
        return {"k": kc, "v": vc, "k_scale": ks, "v_scale": vs}

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """Codes times scales."""
        k, v = formats.decode(self.kv_store(store))
        return k.astype(dtype), v.astype(dtype)

    def page_slots(self, platform: str) -> int:
        """GPU: 64, a step of the Hopper kernel."""
        return 64 if platform == "gpu" else super().page_slots(platform)

    def kv_store(self, store: Store) -> KVStore:
        """Codes and scales as they are."""
        return KVStore(store["k"], store["v"], store["k_scale"], store["v_scale"], format=self.format)
