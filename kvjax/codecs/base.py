"""The codec contract: keys and values to stored fields and back.

A field has shape [lead..., slots / per, suffix...], where lead is [batch, kv_heads] in the Dense layout and
[pages] in the Ragged one. A codec touches each token exactly once: `encode` runs when an entry is stored, and
compaction moves encoded fields, it never decodes and encodes again.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec, itembits
from pallas_kernels import formats
from pallas_kernels.formats import KVStore

Array = jax.Array
Store = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Field:
    """One stored array: shape after the slot axis, dtype, and how many slots share one entry (`per`)."""

    suffix: tuple[int, ...]
    dtype: str
    per: int = 1


class Codec:
    """Base class. Instances are frozen dataclasses (static under `jit`)."""

    group: ClassVar[int] = 1
    """Slots that are encoded together. 1: each token on its own, any slot can be overwritten at any time."""

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """The stored fields for keys and values of `head_dim` channels in the model's `dtype`."""
        raise NotImplementedError

    def encode(self, k: Array, v: Array) -> Store:
        """k, v [..., slots, head_dim] -> fields."""
        raise NotImplementedError

    def decode(self, store: Store, dtype: str) -> tuple[Array, Array]:
        """Fields -> k, v [..., slots, head_dim] in `dtype`."""
        raise NotImplementedError

    def kv_store(self, store: Store) -> KVStore:
        """The fields as the operand of `pallas_kernels.decode_attention`."""
        raise NotImplementedError

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
            shape = (*lead, slots // field.per, *field.suffix)
            out[name] = ArraySpec(shape, field.dtype, (*axes, *suffix_axes))
        return out

    def bits_per_element(self, head_dim: int, dtype: str) -> float:
        """Stored bits per key or value element, metadata included."""
        bits = 0.0
        for field in self.fields(head_dim, dtype).values():
            size = 1
            for s in field.suffix:
                size *= s
            bits += size * itembits(field.dtype) / field.per
        return bits / (2 * head_dim)


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """Keys and values as the model computes them, in the model's dtype."""

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """k and v."""
        return {"k": Field((head_dim,), dtype), "v": Field((head_dim,), dtype)}

    def encode(self, k: Array, v: Array) -> Store:
        """Identity."""
        return {"k": k, "v": v}

    def decode(self, store: Store, dtype: str) -> tuple[Array, Array]:
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

    def encode(self, k: Array, v: Array) -> Store:
        """See the class."""
        (kc, ks), (vc, vs) = (formats.quantize_tokens(x, self.format) for x in (k, v))
        return {"k": kc, "v": vc, "k_scale": ks, "v_scale": vs}

    def decode(self, store: Store, dtype: str) -> tuple[Array, Array]:
        """Codes times scales."""
        k, v = formats.decode(self.kv_store(store))
        return k.astype(dtype), v.astype(dtype)

    def kv_store(self, store: Store) -> KVStore:
        """Codes and scales as they are."""
        return KVStore(store["k"], store["v"], store["k_scale"], store["v_scale"], format=self.format)
