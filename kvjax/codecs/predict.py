"""Storing only what a linear predictor from the layer before gets wrong (AQUA-KV, arXiv 2501.19392)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import vector
from kvjax.codecs.base import NO_CONTEXT, Codec, Context, Field, Store
from kvjax.codecs.levels import Gaussian
from kvjax.codecs.quantizers import Quantizer
from kvjax.codecs.transforms import rope
from kvjax.codecs.wrappers import Rotated
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Predicted(Codec):
    """Even layers are stored as they are, odd layers as the error of a prediction from the layer before.

    K' = W_K K'_before + b + dequantized error, V' = W_V [K'; V'_before] + b + dequantized error, over all KV heads
    of a token, keys before RoPE. Encoder and decoder predict from the same reconstruction. calibration: file
    with the predictors; '' means zero predictors, which leaves the plain codec.
    """

    bits: float = 2
    anchor_bits: float = 4
    residual: int = 128
    sink: int = 4
    calibration: str = ""
    odd: bool = False

    @property
    def predicts(self) -> bool:  # type: ignore[override]
        """True for the layers that need the one before."""
        return self.odd

    def _part(self, seed: int) -> Quantizer:
        return Rotated(Gaussian(self.bits if self.odd else self.anchor_bits), "hadamard", seed)

    def for_layer(self, layer: int, shape: ModelShape) -> Predicted:
        """Odd layers are predicted."""
        return dataclasses.replace(self, odd=layer % 2 == 1)

    def check(self, shape: ModelShape) -> None:
        """ValueError for sliding layers, whose slots are not those of the layer before."""
        if any(w is not None for w in shape.windows):
            raise ValueError(
                "aqua_kv: layers with sliding windows do not hold the tokens of the layer before"
            )
        super().check(shape)

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """Codes and norms of keys and values, or of their errors."""
        part = self._part(0).fields(head_dim)
        return {f"{side}_{name}": field for side in "kv" for name, field in part.items()}

    def bits_per_element(self, head_dim: int, dtype: str) -> float:
        """The mean of even and odd layers."""
        pair = (dataclasses.replace(self, odd=o) for o in (False, True))
        return sum(Codec.bits_per_element(p, head_dim, dtype) for p in pair) / 2

    def constants(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        """k [C + 1, C] and v [2 C + 1, C] of odd layers, C = kv_heads * head_dim; the last row is the offset."""
        if layer % 2 == 0:
            return {}
        width = shape.kv_heads * shape.head_dim
        if not self.calibration:
            return {
                "k": np.zeros((width + 1, width), np.float32),
                "v": np.zeros((2 * width + 1, width), np.float32),
            }
        return {
            side: vector.entry(self.calibration, shape, f"{side}.{layer}.predict").astype(np.float32)
            for side in "kv"
        }

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        k, v, before = self._flat(k, v, ctx)
        guess = predict(before[:1], ctx.const["k"]) if self.odd else 0.0
        keys = self._part(0).encode(k - guess)
        guess = (
            predict((self._part(0).decode(keys, k.shape[-1]) + guess, before[1]), ctx.const["v"])
            if self.odd
            else 0.0
        )
        values = self._part(1).encode(v - guess)
        return {f"k_{n}": x for n, x in keys.items()} | {f"v_{n}": x for n, x in values.items()}

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """See the class."""
        parts = {s: {n[2:]: x for n, x in store.items() if n.startswith(f"{s}_")} for s in "kv"}
        k, v = (self._part(i).decode(parts[s], ctx.head_dim) for i, s in enumerate("kv"))
        if self.odd:
            before = self._flat(None, None, ctx)[2]
            k = k + predict(before[:1], ctx.const["k"])
            v = v + predict((k, before[1]), ctx.const["v"])
        if ctx.inv_freq is not None:
            k = rope(k, ctx.pos, ctx.inv_freq)
        return k.astype(dtype), v.astype(dtype)

    def _flat(self, k: Array | None, v: Array | None, ctx: Context):
        """Keys without RoPE, f32: this layer's and those of the layer before."""

        def bare(x: Array) -> Array:
            x = x.astype(jnp.float32)
            return x if ctx.inv_freq is None else rope(x, ctx.pos, ctx.inv_freq, inverse=True)

        before = (bare(ctx.previous[0]), ctx.previous[1].astype(jnp.float32)) if self.odd else ()
        return None if k is None else bare(k), None if v is None else v.astype(jnp.float32), before


def predict(inputs: tuple[Array, ...], weight: Array) -> Array:
    """inputs [batch, kv_heads, n, dim] each, weight [sum of widths + 1, width] -> [batch, kv_heads, n, dim]."""
    b, h, n, d = inputs[0].shape
    flat = [jnp.moveaxis(x, 1, 2).reshape(b, n, h * d) for x in inputs]
    x = jnp.concatenate(flat, axis=-1)
    y = jnp.matmul(x, weight[:-1], precision=jax.lax.Precision.HIGHEST) + weight[-1]
    return jnp.moveaxis(y.reshape(b, n, h, d), 2, 1)


def fit(inputs: np.ndarray, target: np.ndarray, damping: float = 1e-3) -> np.ndarray:
    """Ridge regression: weight [inputs + 1, outputs] of target [n, outputs] on inputs [n, inputs] and a constant."""
    x = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1).astype(np.float64)
    gram = x.T @ x
    ridge = damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram + ridge, x.T @ target.astype(np.float64))


def predictors(
    samples: dict[str, np.ndarray], anchor_bits: float = 4, bits: float = 2
) -> dict[str, np.ndarray]:
    """Arrays of a calibration file for `Predicted`, layer by layer on reconstructions, from `collect`'s samples."""
    out: dict[str, np.ndarray] = {}
    heads, n, dim = samples["k"].shape[1:]

    def flat(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.asarray(x, np.float64), 0, 1).reshape(n, heads * dim)

    def rebuilt(x: Array, bits: float, seed: int) -> Array:
        part = Rotated(Gaussian(bits), "hadamard", seed)
        return part.decode(part.encode(x), dim)

    for layer in range(1, samples["k"].shape[0], 2):
        past = [
            rebuilt(jnp.asarray(samples[s][layer - 1], jnp.float32)[None], anchor_bits, i)
            for i, s in enumerate("kv")
        ]
        k, v = (jnp.asarray(samples[s][layer], jnp.float32)[None] for s in "kv")
        out[f"k.{layer}.predict"] = w = fit(flat(past[0][0]), flat(k[0])).astype(np.float16)
        guess = predict((past[0],), jnp.asarray(w, jnp.float32))
        got = rebuilt(k - guess, bits, 0) + guess
        inputs = np.concatenate([flat(got[0]), flat(past[1][0])], axis=1)
        out[f"v.{layer}.predict"] = fit(inputs, flat(v[0])).astype(np.float16)
    return out
