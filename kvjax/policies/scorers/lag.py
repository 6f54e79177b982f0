"""LagKV's score: how tokens vary relative to the range of the tokens that follow."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.ordering import take, time_order, time_rank


@dataclasses.dataclass(frozen=True)
class LagRelative(Scorer):
    """Partitions of `lag` tokens after the sinks; each is normalised by the min and max of the next one.

    s = softmax_tokens(std_channels((x - min) / (max - min))), mean of keys and values, then its rank within the
    partition divided by `lag` unless `cross`. Sinks, the last full partition and the remainder get 1. Rows too
    short for two partitions get a ramp, newest highest. Ties are broken in favour of newer entries by 1e-6.
    """

    sink: int = 4
    lag: int = 128
    cross: bool = False

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        rank, slots = time_rank(obs.pos), obs.pos.shape[2]
        n = jnp.sum(obs.valid, axis=2, keepdims=True)
        after = rank - self.sink
        ramp = jnp.where(after < 0, 1.0, after / jnp.maximum(n - self.sink, 1))
        parts = (slots - self.sink) // self.lag
        if parts < 2:
            return ramp, state
        order = time_order(obs.pos)[:, :, self.sink : self.sink + parts * self.lag]
        values = (self._relative(take(x, order).astype(jnp.float32), parts) for x in (obs.k, obs.v))
        inner = sum(values) / 2
        if not self.cross:
            inner = jnp.argsort(jnp.argsort(inner, axis=-1), axis=-1) / self.lag
        inner = inner.reshape(*inner.shape[:2], -1)
        scored = (after >= 0) & (after // self.lag < (n - self.sink) // self.lag - 1)
        index = jnp.clip(after, 0, inner.shape[2] - 1)
        lagged = jnp.where(scored, take(inner, index), 1.0)
        short = n < self.sink + 2 * self.lag
        return jnp.where(short, ramp, lagged + 1e-6 * rank / slots), state

    def _relative(self, x: Array, parts: int) -> Array:
        """x [batch, heads, parts * lag, dim] in time order -> [batch, heads, parts - 1, lag]."""
        x = x.reshape(*x.shape[:2], parts, self.lag, x.shape[-1])
        ref, now = x[:, :, 1:], x[:, :, :-1]
        low, high = ref.min(axis=3, keepdims=True), ref.max(axis=3, keepdims=True)
        z = (now - low) / jnp.maximum(high - low, 1e-12)
        return jax.nn.softmax(jnp.std(z, axis=-1, ddof=1), axis=-1)
