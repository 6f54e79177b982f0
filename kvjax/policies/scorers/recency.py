"""Newer is better: the scorer of sliding windows."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation


@dataclasses.dataclass(frozen=True)
class Recency(Scorer):
    """score = position."""

    chunk_exact: ClassVar[bool] = True

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """The position of each entry as its score."""
        return obs.pos.astype(jnp.float32), state
