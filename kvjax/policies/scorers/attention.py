"""Scorers that read attention probabilities."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation


def pool(x: Array, kernel: int, kind: str) -> Array:
    """Stride-1 pooling over the last axis with padding kernel//2; 'avg' counts the padded zeros, 'max' does not."""
    if kernel == 1:
        return x
    window, pad = (1,) * (x.ndim - 1) + (kernel,), ((0, 0),) * (x.ndim - 1) + ((kernel // 2, kernel // 2),)
    strides = (1,) * x.ndim
    if kind == "avg":
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, pad) / kernel
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, pad)


@dataclasses.dataclass(frozen=True)
class WindowAttention(Scorer):
    """SnapKV's score: mean attention of the last `window` queries, pooled along the sequence, mean over the group.

    s[h, j] = mean_{group} pool_kernel( mean_{i in window} A[h, i, j] ) for entries before the window. The
    softmax runs over all visible entries, then the window's columns are cut off (they are protected instead).
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]; the window's own entries get the row maximum plus 1."""
        mass = obs.window_mass(self.window)
        queries = jnp.minimum(obs.tokens, self.window)
        mean = mass / jnp.maximum(queries, 1)[:, None, None]
        pos = jnp.repeat(obs.pos, obs.groups, axis=1)
        inside = pos >= (obs.length - self.window)[:, None, None]
        mean = jnp.where(inside | (pos < 0), 0.0 if self.pooling == "avg" else -jnp.inf, mean)
        scores = obs.group(pool(mean, self.kernel, self.pooling))
        inside = obs.pos >= (obs.length - self.window)[:, None, None]
        top = jnp.max(jnp.where(obs.valid & ~inside, scores, 0.0), axis=(1, 2), keepdims=True)
        return jnp.where(inside, top + 1.0, scores), state


@dataclasses.dataclass(frozen=True)
class LastQuery(Scorer):
    """TOVA's score: attention of the last query, mean over all query heads of the layer (arXiv 2401.06104)."""

    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots], equal for all heads."""
        row = obs.window_mass(1) if obs.prefilling else obs.column_mass()
        mean = jnp.mean(row, axis=1, keepdims=True)
        return jnp.broadcast_to(mean, obs.pos.shape), state


@dataclasses.dataclass(frozen=True)
class AccumulatedAttention(Scorer):
    """H2O's score: attention received so far, summed over all queries (arXiv 2306.14048), mean over the group.

    per_query: divided by the number of positions from the entry on, kvpress' ObservedAttention.
    """

    per_query: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The accumulated mass, f32 per slot."""
        return {"mass": ((), "float32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]: the state plus this call's column mass."""
        mass = state["mass"] + obs.group(obs.column_mass())
        if self.per_query:
            return mass / jnp.maximum(obs.length[:, None, None] - obs.pos, 1), {"mass": mass}
        return mass, {"mass": mass}
