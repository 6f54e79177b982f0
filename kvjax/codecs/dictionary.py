"""Sparse codes over a dictionary (CSR): a vector is a few atoms times coefficients, found by matching pursuit."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import vector
from kvjax.codecs.base import NO_CONTEXT, Context, Field, Store
from kvjax.codecs.quantizers import Quantizer
from kvjax.types import ModelShape

Array = jax.Array


def pursue(x: Array, atoms: Array, terms: int) -> tuple[Array, Array, Array]:
    """Matching pursuit of x [..., n, d] over unit atoms [..., N, d].

    Each step takes the atom with the largest |<r, a>| and subtracts <r, a> a: |r|^2 falls by <r, a>^2 exactly.

    Returns: index int32 [..., n, terms], coefficient f32 [..., n, terms], rest f32 [..., n, d].
    """

    def step(rest: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        dots = jnp.matmul(rest, jnp.swapaxes(atoms, -1, -2), precision=jax.lax.Precision.HIGHEST)
        index = jnp.argmax(jnp.abs(dots), axis=-1)
        coefficient = jnp.take_along_axis(dots, index[..., None], axis=-1)[..., 0]
        return rest - coefficient[..., None] * pick(atoms, index), (index, coefficient)

    rest, (index, coefficient) = jax.lax.scan(step, x, None, length=terms)
    return jnp.moveaxis(index, 0, -1), jnp.moveaxis(coefficient, 0, -1), rest


def pick(atoms: Array, index: Array) -> Array:
    """atoms [kv_heads, N, d] at index [batch, kv_heads, ...] -> [batch, kv_heads, ..., d]."""
    return jax.vmap(jax.vmap(lambda a, i: a[i]), in_axes=(None, 0))(atoms, index)


def combine(atoms: Array, index: Array, value: Array) -> Array:
    """Sum over the last axis of value [batch, kv_heads, ..., terms] times the atoms at `index`: [batch, kv_heads, ..., d].

    Term by term: as one sum over the terms, a CPU looks up every number of every atom apart, 80 times as slow.
    """
    parts = (pick(atoms, index[..., i]) * value[..., i, None] for i in range(index.shape[-1]))
    return functools.reduce(jnp.add, parts)


@dataclasses.dataclass(frozen=True)
class Dictionary(Quantizer):
    """x' = sum of `terms` atoms times float16 coefficients; the vector is cut into `chunks` first.

    32 terms chunks / dim bits an element. calibration: file with atoms [kv_heads, N, dim / chunks]; '' means
    random unit atoms.
    """

    terms: int = 4
    chunks: int = 1
    atoms: int = 512
    calibration: str = ""

    def fields(self, dim: int) -> dict[str, Field]:
        """Indices and coefficients."""
        if self.terms < 1 or self.chunks < 1 or dim % self.chunks:
            raise ValueError(
                f"a sparse code needs terms >= 1 and chunks that divide head_dim={dim}, got {self.terms}, {self.chunks}"
            )
        if not 1 <= self.atoms < 65536:
            raise ValueError(f"a dictionary has 1 to 65535 atoms, got {self.atoms}")
        size = (self.chunks * self.terms,)
        return {"index": Field(size, "uint16"), "value": Field(size, "float16")}

    def constants(self, layer: int, shape: ModelShape, side: str) -> dict[str, np.ndarray]:
        """atoms [kv_heads, N, dim / chunks], unit length."""
        dim = shape.head_dim // self.chunks
        if self.calibration:
            atoms = vector.entry(self.calibration, shape, f"{side}.{layer}.atoms").astype(np.float32)
            if atoms.shape[-1] != dim:
                raise ValueError(f"{self.calibration!r} has atoms of {atoms.shape[-1]} channels, not {dim}")
        else:
            atoms = np.random.default_rng(layer).standard_normal((shape.kv_heads, self.atoms, dim))
        length = np.linalg.norm(atoms, axis=-1, keepdims=True)
        return {"atoms": (atoms / np.maximum(length, 1e-20)).astype(np.float32)}

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        b, h, n, d = x.shape
        parts = x.reshape(b, h, n * self.chunks, d // self.chunks)
        index, value, _ = pursue(parts, ctx.const["atoms"], self.terms)
        top = float(jnp.finfo(jnp.float16).max)
        return {
            "index": index.reshape(b, h, n, self.chunks * self.terms).astype(jnp.uint16),
            "value": jnp.clip(value, -top, top)
            .reshape(b, h, n, self.chunks * self.terms)
            .astype(jnp.float16),
        }

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        b, h, n, _ = store["index"].shape
        index = store["index"].astype(jnp.int32).reshape(b, h, n, self.chunks, self.terms)
        value = store["value"].astype(jnp.float32).reshape(index.shape)
        return combine(ctx.const["atoms"], index, value).reshape(b, h, n, dim)
