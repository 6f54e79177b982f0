"""Compactor's two scores (arXiv 2507.08143): non-causal attention inside chunks, and approximate leverage."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.ordering import masked_softmax, masked_zscore, take, time_order, time_rank
from kvjax.policies.scorers.attention import pool


def non_causal_mass(q: Array, k: Array, mask: Array, chunk: int, padded: bool) -> Array:
    """Attention mass of every key from all queries of its own chunk, f32 [batch, heads, tokens].

    q, k [batch, heads, tokens, dim]; mask bool [batch, tokens]. Chunks hold `chunk` consecutive masked-in
    tokens; logits are q.k without a scale. padded: count a short last chunk as filled up with zero vectors
    that attend and are attended, as kvpress does.
    """
    b, h, t, d = q.shape
    size = -(-t // chunk) * chunk
    order = jnp.pad(time_order(jnp.where(mask, jnp.arange(t), -1)), ((0, 0), (0, size - t)))
    live = jnp.arange(size) < jnp.sum(mask, axis=1)[:, None]  # [batch, size], in time order
    used = live.reshape(b, -1, chunk)

    def cut(x: Array) -> Array:
        x = jnp.where(live[:, None, :, None], take(x, order[:, None]).astype(jnp.float32), 0.0)
        return jnp.moveaxis(x.reshape(b, h, -1, chunk, d), 2, 0)

    def one(x: tuple[Array, Array, Array]) -> Array:
        q_c, k_c, use = x  # [batch, heads, chunk, dim] twice, [batch, chunk]
        logits = jnp.einsum("bhid,bhjd->bhij", q_c, k_c)
        if padded:
            return jnp.sum(jax.nn.softmax(logits, axis=-1), axis=2)
        probs = masked_softmax(logits, use[:, None, None])
        return jnp.sum(jnp.where(use[:, None, :, None], probs, 0.0), axis=2)

    mass = jax.lax.map(one, (cut(q), cut(k), jnp.moveaxis(used, 1, 0)))  # [chunks, batch, heads, chunk]
    mass = jnp.moveaxis(mass, 0, 2).reshape(b, h, size)
    rank = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, 0)
    return jnp.where(mask[:, None], take(mass, jnp.broadcast_to(rank[:, None], (b, h, t))), 0.0)


def leverage(keys: Array, mask: Array, sketch: Array, jitter: float = 1e-2) -> Array:
    """max(0, x' (X'X + jitter I)^-1 x) of the centred, sketched rows X; f32 [batch, heads, slots].

    keys [batch, heads, slots, dim], mask bool [batch, heads, slots], sketch f32 [heads, dim, m].
    """
    x = jnp.where(mask[..., None], keys.astype(jnp.float32), 0.0)
    mean = jnp.sum(x, axis=2, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=2), 1)[..., None, None]
    x = jnp.einsum("bhsd,hdm->bhsm", jnp.where(mask[..., None], x - mean, 0.0), sketch)
    gram = jnp.einsum("bhsm,bhsn->bhmn", x, x) + jitter * jnp.eye(x.shape[-1])
    solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), jnp.swapaxes(x, 2, 3))
    return jnp.maximum(jnp.einsum("bhsm,bhms->bhs", x, solved), 0.0)


@dataclasses.dataclass(frozen=True)
class NonCausalAttention(Scorer):
    """Non-causal mass inside chunks, mean over the group, times ||v||, pooled over 3 tokens, z-normalised.

    Entries stored before this call keep the score they got then. padded: see `non_causal_mass`.
    """

    chunk: int = 256
    padded: bool = False
    first: int = 0  # leave out the first and last positions of the row, as Compactor does
    last: int = 0
    prefill_only: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The score given when the entry was new."""
        return {"score": ((), "float32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        q, q_pos = obs.need("q"), obs.need("q_pos")
        t = q.shape[2]
        mask = (q_pos >= self.first) & (q_pos < obs.length[:, None] - self.last)
        k = jnp.repeat(obs.k[:, :, -t:], obs.groups, axis=1)
        mass = obs.group(non_causal_mass(q, k, mask, self.chunk, self.padded))
        scores = mass * jnp.linalg.norm(obs.v[:, :, -t:].astype(jnp.float32), axis=-1)
        scores = pool(jnp.where(mask[:, None], scores, 0.0), 3, "avg")
        scores = masked_zscore(scores, jnp.broadcast_to(mask[:, None], scores.shape))
        scores = jnp.concatenate([state["score"][:, :, : obs.pos.shape[2] - t], scores], axis=2)
        return scores, {"score": scores}


@dataclasses.dataclass(frozen=True)
class Leverage(Scorer):
    """Approximate leverage scores of pre-RoPE keys, z-normalised per row over heads and tokens."""

    sketch: int = 48
    seed: int = 0
    first: int = 0
    last: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"inv_freq"})

    def draw(self, layer: int, heads: int, dim: int) -> Array:
        """The Gaussian sketch f32 [heads, dim, sketch] / sqrt(sketch) of a layer, fixed by the seed."""
        key = jax.random.fold_in(jax.random.key(self.seed), layer)
        return jax.random.normal(key, (heads, dim, self.sketch)) * self.sketch**-0.5

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        mask = (obs.pos >= self.first) & (obs.pos < obs.length[:, None, None] - self.last)
        sketch = self.draw(obs.layer, obs.kv_heads, obs.k.shape[-1])
        return masked_zscore(leverage(obs.unrotated_keys(), mask, sketch), mask), state


@dataclasses.dataclass(frozen=True)
class Compactor(Scorer):
    """blending * leverage + non-causal attention, both without the first and last positions, z-normalised."""

    blending: float = 0.35
    chunk: int = 256
    sketch: int = 48
    seed: int = 0
    padded: bool = False
    first: int = 8
    last: int = 4
    prefill_only: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q", "inv_freq"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The non-causal score given when the entry was new."""
        return {"score": ((), "float32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]; the ends are left to the caller's protection."""
        near, state = NonCausalAttention(self.chunk, self.padded, self.first, self.last).score(obs, state)
        if self.blending == 0.0:
            return near, state
        far, _ = Leverage(self.sketch, self.seed, self.first, self.last).score(obs, {})
        return self.blending * far + near, state


@dataclasses.dataclass(frozen=True)
class ValueGuided(Scorer):
    """CUR leverage by squared norms: ||k||^2 and ||v||^2, each as a share of its block of `block` tokens.

    kind: product, key, value or mean of the two shares; block 0 skips the local normalisation.
    """

    kind: str = "product"
    block: int = 16

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        k, v = (self._share(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1), obs.pos) for x in (obs.k, obs.v))
        scores = {"product": k * v, "key": k, "value": v, "mean": (k + v) / 2}[self.kind]
        total = jnp.sum(jnp.where(obs.valid, scores, 0.0), axis=2, keepdims=True)
        return scores / jnp.maximum(total, 1e-30), state

    def _share(self, x: Array, pos: Array) -> Array:
        if self.block == 0:
            return x
        slots = x.shape[2]
        x = jnp.where(pos >= 0, x, 0.0)
        ordered = take(x, time_order(pos))
        ordered = jnp.pad(ordered, ((0, 0), (0, 0), (0, -slots % self.block)))
        sums = jnp.sum(ordered.reshape(*x.shape[:2], -1, self.block), axis=-1)
        return x / jnp.maximum(take(sums, time_rank(pos) // self.block), 1e-30)
