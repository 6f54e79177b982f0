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
SCALE_DTYPES = ("auto", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Kivi(Codec):
    """Asymmetric rounding in the fused kernel's formats int4 and int2.

    tokens, channels: `size` tokens share a key scale and `size` channels a value scale. A group that is encoded
    at once is a whole pack block of the format. hadamard: keys and values are stored rotated, the query is rotated
    once and the output rotated back. scale_dtype: of scales and zeros; "auto" is bfloat16 in a plan for a TPU, which
    loads no float16 and would copy such scales before every call of the kernel, and float16 in any other.
    """

    bits: int = 4
    size: int = 32
    residual: int = 128
    sink: int = 0
    hadamard: bool = False
    scale_dtype: str = "auto"

    def for_platform(self, platform: str) -> Kivi:
        """Settles `scale_dtype`."""
        if self.scale_dtype != "auto":
            return self
        return dataclasses.replace(self, scale_dtype="bfloat16" if platform == "tpu" else "float16")

    @property
    def meta(self) -> str:
        """The dtype of scales and zeros."""
        return self.for_platform("").scale_dtype

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
        """Packed codes, scales and zeros."""
        if self.bits not in (2, 4):
            raise ValueError(f"kivi: bits must be 2 or 4, got {self.bits}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"kivi: scale_dtype={self.scale_dtype!r}; choose one of {list(SCALE_DTYPES)}")
        if self.size < 1 or head_dim % self.size:
            raise ValueError(f"kivi: head_dim={head_dim} is not whole groups of {self.size} channels")
        code = Field((head_dim,), "uint8", per=8 // self.bits)
        key = Field((head_dim,), self.meta, per=self.size)
        value = Field((), self.meta, before=(head_dim // self.size,))
        return {"k": code, "v": code, "k_scale": key, "k_zero": key, "v_scale": value, "v_zero": value}

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """Whole groups [batch, kv_heads, slots, head_dim] -> fields."""
        k, v = self._turn(k), self._turn(v)
        names = ("k", "k_scale", "k_zero", "v", "v_scale", "v_zero")
        how = (self.bits, self.size, jnp.dtype(self.meta))
        return dict(zip(names, (*formats.quantize_keys(k, *how), *formats.quantize_values(v, *how))))

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
