"""Scorers that refine another scorer's scores."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.allocators.adaptive import HeadCompetition
from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import NEG, Observation
from kvjax.policies.ordering import hash_gumbel, hash_uniform, time_rank


def projected_norm(v: Array, wo: Array, order: int, block: int = 256) -> Array:
    """||v_t Wo[h]||_order for every query head: f32 [batch, q_heads, slots], `block` slots at a time.

    v [batch, kv_heads, slots, dim], wo [q_heads, dim, embed].
    """
    b, h, slots, d = v.shape
    size = min(block, slots)
    pad = -slots % size
    blocks = jnp.pad(v.astype(jnp.float32), ((0, 0), (0, 0), (0, pad), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(b, h, -1, size, d), 2, 0)
    wo = wo.astype(jnp.float32).reshape(h, -1, d, wo.shape[-1])

    def one(x: Array) -> Array:
        heads = [
            jnp.linalg.norm(jnp.einsum("bhsd,hde->bhse", x, wo[:, g]), ord=order, axis=-1)
            for g in range(wo.shape[1])
        ]
        return jnp.stack(heads, axis=2)  # [batch, kv_heads, group, size]

    norms = jnp.moveaxis(jax.lax.map(one, blocks), 0, 3)  # [batch, kv_heads, group, blocks, size]
    return norms.reshape(b, h * wo.shape[1], -1)[:, :, :slots]


def top_mask(scores: Array, valid: Array, count: Array) -> Array:
    """bool: the `count` [batch] or [batch, heads] best valid scores of every head."""
    count = count[:, None] if count.ndim == 1 else count
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), axis=-1, stable=True)
    return valid & (jnp.argsort(order, axis=-1) < count[..., None])


@dataclasses.dataclass(frozen=True)
class OutputPerturbation(Scorer):
    """CriticalKV: the inner scorer's best `share` of the budget, then (s + epsilon) * ||v Wo||_1."""

    inner: Scorer
    share: float = 0.5
    epsilon: float = 1e-4

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The inner scorer's fields and the output projection."""
        return self.inner.needs | {"wo"}

    @property
    def prefill_only(self) -> bool:  # type: ignore[override]
        """As the inner scorer."""
        return self.inner.prefill_only

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The inner scorer's state."""
        return self.inner.slot_state()

    def constants(self, layer: int, shape):
        """The inner scorer's constants."""
        return self.inner.constants(layer, shape)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]; first-stage picks get 1e20 plus their norm-weighted score."""
        scores, state = self.inner.score(obs, state)
        first = jnp.maximum(obs.need("keep") * round(self.share * 1000) // 1000, 1 if self.share > 0 else 0)
        norm = obs.group(projected_norm(obs.v, obs.need("wo"), 1))
        weighted = (scores + self.epsilon) * norm
        return jnp.where(top_mask(scores, obs.valid, first), 1e20, weighted), state


@dataclasses.dataclass(frozen=True)
class HeadPerturbation(Scorer):
    """CriticalAdaKV: AdaKV's budgets b_h by the inner scores, then CriticalKV's two stages inside each head.

    Of head h the best int(share * b_h) entries stay by score, the others by (s + epsilon) * ||v Wo||_1; its b_h winners
    are lifted to 1e25 and above, so that heads which compete again get these budgets.
    """

    prefill_only: ClassVar[bool] = True
    inner: Scorer
    alpha: float = 0.2
    share: float = 0.5
    epsilon: float = 1e-4

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The inner scorer's fields and the output projection."""
        return self.inner.needs | {"wo"}

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The inner scorer's state."""
        return self.inner.slot_state()

    def constants(self, layer: int, shape):
        """The inner scorer's constants."""
        return self.inner.constants(layer, shape)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        scores, state = self.inner.score(obs, state)
        budgets = HeadCompetition(self.alpha).counts(scores, obs.valid, obs.need("keep"), obs.layer)
        first = top_mask(scores, obs.valid, budgets * round(self.share * 1000) // 1000)
        weighted = (scores + self.epsilon) * obs.group(projected_norm(obs.v, obs.need("wo"), 1))
        winners = top_mask(jnp.where(first, jnp.inf, weighted), obs.valid, budgets)
        return jnp.where(winners, 1e25, weighted), state


@dataclasses.dataclass(frozen=True)
class Blockwise(Scorer):
    """The inner scorer applied as if the prompt came in blocks: the first K entries, then K of K + block.

    Survivors of the last block get 1, others 0; K is the budget of the layer.
    """

    prefill_only: ClassVar[bool] = True
    inner: Scorer
    block: int = 128

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The inner scorer's fields."""
        return self.inner.needs

    def constants(self, layer: int, shape):
        """The inner scorer's constants."""
        return self.inner.constants(layer, shape)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        rank, keep = time_rank(obs.pos), obs.need("keep")
        steps = -(-obs.pos.shape[2] // self.block)
        blank = {n: jnp.zeros((*obs.pos.shape, *s), t) for n, (s, t) in self.inner.slot_state().items()}

        def step(alive: Array, i: Array) -> tuple[Array, None]:
            start = keep[:, None, None] + i * self.block
            candidates = alive | (obs.valid & (rank >= start) & (rank < start + self.block))
            scores, _ = self.inner.score(obs.replace(pos=jnp.where(candidates, obs.pos, -1)), blank)
            return top_mask(scores, candidates, keep), None

        alive = obs.valid & (rank < keep[:, None, None])
        alive, _ = jax.lax.scan(step, alive, jnp.arange(steps))
        return alive.astype(jnp.float32), state


@dataclasses.dataclass(frozen=True)
class Sampled(Scorer):
    """NACL's second stage: a share of the free budget is drawn without replacement from softmax(s / temperature).

    The best entries by the inner score get 1e6 + s; the rest s / temperature + Gumbel noise, whose largest
    values are an exact sample. `protected` entries of the budget are spoken for.
    """

    inner: Scorer
    share: float = 0.2
    temperature: float = 1.0
    protected: int = 0
    recent: int = 0
    sink: int = 0
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The inner scorer's fields."""
        return self.inner.needs

    @property
    def prefill_only(self) -> bool:  # type: ignore[override]
        """As the inner scorer."""
        return self.inner.prefill_only

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        scores, state = self.inner.score(obs, state)
        newest = obs.length[:, None, None] - self.recent
        free = obs.valid & (obs.pos >= self.sink) & (obs.pos < newest)
        room = jnp.maximum(obs.need("keep")[:, None] - jnp.sum(obs.valid & ~free, axis=-1), 0)
        drawn = room * round(self.share * 1000) // 1000
        heads = jnp.arange(obs.kv_heads)[:, None]
        noise = hash_gumbel(self.seed, obs.layer, heads, obs.pos)
        sampled = jnp.clip(scores / self.temperature + noise, -1e5, 1e5)
        return jnp.where(top_mask(scores, free, room - drawn), 1e6 + scores, sampled), state


@dataclasses.dataclass(frozen=True)
class Random(Scorer):
    """Uniform noise, fixed by seed, layer, head and position."""

    seed: int = 0
    chunk_exact = True

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots] in (0, 1)."""
        heads = jnp.arange(obs.kv_heads)[:, None]
        return jnp.where(obs.valid, hash_uniform(self.seed, obs.layer, heads, obs.pos), NEG), state
