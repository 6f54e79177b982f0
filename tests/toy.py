"""A two-layer attention-only model: small enough that every policy can be compiled many ways."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.generation import engine
from kvjax.types import AttentionInputs, ModelShape

VOCAB, EMBED = 64, 32


@dataclasses.dataclass(frozen=True)
class Toy:
    """An `engine.LanguageModel`."""

    layers: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    window: int | None = None  # sliding window of odd layers
    max_context: int = 1 << 20
    dtype: str = "float32"

    @property
    def shape(self) -> ModelShape:
        windows = tuple(self.window if i % 2 else None for i in range(self.layers))
        return ModelShape(
            self.layers, self.q_heads, self.kv_heads, self.head_dim, windows, self.dtype, self.max_context
        )

    def init(self, seed: int = 0) -> dict:
        rng = np.random.default_rng(seed)

        def w(*shape):
            return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)

        layer = lambda: {  # noqa: E731
            "q": w(EMBED, self.q_heads, self.head_dim) * 2.0,
            "k": w(EMBED, self.kv_heads, self.head_dim) * 2.0,
            "v": w(EMBED, self.kv_heads, self.head_dim),
            "o": w(self.q_heads, self.head_dim, EMBED) * 3.0,
        }
        return {"embed": w(VOCAB, EMBED) * 8.0, "layers": [layer() for _ in range(self.layers)]}

    def hidden(self, params, tokens, positions, cache, attend):
        x = params["embed"][tokens]
        inv_freq = 10000.0 ** (-jnp.arange(self.head_dim // 2) / (self.head_dim // 2))
        for i, layer in enumerate(params["layers"]):
            h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
            inputs = self._inputs(params, i, h, positions, inv_freq)
            if i + 1 < self.layers:
                inputs = inputs.replace(
                    ahead=lambda i=i, h=h: self._inputs(params, i + 1, h, positions, inv_freq)
                )
            out, cache = attend(inputs, cache)
            x = x + jnp.einsum("bhtd,hde->bte", out, layer["o"])
        return x, cache

    def _inputs(self, params, i, h, positions, inv_freq):
        layer = params["layers"][i]
        q, k, v = (jnp.einsum("bte,ehd->bhtd", h, layer[n]) for n in "qkv")
        return AttentionInputs(
            q=rope(q, positions, inv_freq),
            k=rope(k, positions, inv_freq),
            v=v,
            positions=positions,
            hidden=h,
            wo=layer["o"],
            inv_freq=inv_freq,
            layer=i,
            scale=self.head_dim**-0.5,
            window=self.shape.windows[i],
        )

    def logits(self, params, hidden):
        return hidden @ params["embed"].T


def rope(x, positions, inv_freq):
    angle = jnp.maximum(positions, 0)[:, None, :, None].astype(jnp.float32) * inv_freq
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def ragged(lengths, width, seed=0, left=False):
    """(tokens, positions) [rows, width], right- or left-padded; row i is the same whatever the width and side."""
    tokens = np.zeros((len(lengths), width), np.int32)
    positions = np.full((len(lengths), width), -1, np.int32)
    for i, n in enumerate(lengths):
        at = slice(width - n, width) if left else slice(0, n)
        tokens[i, at] = np.random.default_rng([seed, i]).integers(0, VOCAB, 4096)[:n]
        positions[i, at] = np.arange(n)
    return tokens, positions


def steps(lm, plan, params, cache, tokens):
    """Teacher-forced decode of tokens [batch, n]; returns logits [n, batch, vocab] and the cache."""
    return _steps(lm, plan, params, cache, jnp.asarray(tokens).T)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steps(lm, plan, params, cache, tokens):
    def body(cache, token):
        logits, cache = engine.step(lm, plan, params, cache, token, jnp.ones(token.shape, bool))
        return cache, logits

    cache, logits = jax.lax.scan(body, cache, tokens)
    return logits, cache
