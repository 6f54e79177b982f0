"""PyramidInfer's layer schedule: shares that decay with a cosine, compounding from layer to layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kvjax.policies.base import Allocator


@dataclasses.dataclass(frozen=True)
class CosineDecay(Allocator):
    """Layer l keeps in proportion to prod_{m<=l} p_m with p_m = (1-p)(cos(pi m / L) + 1)/2 + p; mean = budget."""

    p: float = 0.9

    def layer_keep(self, layer: int, layers: int, keep: Any, length: Any) -> Any:
        """See `Allocator.layer_keep`; integer arithmetic in units of 1/4096, so that host and device agree."""
        shares = [1.0]
        for m in range(1, layers):
            shares.append(shares[-1] * ((1 - self.p) * (math.cos(math.pi * m / layers) + 1) / 2 + self.p))
        unit = int(4096 * shares[layer] * layers / sum(shares))
        wanted = keep // 4096 * unit + keep % 4096 * unit // 4096
        if isinstance(wanted, int):
            return min(max(wanted, 1), length) if keep < length else length
        import jax.numpy as jnp

        return jnp.where(keep < length, jnp.clip(wanted, 1, length), length)
