"""Scorers that read keys only."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation


@dataclasses.dataclass(frozen=True)
class KeyNorm(Scorer):
    """score = -||k||_2: keys of small norm draw most attention (arXiv 2406.11430)."""

    chunk_exact: ClassVar[bool] = True

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        return -jnp.linalg.norm(obs.k.astype(jnp.float32), axis=-1), state


@dataclasses.dataclass(frozen=True)
class KeyDiff(Scorer):
    """score = -cos(k, a) with a = mean over valid entries of k/||k|| (arXiv 2504.15364)."""

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        k = obs.k.astype(jnp.float32)
        unit = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
        unit = jnp.where(obs.valid[..., None], unit, 0.0)
        anchor = jnp.sum(unit, axis=2) / jnp.maximum(jnp.sum(obs.valid, axis=2), 1)[..., None]
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.einsum("bhsd,bhd->bhs", unit, anchor), state
