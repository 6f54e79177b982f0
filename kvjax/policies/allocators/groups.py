"""WindowKV's layer budgets: equal inside a group of neighbouring layers, falling linearly from group to group."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.policies.base import Allocator


@dataclasses.dataclass(frozen=True)
class GroupDecay(Allocator):
    """Group g of G keeps hi - (hi - lo) g // (G - 1) + suffix; lo = 8 b // beta, hi = 2 b - lo, b = keep - suffix."""

    group: int = 8
    beta: int = 14
    suffix: int = 32

    def layer_keep(self, layer: int, layers: int, keep: Any, length: Any) -> Any:
        """See `Allocator.layer_keep`."""
        groups = -(-layers // self.group)
        if groups < 2:
            return keep
        free = keep - self.suffix
        low = free * 8 // self.beta
        wanted = 2 * free - low - (2 * (free - low)) * (layer // self.group) // (groups - 1) + self.suffix
        if isinstance(keep, int):
            return min(max(wanted, 1), length) if self.suffix < keep < length else keep
        return jnp.where((keep > self.suffix) & (keep < length), jnp.clip(wanted, 1, length), keep)
