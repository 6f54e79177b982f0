"""Losers are merged into the survivor whose key is most similar: kvpress' merging, D2O, EMS."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.base import PROTECTED, Array
from kvjax.policies.observation import Observation
from kvjax.policies.reducers.nearest import blend, fold, gather, losers, nearest, unit
from kvjax.policies.reducing import Reducer, Survivors, Written

_UNSET = -2.0  # no cosine is that low


@dataclasses.dataclass(frozen=True)
class MergeValues(Reducer):
    """kvpress' Merging: a loser's value goes into its most similar survivor; keys stay.

    w = max(cos, 0) [cos >= threshold] ||v_e|| / (||v_e|| + ||v_t|| + 1e-6); v_t <- (v_t + sum w v_e) / (1 + sum w).
    fraction < 1 merges only that share of a head's losers, the most similar ones: those at or above the
    (1 - fraction) quantile.
    """

    threshold: float = 0.0
    fraction: float = 1.0
    merges: ClassVar[bool] = True

    def reduce(self, obs: Observation, index: Array, scores: Array) -> tuple[Array, Array]:
        """Survivors' keys, and their values with the losers' folded in."""
        k, v = gather(obs.k, index), gather(obs.v, index)
        lost = losers(obs, index)
        cosine, place = nearest(obs.k, k, index < obs.pos.shape[2])
        ok = lost & (cosine >= self.threshold)
        if self.fraction < 1.0:
            n = jnp.sum(lost, axis=-1, keepdims=True)
            rank = jnp.argsort(jnp.argsort(jnp.where(ok, -cosine, jnp.inf), axis=-1, stable=True), axis=-1)
            ok &= rank < n - jnp.ceil((n - 1) * (1.0 - self.fraction) - 1e-6).astype(jnp.int32)
        norm = jnp.linalg.norm(obs.v.astype(jnp.float32), axis=-1)
        target = jnp.take_along_axis(jnp.linalg.norm(v.astype(jnp.float32), axis=-1), place, axis=-1)
        weight = jnp.where(ok, jnp.maximum(cosine, 0.0) * norm / (norm + target + 1e-6), 0.0)
        added, total = fold(obs.v, weight, place, k.shape[2])
        return k, blend(v, added, total)


@dataclasses.dataclass(frozen=True)
class MergeSimilar(Reducer):
    """D2O: losers whose best cosine u is at least the threshold merge into that survivor, others vanish.

    K_j <- (K_j + sum u_i K_i) / (1 + number merged), V likewise. The threshold is `threshold`, or, when that is None,
    the mean of u over the layer's first losers, and half of it plus half of the mean of u over those of every call
    after that: of a chunk of a prompt, or of a decode step, where each head evicts one entry. It is kept per layer and
    row, and each head compares its own u (the authors' code compares the mean over heads). weights 'cosine' is that
    code, whose weights below 1 shrink what is merged; 'normalised' divides by 1 + sum u instead.
    """

    threshold: float | None = None
    weights: str = "cosine"
    merges: ClassVar[bool] = True
    absorbs: ClassVar[bool] = True

    def state(self) -> dict[str, float]:
        """The moving threshold, the same for all heads; below -1 before the first loser."""
        return {"level": _UNSET} if self.threshold is None else {}

    def level(self, obs: Observation, cosine: Array, lost: Array) -> tuple[Array | float, dict[str, Array]]:
        """(threshold [batch, 1, 1], new state) once `lost` [batch, kv_heads, n] with best cosines `cosine` left."""
        if self.threshold is not None:
            return self.threshold, {}
        n = jnp.sum(lost, axis=(1, 2))[:, None]
        mean = jnp.sum(jnp.where(lost, cosine, 0.0), axis=(1, 2))[:, None] / jnp.maximum(n, 1)
        old = obs.state.get("level", jnp.full(obs.pos.shape[:2], _UNSET))
        moved = jnp.where(old < -1.0, mean, 0.5 * old + 0.5 * mean)
        new = jnp.where(n > 0, moved, old)
        return new[:, :1, None], {"level": new}

    def survivors(self, obs: Observation, index: Array, scores: Array, state: dict[str, Array]) -> Survivors:
        """Survivors with similar losers averaged in."""
        k, v = gather(obs.k, index), gather(obs.v, index)
        lost = losers(obs, index)
        cosine, place = nearest(obs.k, k, index < obs.pos.shape[2])
        cosine = jnp.where(jnp.isfinite(cosine), cosine, 0.0)
        level, new = self.level(obs, cosine, lost)
        weight = jnp.where(lost & (cosine >= level), jnp.maximum(cosine, 0.0), 0.0)
        counted = weight if self.weights == "normalised" else (weight > 0).astype(jnp.float32)
        _, total = fold(obs.k, counted, place, k.shape[2])
        k, v = (
            blend(mine, fold(x, weight, place, k.shape[2])[0], total) for mine, x in ((k, obs.k), (v, obs.v))
        )
        return Survivors(k, v, state=new)

    def absorb(self, obs: Observation, victim: Array) -> Written:
        """The evicted entry averaged into the one with the most similar key; one slot a head changes."""
        at = victim[..., None]
        usable = obs.valid & (jnp.arange(obs.pos.shape[2]) != at)
        lost_k, lost_v = gather(obs.k, jnp.maximum(at, 0)), gather(obs.v, jnp.maximum(at, 0))
        cosine = jnp.einsum("bhsd,bhd->bhs", unit(obs.k), unit(lost_k)[:, :, 0], precision="highest")
        cosine = jnp.where(usable, cosine, -jnp.inf)
        target = jnp.argmax(cosine, axis=-1)[..., None]
        best = jnp.take_along_axis(cosine, target, axis=-1)
        lost = (at >= 0) & jnp.isfinite(best)
        level, new = self.level(obs, best, lost)
        weight = jnp.where(lost & (best >= level), jnp.maximum(best, 0.0), 0.0)
        counted = weight if self.weights == "normalised" else (weight > 0).astype(jnp.float32)
        k, v = (
            blend(gather(x, target), weight[..., None] * gone.astype(jnp.float32), counted)
            for x, gone in ((obs.k, lost_k), (obs.v, lost_v))
        )
        return Written(jnp.where(weight > 0, target, -1).astype(jnp.int32), k, v, new)


@dataclasses.dataclass(frozen=True)
class EvictThenMerge(Reducer):
    """EMS: the best losers merge into the most similar centre, or into a zero class that is thrown away.

    Of each head's losers the `sources` times as many as it keeps, best scores first, are candidates; one joins the
    survivor of largest cosine if that is at least `threshold`. Weights are the scores (protected survivors weigh as
    much as the best of the others): k <- (w_c k_c + sum w_i k_i) / (w_c + sum w_i), v likewise. The paper adapts
    candidates and threshold per head; here the threshold decides how many of a head's candidates are merged.
    """

    threshold: float = 0.6
    sources: float = 1.0
    merges: ClassVar[bool] = True

    def reduce(self, obs: Observation, index: Array, scores: Array) -> tuple[Array, Array]:
        """Class centres with their members averaged in."""
        slots = obs.pos.shape[2]
        k, v = gather(obs.k, index), gather(obs.v, index)
        lost, usable = losers(obs, index), index < slots
        kept = jnp.sum(usable, axis=-1, keepdims=True)
        rank = jnp.argsort(jnp.argsort(jnp.where(lost, -scores, jnp.inf), axis=-1, stable=True), axis=-1)
        candidate = lost & (rank < kept * round(self.sources * 1000) // 1000)
        cosine, place = nearest(obs.k, k, usable)
        free = obs.valid & (scores < PROTECTED)
        low = jnp.min(jnp.where(free, scores, jnp.inf), axis=-1, keepdims=True)
        mass = jnp.where(free, scores - jnp.minimum(low, 0.0), 0.0) + 1e-6
        mass = jnp.where(scores >= PROTECTED, jnp.max(mass, axis=-1, keepdims=True), mass)
        weight = jnp.where(candidate & (cosine >= self.threshold), mass, 0.0)
        own = jnp.where(usable, gather(mass, index), 1.0)
        out = []
        for mine, x in ((k, obs.k), (v, obs.v)):
            added, total = fold(x, weight, place, k.shape[2])
            out.append(blend(mine, added, total, own))
        return out[0], out[1]
