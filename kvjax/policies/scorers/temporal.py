"""Scorers of allocators' own methods: mean and variance over the window, layer-wide mass, structures of a head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.allocators.heads import Structure
from kvjax.policies.allocators.layers import row_variance, window_before
from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.scorers.attention import AccumulatedAttention, pool


@dataclasses.dataclass(frozen=True)
class MeanVariance(Scorer):
    """CAKE's score: avgpool_kernel( mean_i A + gamma Var_i A ) over the last `window` queries, mean over the group.

    While decoding, the attention of the new query alone, not pooled: slots are no longer in time order.
    """

    window: int = 32
    kernel: int = 5
    gamma: float = 200.0
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        if not obs.prefilling:
            return obs.group(obs.column_mass()), state
        probs, rows = window_before(obs, self.window)
        mean = jnp.sum(probs, axis=2) / jnp.maximum(rows, 1)[:, None, None]
        return obs.group(pool(mean + self.gamma * row_variance(probs, rows), self.kernel, "avg")), state


@dataclasses.dataclass(frozen=True)
class LayerMass(AccumulatedAttention):
    """Attention received so far from all queries, mean over all heads of the layer: one ranking for all heads."""

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots], equal for all heads that hold the same entries."""
        mass, state = super().score(obs, state)
        # Heads of one layer hold the same entries in the same slots, because they share the ranking.
        return jnp.broadcast_to(jnp.mean(mass, axis=1, keepdims=True), mass.shape), state


@dataclasses.dataclass(frozen=True)
class StructureOrder(Scorer):
    """FastGen's order: entries of the structure that a head takes come before all others, by their frequency."""

    profile: Structure = Structure()
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]: frequency in [0, 1], plus 2 inside the head's structure."""
        structure, frequency, special, often = self.profile.profile(obs)
        size = self.profile.size(self.profile.local, obs.length)
        near = obs.valid & (obs.pos >= (obs.length - size)[:, None, None])
        level = structure[..., None]
        member = special | (often & (level >= 1)) | (near & (level >= 2)) | (level == 3)
        return frequency + jnp.where(member, 2.0, 0.0), state



