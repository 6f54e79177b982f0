"""WindowKV's layer budgets: equal inside a group of neighbouring layers, falling linearly from group to group."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.policies.base import Allocator


@dataclasses.dataclass(frozen=True)
class GroupDecay(Allocator):
    """Group g of G keeps hi - (hi - lo) g / (G - 1) + suffix; lo = 8 b // beta, b = keep - suffix.

    hi makes the mean over layers b; with groups of equal size it is the paper's 2 b - lo.
    """

    group: int = 8
    beta: int = 14
    suffix: int = 32

    def layer_keep(self, layer: int, layers: int, keep: Any, length: Any) -> Any:
        """See `Allocator.layer_keep`."""
        groups = -(-layers // self.group)
        if groups < 2:
            return keep
        free, group = keep - self.suffix, layer // self.group
        # Groups may differ in size: hi is what makes the mean over layers b.
        steps = sum(i // self.group for i in range(layers))
        low = free * 8 // self.beta
        high = (layers * free * (groups - 1) - low * steps) // (layers * (groups - 1) - steps)
        wanted = high - ((high - low) * group + groups - 2) // (groups - 1) + self.suffix
        if isinstance(keep, int):
            return min(max(wanted, 1), length) if self.suffix < keep < length else keep
        return jnp.where((keep > self.suffix) & (keep < length), jnp.clip(wanted, 1, length), keep)
