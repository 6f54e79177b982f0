"""Scores made by hand, small observations and allocators under jit, for tests of allocators."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.policies import Observation
from kvjax.policies.base import PROTECTED

FIXTURE = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "kvpress" / "allocators.npz")
B, H, S, D, L = 2, 2, 48, 8, 4
LENGTHS = np.array([48, 37])


def scores_of(layer, window=4, seed=0, same=False):
    """(protected scores, valid) [batch, kv_heads, slots]: positive scores, the last `window` entries protected."""
    rng = np.random.default_rng([seed, 0 if same else layer])
    valid = np.arange(S) < LENGTHS[:, None, None]
    s = rng.random((B, 1 if same else H, S)) * np.ones((1, H, 1))
    s = np.where(np.arange(S) >= LENGTHS[:, None, None] - window, PROTECTED * 2, s)
    return np.where(valid, s, -np.inf).astype(np.float32), np.broadcast_to(valid, s.shape)


def observation(layer=0, seed=0, q=None, k=None, v=None):
    rng = np.random.default_rng([seed, layer, 7])
    pos = np.where(np.arange(S) < LENGTHS[:, None], np.arange(S), -1).astype(np.int32)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return Observation(
        q=jnp.asarray(draw(B, 2 * H, S, D) * 2 if q is None else q),
        q_pos=jnp.asarray(pos),
        k=jnp.asarray(draw(B, H, S, D) if k is None else k),
        v=jnp.asarray(draw(B, H, S, D) if v is None else v),
        pos=jnp.asarray(np.broadcast_to(pos[:, None], (B, H, S))),
        length=jnp.asarray(LENGTHS, jnp.int32),
        layer=layer,
        layers=L,
        scale=D**-0.5,
    )


def attention(obs):
    """f64 [batch, q_heads, queries, slots] by loops over rows and heads."""
    q, k = np.asarray(obs.q, np.float64), np.asarray(obs.k, np.float64)
    out = np.zeros((B, 2 * H, S, S))
    for b in range(B):
        for h in range(2 * H):
            for i in range(LENGTHS[b]):
                x = k[b, h // 2, : i + 1] @ q[b, h, i] * D**-0.5
                e = np.exp(x - x.max())
                out[b, h, i, : i + 1] = e / e.sum()
    return out


@functools.partial(jax.jit, static_argnums=0)
def counts_of_layers(allocator, scores, valid, keep, length, stats):
    return jnp.stack(allocator.model_counts(scores, valid, keep, length, stats), axis=1)


def model_counts(allocator, keep, stats, n=L, window=4, **kwargs):
    """int [batch, layers, kv_heads]."""
    made = [scores_of(i, window, **kwargs) for i in range(n)]
    scores, valid = ([jnp.asarray(x[j]) for x in made] for j in (0, 1))
    stats = [jnp.asarray(s) for s in stats] if stats is not None else [None] * n
    keep = jnp.asarray(np.minimum(keep, LENGTHS), jnp.int32)
    return np.asarray(
        counts_of_layers(allocator, scores, valid, keep, jnp.asarray(LENGTHS, jnp.int32), stats)
    )


@functools.partial(jax.jit, static_argnums=0)
def measure(allocator, obs, scores):
    return allocator.measure(obs, scores)
