"""Scorers that rank tokens for precision rather than for eviction."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation


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
