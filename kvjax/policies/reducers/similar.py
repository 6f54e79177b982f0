"""Losers are merged into the survivor whose key is most similar: kvpress' merging, D2O, EMS."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.policies.base import PROTECTED, Array, Reducer
from kvjax.policies.observation import Observation
from kvjax.policies.reducers.nearest import blend, fold, gather, losers, nearest


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

    K_j <- (K_j + sum u_i K_i) / (1 + number merged), V likewise; the threshold is `threshold`, or the mean of u over
    the layer's losers when it is None. weights 'cosine' is the authors' code, whose weights below 1 shrink what is
    merged; 'normalised' divides by 1 + sum u instead.
    """

    threshold: float | None = None
    weights: str = "cosine"
    merges: ClassVar[bool] = True

    def reduce(self, obs: Observation, index: Array, scores: Array) -> tuple[Array, Array]:
        """Survivors with similar losers averaged in."""
        k, v = gather(obs.k, index), gather(obs.v, index)
        lost = losers(obs, index)
        cosine, place = nearest(obs.k, k, index < obs.pos.shape[2])
        cosine = jnp.where(jnp.isfinite(cosine), cosine, 0.0)
        level = self.threshold
        if level is None:
            n = jnp.maximum(jnp.sum(lost, axis=(1, 2), keepdims=True), 1)
            level = jnp.sum(jnp.where(lost, cosine, 0.0), axis=(1, 2), keepdims=True) / n
        weight = jnp.where(lost & (cosine >= level), jnp.maximum(cosine, 0.0), 0.0)
        counted = weight if self.weights == "normalised" else (weight > 0).astype(jnp.float32)
        _, total = fold(obs.k, counted, place, k.shape[2])
        return tuple(
            blend(mine, fold(x, weight, place, k.shape[2])[0], total) for mine, x in ((k, obs.k), (v, obs.v))
        )


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
