"""KIVI's storage: keys per channel over groups of tokens, values per token over groups of channels."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.codecs.base import NO_CONTEXT, Codec, Context, Field, Store
from kvjax.codecs.transforms import hadamard
from pallas_kernels import formats
from pallas_kernels.formats import KVStore

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Kivi(Codec):
    """Asymmetric rounding in the fused kernel's formats int4 and int2.

    tokens, channels: `size` tokens share a key scale and `size` channels a value scale. A group that is encoded
    at once is a whole pack block of the format. hadamard: keys and values are stored rotated, the query is rotated
    once and the output rotated back.
    """

    bits: int = 4
    size: int = 32
    residual: int = 128
    sink: int = 0
    hadamard: bool = False

    @property
    def format(self) -> str:
        """The kernel's name of the format."""
        return f"int{self.bits}"

    @property
    def group(self) -> int:  # type: ignore[override]
        """Tokens encoded at once: whole pack blocks and whole scale groups."""
        return math.lcm(formats.pack_block(self.format), self.size)

    @property
    def self_contained(self) -> bool:
        """Groups need nothing but themselves."""
        return True

    @property
    def rotates(self) -> bool:  # type: ignore[override]
        """See `hadamard`."""
        return self.hadamard

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """Packed codes, float16 scales and zeros."""
        if self.bits not in (2, 4):
            raise ValueError(f"kivi: bits must be 2 or 4, got {self.bits}")
        if self.size < 1 or head_dim % self.size:
            raise ValueError(f"kivi: head_dim={head_dim} is not whole groups of {self.size} channels")
        code = Field((head_dim,), "uint8", per=8 // self.bits)
        key = Field((head_dim,), "float16", per=self.size)
        value = Field((), "float16", before=(head_dim // self.size,))
        return {"k": code, "v": code, "k_scale": key, "k_zero": key, "v_scale": value, "v_zero": value}

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """Whole groups [batch, kv_heads, slots, head_dim] -> fields."""
        k, v = self._turn(k), self._turn(v)
        names = ("k", "k_scale", "k_zero", "v", "v_scale", "v_zero")
        keys = formats.quantize_keys(k, self.bits, self.size)
        return dict(zip(names, (*keys, *formats.quantize_values(v, self.bits, self.size))))

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """codes * scale + zero."""
        k, v = (self.unrotate_out(x) for x in formats.decode(self.kv_store(store)))
        return k.astype(dtype), v.astype(dtype)

    def kv_store(self, store: Store) -> KVStore:
        """The fields as they are."""
        return KVStore(**store, format=self.format, group=self.size)

    def _turn(self, x: Array) -> Array:
        return hadamard(x.astype(jnp.float32)) if self.hadamard else x

    def rotate_query(self, q: Array) -> Array:
        """Orthogonal, so that q.k is unchanged."""
        return self._turn(q).astype(q.dtype)

    def unrotate_out(self, out: Array) -> Array:
        """The inverse rotation."""
        return hadamard(out, inverse=True) if self.hadamard else out
