"""Scorers that estimate the queries to come from the queries seen: Expected Attention and CapKV."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.calibration import load_layer
from kvjax.policies.observation import Observation
from kvjax.policies.ordering import masked_softmax
from kvjax.types import ModelShape


def average_rotation(inv_freq: Array, start: Array, count: int) -> tuple[Array, Array]:
    """Mean cos and sin, f32 [batch, rotary_dim // 2], of RoPE at positions start .. start + count - 1."""
    positions = (start[:, None] + jnp.arange(count)).astype(jnp.float32)
    angle = positions[..., None] * inv_freq
    return jnp.mean(jnp.cos(angle), axis=1), jnp.mean(jnp.sin(angle), axis=1)


def turn(x: Array, cos: Array, sin: Array) -> Array:
    """Apply an (averaged) rotation to the last axis of x; cos and sin broadcast against x[..., :half]."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def query_mean(obs: Observation, sink: int) -> tuple[Array, Array, Array]:
    """Pre-RoPE queries f32, their mask [batch, 1, tokens, 1] and mean [batch, q_heads, dim], sinks left out."""
    q = obs.unrotated_queries().astype(jnp.float32)
    mask = (obs.need("q_pos") >= sink)[:, None, :, None]
    q = jnp.where(mask, q, 0.0)
    return q, mask, jnp.sum(q, axis=2) / jnp.maximum(jnp.sum(mask, axis=2), 1)


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """exp(k.mu + k' S k / 2), normalised over keys: attention expected from Gaussian future queries.

    mu, S: mean and covariance of pre-RoPE queries (of this call without sinks, or from a calibration file with
    arrays `query_mean` [layers, q_heads, dim] and `query_cov` [layers, q_heads, dim, dim]), turned by the mean
    rotation over the next `future` positions. Mean over the query group, then (p + epsilon) * ||v||.
    """

    future: int = 512
    sink: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    stats: str | None = None
    prefill_only: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q", "inv_freq"})

    def constants(self, layer: int, shape: ModelShape) -> dict[str, Any]:
        """The layer's query statistics, when a file is given."""
        if self.stats is None:
            return {}
        return load_layer(self.stats, ("query_mean", "query_cov"), layer, shape)

    def _statistics(self, obs: Observation) -> tuple[Array, Array]:
        if self.stats is not None:
            mu, cov = (obs.const[n].astype(jnp.float32)[None] for n in ("query_mean", "query_cov"))
        else:
            q, mask, mu = query_mean(obs, self.sink)
            centred = jnp.where(mask, q - mu[:, :, None], 0.0)
            count = jnp.maximum(jnp.sum(mask, axis=2), 1)[..., None]
            cov = jnp.einsum("bhti,bhtj->bhij", centred, centred) / count
        cos, sin = average_rotation(obs.need("inv_freq"), obs.length, self.future)
        mu = turn(mu, cos[:, None], sin[:, None])
        cos, sin = cos[:, None, None], sin[:, None, None]
        cov = turn(jnp.swapaxes(turn(cov, cos, sin), 2, 3), cos, sin)
        return mu, jnp.swapaxes(cov, 2, 3)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]; sinks are left to the caller's protection."""
        mu, cov = self._statistics(obs)
        k = obs.k.astype(jnp.float32)
        b, h, slots, d = k.shape
        mu, cov = mu.reshape(-1, h, obs.groups, d), cov.reshape(-1, h, obs.groups, d, d)
        mask = obs.valid & (obs.pos >= self.sink)
        scale, total = obs.scale, jnp.zeros((b, h, slots), jnp.float32)
        for g in range(obs.groups):  # one query head of every group at a time bounds the memory
            logits = jnp.einsum("bhd,bhsd->bhs", jnp.broadcast_to(mu[:, :, g], (b, h, d)), k) * scale
            if self.covariance:
                kc = jnp.einsum("bhsi,bhij->bhsj", k, jnp.broadcast_to(cov[:, :, g], (b, h, d, d)))
                logits += jnp.sum(kc * k, axis=-1) * (scale**2 / 2)
            total += masked_softmax(logits, mask)
        scores = total / obs.groups
        if self.value_norm:
            scores = (scores + self.epsilon) * jnp.linalg.norm(obs.v.astype(jnp.float32), axis=-1)
        return scores, state


@dataclasses.dataclass(frozen=True)
class InformationCapacity(Scorer):
    """CapKV: leverage of values in a capacity matrix weighted by the relevance of their keys.

    c = cos(mean future query, k), w = exp(tau (c - max c)), A = I + sum_t (w_t + 1e-6) v_t v_t',
    s_t = w_t v_t' A^-1 v_t, mean over the query group.
    """

    tau: float = 5.0
    future: int = 512
    sink: int = 4
    prefill_only: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q", "inv_freq"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]; sinks are left to the caller's protection."""
        _, _, mu = query_mean(obs, self.sink)
        cos, sin = average_rotation(obs.need("inv_freq"), obs.length, self.future)
        anchor = _unit(turn(mu, cos[:, None], sin[:, None]))
        v, k = obs.v.astype(jnp.float32), _unit(obs.k.astype(jnp.float32))
        b, h, _, d = k.shape
        anchor = anchor.reshape(b, h, obs.groups, d)
        mask = (obs.valid & (obs.pos >= self.sink))[:, :, None]
        c = jnp.clip(jnp.einsum("bhgd,bhsd->bhgs", anchor, k), -1.0, 1.0) * self.tau
        top = jnp.max(jnp.where(mask, c, -jnp.inf), axis=-1, keepdims=True, initial=-1e30)
        w = jnp.where(mask, jnp.exp(c - top), 0.0)
        capacity = jnp.eye(d) + jnp.einsum("bhgs,bhsd,bhse->bhgde", jnp.where(mask, w + 1e-6, 0.0), v, v)
        factor = jax.scipy.linalg.cho_factor(capacity)
        inverse = jax.scipy.linalg.cho_solve(factor, jnp.broadcast_to(jnp.eye(d), capacity.shape))
        leverage = jnp.einsum("bhsd,bhgde,bhse->bhgs", v, inverse, v)
        return jnp.mean(w * leverage, axis=2), state


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
