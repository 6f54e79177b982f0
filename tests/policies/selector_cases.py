"""Indices on random entries, for the tests of single selectors: shapes are [2 rows, 2 KV heads, n, 8]."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kvjax import arrays
from kvjax.policies.selectors.base import Call, Entries
from kvjax.types import ModelShape

B, H, G, D = 2, 2, 2, 8
SHAPE = ModelShape(1, H * G, H, D, (None,))
INV_FREQ = jnp.asarray(10000.0 ** (-np.arange(D // 2) / (D // 2)), jnp.float32)
SCALE = D**-0.5


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def entries(lengths, n, seed=0, k=None):
    """`lengths` entries a row in slots 0.., empty behind."""
    pos = np.where(np.arange(n) < np.asarray(lengths)[:, None], np.arange(n), -1)
    pos = jnp.asarray(np.broadcast_to(pos[:, None], (B, H, n)).astype(np.int32))
    k = draw(B, H, n, D, seed=seed) if k is None else jnp.asarray(k, jnp.float32)
    return Entries(k, draw(B, H, n, D, seed=seed + 1), pos, pos)


def call(held, q_tokens=1, seed=2, q=None, token_ids=None):
    """A call whose last query stands behind the stored entries."""
    last = np.asarray(held.pos)[:, 0].max(-1)
    q_pos = last[:, None] - np.arange(q_tokens)[::-1]
    q_pos = np.where(q_pos >= 0, q_pos, -1)
    fill = (np.asarray(held.pos) >= 0).sum(-1).astype(np.int32)
    q = draw(B, H * G, q_tokens, D, seed=seed) * 2 if q is None else jnp.asarray(q, jnp.float32)
    return Call(
        q=q,
        q_pos=jnp.asarray(q_pos, jnp.int32),
        fill=jnp.asarray(fill),
        stored=lambda: held,
        token_ids=None if token_ids is None else jnp.asarray(token_ids),
        inv_freq=INV_FREQ,
        scale=SCALE,
    )


def built(selector, held, q_tokens=None, **kwargs):
    """(index of `held`, the call that built it)."""
    n = held.k.shape[2]
    c = call(held, n if q_tokens is None else q_tokens, **kwargs)
    empty = arrays.init(selector.specs(B, n, SHAPE))
    return selector.build(empty, held, c, {}), c


def later(held, n=1, seed=9):
    """(entries with `n` more a row, the new ones alone)."""
    pos = np.asarray(held.pos).copy()
    count = (pos >= 0).sum(-1)
    k, v = np.asarray(held.k).copy(), np.asarray(held.v).copy()
    new_k, new_v = np.asarray(draw(B, H, n, D, seed=seed)), np.asarray(draw(B, H, n, D, seed=seed + 1))
    slots = count[..., None] + np.arange(n)
    for b in range(B):
        for h in range(H):
            pos[b, h, slots[b, h]] = slots[b, h]
            k[b, h, slots[b, h]], v[b, h, slots[b, h]] = new_k[b, h], new_v[b, h]
    slots = jnp.asarray(slots.astype(np.int32))
    every = Entries(jnp.asarray(k), jnp.asarray(v), jnp.asarray(pos), jnp.asarray(pos))
    return every, Entries(jnp.asarray(new_k), jnp.asarray(new_v), slots, slots)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def attention(q, k, v, n):
    """Oracle, float64: attention of q [B, H*G, D] over the first n[b, h] entries."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((B, H * G, D))
    for b in range(B):
        for h in range(H * G):
            m = n[b, h // G]
            p = softmax(q[b, h] @ k[b, h // G, :m].T * SCALE)
            out[b, h] = p @ v[b, h // G, :m]
    return out
