"""More entries for lower layers, in an arithmetic progression (PyramidKV, arXiv 2406.02069)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.allocators.shares import count, protected
from kvjax.policies.base import Allocator, Array


@dataclasses.dataclass(frozen=True)
class Pyramid(Allocator):
    """Layer l of L keeps w protected entries plus b_l, linear from hi to lo, mean b = keep - w.

    lo = b // beta, hi = 2b - lo; where hi would pass the n - w entries there are, hi = n - w and lo = 2b - hi.
    b_l = hi - (hi - lo) l // (L-1) in the lower half and 2b - b_(L-1-l) in the upper one, so that the sum is L b
    exactly: the authors' floored step spends up to L (L-1) / 2 entries more. As in their code, rows with n < 2b
    get b in every layer. variant 'kvpress': pyramid over keep instead of b, float steps, rounded, and keep
    everywhere where lo would be below w.
    """

    beta: int = 20
    variant: str = "paper"
    ragged: ClassVar[bool] = True
    scope: ClassVar[str] = "model"
    ahead: ClassVar[bool] = True

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """At most twice the mean."""
        return min(length, 2 * keep)

    def total_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """kvpress' rounding may add one entry."""
        return kv_heads * (keep + (self.variant == "kvpress"))

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        layers = len(scores)
        window = jnp.minimum(jnp.max(count(protected(scores[0])), axis=1), keep)
        level = self._kvpress if self.variant == "kvpress" else self._paper
        out = []
        for i, v in enumerate(valid):
            kept = jnp.where(length <= keep, length, level(i, layers, keep, window, length))
            out.append(jnp.minimum(kept[:, None], count(v)))
        return out

    def _paper(self, i: int, layers: int, keep: Array, window: Array, n: Array) -> Array:
        b = keep - window
        lo = b // self.beta
        hi = jnp.minimum(2 * b - lo, n - window)
        lo = 2 * b - hi
        mirror = layers - 1 - i
        first = min(i, mirror)
        if i == mirror:
            level = b
        else:
            level = hi - (hi - lo) * first // (layers - 1)
            level = level if i < mirror else 2 * b - level
        return window + jnp.where(n < 2 * b, b, level)

    def _kvpress(self, i: int, layers: int, keep: Array, window: Array, n: Array) -> Array:
        b, room = keep.astype(jnp.float32), (n - window).astype(jnp.float32)
        lo = b / self.beta
        hi = 2 * b - lo
        lo, hi = jnp.where(hi >= room, 2 * b - room, lo), jnp.minimum(hi, room)
        fits = (n >= hi) & (hi >= lo) & (lo >= window)
        level = jnp.round(hi - i * ((hi - lo) / max(layers - 1, 1))).astype(jnp.int32)
        return jnp.where(fits, level, keep)
