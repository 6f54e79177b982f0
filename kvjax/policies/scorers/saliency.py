"""Scorers that rank tokens for precision rather than for eviction."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.scorers.attention import pool


@dataclasses.dataclass(frozen=True)
class NormalisedAttention(Scorer):
    """Attention of the last `probes` queries on an entry, divided by how many of them see it (ZipCache).

    The mean over the visible probes, so that early and late tokens compare; summed over the query group.
    """

    probes: int = 64
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        probs = obs.window_probs(self.probes)  # [batch, q_heads, probes, slots]
        _, q_pos = obs.last_queries(self.probes)
        sees = (obs.pos[:, :, None] <= q_pos[:, None, :, None]) & (obs.pos >= 0)[:, :, None]
        count = jnp.maximum(jnp.sum(sees, axis=2), 1)
        return obs.group(jnp.sum(probs, axis=2), jnp.sum) / count, state


@dataclasses.dataclass(frozen=True)
class PeakAttention(Scorer):
    """The largest attention of the last `window` queries on an entry, over the query group (QAQ)."""

    window: int = 5
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        return obs.group(jnp.max(obs.window_probs(self.window), axis=2), jnp.max), state


@dataclasses.dataclass(frozen=True)
class MeanAndVariance(Scorer):
    """Mean plus `gamma` times the variance of the attention of the last `window` queries, pooled (ARKV).

    The variance is taken over queries and counts only if there is more than one. The window's own entries are
    protected by the caller.
    """

    window: int = 32
    gamma: float = 263.8
    kernel: int = 5
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        probs = obs.window_probs(self.window)
        count = jnp.minimum(obs.tokens, self.window)[:, None, None].astype(jnp.float32)
        mean = jnp.sum(probs, axis=2) / jnp.maximum(count, 1)
        square = jnp.sum(probs * probs, axis=2) / jnp.maximum(count, 1)
        score = mean + self.gamma * jnp.maximum(square - mean * mean, 0.0)
        return obs.group(pool(score, self.kernel, "avg")), state
