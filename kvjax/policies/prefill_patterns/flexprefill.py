"""FlexPrefill: each head is vertical-slash or query-aware, and reads as much as the data asks for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.policies.prefill_patterns.base import PrefillPattern
from kvjax.policies.prefill_patterns.blocks import Blocks, covering, largest
from kvjax.policies.prefill_patterns.vertical_slash import pooled, pooled_logits

Array = jax.Array


def divergence(p: Array, q: Array) -> Array:
    """Square root of the Jensen-Shannon divergence of distributions along the last axis, in [0, sqrt(ln 2)]."""
    p, q = (x / jnp.maximum(x.sum(-1, keepdims=True), 1e-30) for x in (p, q))
    m = 0.5 * (p + q)

    def kl(a: Array) -> Array:
        return jnp.sum(jnp.where(a > 0, a * jnp.log(jnp.maximum(a, 1e-30) / jnp.maximum(m, 1e-30)), 0.0), -1)

    return jnp.sqrt(jnp.maximum(0.5 * (kl(p) + kl(q)), 0.0))


def _softmax(logits: Array, seen: Array) -> Array:
    logits = jnp.where(seen, logits, -jnp.inf)
    top = logits.max(-1, keepdims=True)
    weight = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0.0))
    total = weight.sum(-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefill(PrefillPattern):
    """See `kvjax.policies.methods.flexprefill`."""

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int = 0
    min_recall: float = 0.9
    sample: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.gamma <= 1.0 or self.tau < 0 or self.min_budget < 0 or self.max_budget < 0:
            raise ValueError(
                f"flexprefill: gamma={self.gamma} must be in (0, 1], tau={self.tau}, min_budget={self.min_budget} and "
                f"max_budget={self.max_budget} not negative"
            )

    @property
    def _dense_up_to(self) -> int:
        return self.min_tokens or max(2 * self.block, self.min_budget)

    def keep(self, x: Blocks) -> Array:
        """Query-aware where the pooled estimate of the last queries is close to their attention, else vertical-slash."""
        if self.gamma >= 1.0:
            return x.visible
        logits = pooled_logits(x, *pooled(x))
        q, q_pos = x.obs.last_queries(x.sample)
        used = (q_pos >= 0)[:, None, :, None]
        mean = jnp.sum(jnp.where(used, q, 0), 2, keepdims=True, dtype=jnp.float32)
        mean = mean / jnp.maximum(used.sum(2, keepdims=True), 1)
        exists = x.k_range[1] >= 0
        estimate = _softmax(pooled_logits(x, mean, pooled(x)[1]), exists)[:, :, 0]
        distance = divergence(estimate, x.probs_by_block.sum(2))

        least = self._vertical_slash(x, 0.0)
        weight = jnp.where(x.visible, _softmax(logits, x.visible), 0.0)
        aware = (covering(weight, self.gamma * weight.sum((2, 3)), axes=2) & x.visible) | least
        return jnp.where((distance < self.tau)[..., None, None], aware, self._vertical_slash(x, self.gamma))

    def _vertical_slash(self, x: Blocks, gamma: float) -> Array:
        """Blocks of columns and of distances: as many as tokens cover `gamma`, within the budgets, best mass first."""
        most = -(-self.max_budget // x.block) if self.max_budget else x.k_blocks
        least = min(-(-self.min_budget // x.block), most)

        def choose(mass: Array) -> Array:
            tokens = (
                covering(mass, gamma * mass.sum(-1)).sum(-1)
                if gamma
                else jnp.zeros(mass.shape[:-1], jnp.int32)
            )
            by_block = x.sum_blocks(mass[..., : x.slots])
            return largest(by_block, jnp.clip(tokens // x.block + 1, least, most)) & (by_block > 0)

        columns = choose(x.probs.sum(2))
        apart = choose(x.distance_mass)
        apart = jnp.repeat(apart, x.block, axis=-1)
        return columns[:, :, None] | x.band(apart)
