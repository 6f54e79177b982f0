"""Heads of one layer compete for the layer's entries (Ada-KV, arXiv 2407.11550)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Allocator, Array


@dataclasses.dataclass(frozen=True)
class HeadCompetition(Allocator):
    """Every head is sure of its best int(alpha * keep) entries; all heads compete for the rest of kv_heads * keep.

    The layer total is exact. This is kvpress's form; the paper instead rounds (1 - alpha) * winners + alpha * keep
    per head, which lets totals drift by a few entries.
    """

    alpha: float = 0.2
    ragged: ClassVar[bool] = True

    def _safe(self, keep: Any) -> Any:
        # Integer arithmetic in units of 1/1000 keeps host and device exactly equal.
        return keep * round(self.alpha * 1000) // 1000

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """All of it but what the other heads are sure of."""
        return min(length, kv_heads * keep - (kv_heads - 1) * self._safe(keep))

    def counts(self, scores: Array, valid: Array, keep: Array, layer: int) -> Array:
        """int32 [batch, kv_heads], summing to kv_heads * keep (or to all valid entries if fewer)."""
        b, h, s = scores.shape
        live = jnp.sum(valid, axis=-1, dtype=jnp.int32)
        safe = jnp.minimum(self._safe(keep)[:, None], live)
        scores = jnp.where(valid, scores, -jnp.inf)
        order = jnp.argsort(-scores, axis=-1, stable=True)
        ranked = jnp.take_along_axis(scores, order, axis=-1)
        ranked = jnp.where(jnp.arange(s) < safe[..., None], jnp.inf, ranked)
        total = jnp.minimum(h * keep, jnp.sum(live, axis=1))
        _, winners = jax.lax.top_k(ranked.reshape(b, h * s), h * s)
        won = jnp.arange(h * s) < total[:, None]
        head = jnp.where(won, winners // s, h)
        return jax.vmap(lambda x: jnp.bincount(x, length=h + 1))(head)[:, :h].astype(jnp.int32)
