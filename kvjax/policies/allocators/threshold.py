"""Entries above a threshold stay, however many there are; a budget only bounds them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Allocator, Array


@dataclasses.dataclass(frozen=True)
class Threshold(Allocator):
    """Count of scores >= `threshold`. Where a layer has more than kv_heads * keep, its lowest ones go too."""

    threshold: float = 0.0
    ragged: ClassVar[bool] = True
    outcome: ClassVar[bool] = True

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """One head may hold the whole layer's entries."""
        return min(length, kv_heads * keep)

    def counts(self, scores: Array, valid: Array, keep: Array, layer: int) -> Array:
        """int32 [batch, kv_heads]."""
        b, h, s = scores.shape
        eligible = valid & (scores >= self.threshold)
        flat = jnp.where(eligible, scores, -jnp.inf).reshape(b, h * s)
        total = jnp.minimum(h * keep, jnp.sum(eligible, axis=(1, 2)))
        _, winners = jax.lax.top_k(flat, h * s)
        head = jnp.where(jnp.arange(h * s) < total[:, None], winners // s, h)
        return jax.vmap(lambda x: jnp.bincount(x, length=h + 1))(head)[:, :h].astype(jnp.int32)

    def decode_counts(self, scores: Array, valid: Array, limit: Array) -> Array:
        """What passes, at most `limit`."""
        return jnp.minimum(limit, jnp.sum(valid & (scores >= self.threshold), axis=-1, dtype=jnp.int32))
