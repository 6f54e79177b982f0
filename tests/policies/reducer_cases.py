"""Two ragged rows, survivors drawn at random, and a reducer under jit, for tests of reducers."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.policies import Observation

FIXTURE = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "kvpress" / "allocators.npz")
B, H, S, D = 2, 2, 40, 8
LENGTHS = np.array([40, 29])


def observation(seed=0, **fields):
    """Two rows of 40 and 29 entries; what stands in empty slots is NaN and must not matter."""
    rng = np.random.default_rng(seed)
    pos = np.where(np.arange(S) < LENGTHS[:, None], np.arange(S), -1).astype(np.int32)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    empty = (pos < 0)[:, None, :, None]
    k, v = (np.where(empty, np.nan, draw(B, H, S, D)) for _ in range(2))
    k = np.where(empty, 1e30, k)
    given = {"q": draw(B, 2 * H, S, D), "k": k, "v": v, **fields}
    return Observation(
        **{n: jnp.asarray(x, jnp.float32) for n, x in given.items()},
        q_pos=jnp.asarray(pos),
        pos=jnp.asarray(np.broadcast_to(pos[:, None], (B, H, S))),
        length=jnp.asarray(LENGTHS, jnp.int32),
        scale=D**-0.5,
    )


def choose(seed=1, keep=12, places=16):
    """(index int32 [batch, kv_heads, places] in time order, unused places = S; lists of survivors)."""
    rng = np.random.default_rng(seed)
    index, lists = np.full((B, H, places), S, np.int32), {}
    for b in range(B):
        for h in range(H):
            chosen = np.sort(rng.choice(LENGTHS[b], keep - h, replace=False))
            index[b, h, : keep - h] = chosen
            lists[b, h] = chosen.tolist()
    return jnp.asarray(index), lists


def cosines(k, n):
    x = np.asarray(k, np.float64)[:n]
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    return x @ x.T


@functools.partial(jax.jit, static_argnums=0)
def reduce(reducer, obs, index, scores):
    made = reducer.survivors(obs, index, scores, {})
    return made.k, made.v


def flat_scores(seed=3):
    return jnp.asarray(np.random.default_rng(seed).random((B, H, S)), jnp.float32)


def check(got, want, lists, atol=2e-5):
    for (b, h), chosen in lists.items():
        np.testing.assert_allclose(
            np.asarray(got)[b, h, : len(chosen)], want[b, h], atol=atol, err_msg=f"{b} {h}"
        )
