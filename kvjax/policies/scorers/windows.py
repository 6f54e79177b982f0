"""Scorers that read the attention rows of the last prompt queries in their own way."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.calibration import load_layer
from kvjax.policies.observation import Observation
from kvjax.policies.scorers.attention import pool
from kvjax.types import ModelShape


def outside(obs: Observation, x: Array, window: int, fill: float = 0.0) -> Array:
    """x [batch, q_heads or kv_heads, slots] with empty slots and the last `window` positions set to `fill`."""
    pos = obs.pos if x.shape[1] == obs.kv_heads else jnp.repeat(obs.pos, obs.groups, axis=1)
    return jnp.where((pos < 0) | (pos >= (obs.length - window)[:, None, None]), fill, x)


def lift_window(obs: Observation, scores: Array, window: int) -> Array:
    """Scores with the last `window` positions one above the row's maximum."""
    inside = obs.pos >= (obs.length - window)[:, None, None]
    top = jnp.max(jnp.where(obs.valid & ~inside, scores, 0.0), axis=(1, 2), keepdims=True)
    return jnp.where(inside, top + 1.0, scores)


@dataclasses.dataclass(frozen=True)
class PromptGuided(Scorer):
    """Finch's score: mean attention of the last `window` queries, each row times what it could see (less one).

    s[h, j] = mean_group mean_i (visible_i - 1) A[i, j]; without `normalize` it is SnapKV's without pooling. At
    most this call's tokens form the window.
    """

    window: int = 32
    normalize: bool = True
    shared: bool = False  # one ranking for all heads
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        probs = obs.window_probs(self.window)  # [batch, q_heads, window, slots]
        if self.normalize:
            _, q_pos = obs.last_queries(self.window)
            seen = (obs.pos[:, :, None] <= q_pos[:, None, :, None]) & obs.valid[:, :, None]
            visible = jnp.repeat(jnp.sum(seen, axis=-1), obs.groups, axis=1)
            probs = probs * jnp.maximum(visible - 1, 0)[..., None]
        rows = jnp.maximum(jnp.minimum(obs.tokens, self.window), 1)
        scores = obs.group(outside(obs, jnp.sum(probs, axis=2) / rows[:, None, None], self.window))
        if self.shared:
            scores = jnp.broadcast_to(jnp.mean(scores, axis=1, keepdims=True), scores.shape)
        return lift_window(obs, scores, self.window), state


@dataclasses.dataclass(frozen=True)
class RetrievalHeads(Scorer):
    """CompressKV's score: window attention of a few query heads per layer, pooled; one ranking for all KV heads.

    heads: indices per layer, or None to use every head; file: a calibration file with `retrieval_heads` int32
    [layers, n].
    """

    window: int = 8
    kernel: int = 5
    heads: tuple[tuple[int, ...], ...] | None = None
    file: str | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def constants(self, layer: int, shape: ModelShape) -> dict[str, Any]:
        """The layer's heads, when a file is given; ValueError when the inline ones do not fit the model."""
        if self.heads is not None and (
            len(self.heads) != shape.layers
            or not all(row and min(row) >= 0 and max(row) < shape.q_heads for row in self.heads)
        ):
            raise ValueError(
                f"heads must name query heads 0 to {shape.q_heads - 1} for each of {shape.layers} layers, got {self.heads}"
            )
        return {} if self.file is None else load_layer(self.file, ("retrieval_heads",), layer, shape)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots], equal for all heads."""
        q_heads = obs.need("q").shape[1]
        index = jnp.arange(q_heads)
        if self.file is not None:
            index = obs.const["retrieval_heads"]
        elif self.heads is not None:
            index = jnp.asarray(self.heads[obs.layer])
        total = outside(obs, obs.window_mass(self.window), self.window)
        chosen = jnp.take(pool(total, self.kernel, "avg"), index, axis=1)
        scores = jnp.broadcast_to(jnp.mean(chosen, axis=1, keepdims=True), obs.pos.shape)
        return lift_window(obs, scores, self.window), state


@dataclasses.dataclass(frozen=True)
class RecentWeighted(Scorer):
    """PyramidInfer's score: mean attention of the newest queries, the newest weighing `delta`, the oldest 1.

    Rows: the last 1 + floor(share * n) queries of a row of n tokens; mean over all query heads of the layer.
    Those rows' own positions are lifted above all others.
    """

    share: float = 0.2
    delta: float = 1.2
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots], equal for all heads."""
        rows = 1 + obs.tokens * round(self.share * 1000) // 1000
        start = obs.length - rows

        def weigh(probs: Array, q_pos: Array) -> Array:
            age = (q_pos - start[:, None]) / jnp.maximum(rows - 1, 1)[:, None]
            weight = jnp.where(q_pos >= start[:, None], 1.0 + (self.delta - 1.0) * age, 0.0)
            return jnp.einsum("bhqs,bq->bs", probs, weight)

        mean = obs.column_reduce(weigh) / (rows * obs.need("q").shape[1])[:, None]
        scores = jnp.broadcast_to(mean[:, None], obs.pos.shape)
        return jnp.where(obs.pos >= start[:, None, None], 1e6 + scores, scores), state


@dataclasses.dataclass(frozen=True)
class LazyLayer(Scorer):
    """SimLayerKV: evictable tokens of lazy rows get -1, everything else a positive score, newest highest.

    A row is lazy in a layer when its last `last` queries put more than `threshold` of their attention (mean over
    heads, without their own columns) on the first `initial` and the `recent` tokens before them.
    """

    threshold: float = 0.9
    last: int = 1
    recent: int = 1024
    initial: int = 4
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        rows = jnp.maximum(jnp.minimum(obs.tokens, self.last), 1)
        mean = jnp.sum(obs.window_mass(self.last), axis=1) / (rows * obs.need("q").shape[1])[:, None]
        pos, end = obs.pos[:, 0], (obs.length - self.last)[:, None]
        counted = (pos >= 0) & (pos < end) & ((pos < self.initial) | (pos >= end - self.recent))
        lazy = jnp.sum(jnp.where(counted, mean, 0.0), axis=-1) > self.threshold
        lazy &= jnp.sum(pos >= 0, axis=-1) > self.initial + self.recent + self.last
        first = obs.length - (self.recent - self.last)
        lost = (obs.pos >= self.initial) & (obs.pos < first[:, None, None]) & lazy[:, None, None]
        return jnp.where(lost, -1.0, (1.0 + obs.pos) * 2.0**-20), state


@dataclasses.dataclass(frozen=True)
class QueryFilter(Scorer):
    """Q-Filters: projection of keys on the main direction of the queries, mean over the query group.

    The direction is the first right-singular vector of the (uncentred) queries, turned so that most of them
    project positively: from a calibration file with `filters` f32 [layers, kv_heads, dim] (the negated
    direction), or of this call's queries.
    """

    file: str | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Queries, unless a file supplies the direction."""
        return frozenset({"q"} if self.file is None else ())

    def constants(self, layer: int, shape: ModelShape) -> dict[str, Any]:
        """The layer's filters, when a file is given."""
        return {} if self.file is None else load_layer(self.file, ("filters",), layer, shape)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        k = obs.k.astype(jnp.float32)
        if self.file is not None:
            return -jnp.einsum("bhsd,hd->bhs", k, obs.const["filters"].astype(jnp.float32)), state
        mask = (obs.need("q_pos") >= 0)[:, None, :, None]
        q = jnp.where(mask, obs.need("q").astype(jnp.float32), 0.0)
        return jnp.einsum("bhsd,bhd->bhs", k, obs.group(main_direction(q))), state


def main_direction(q: Array) -> Array:
    """First right-singular vector of q [..., tokens, dim], on the side of most rows; zero rows do not count."""
    _, vectors = jnp.linalg.eigh(jnp.einsum("...td,...te->...de", q, q))
    v = vectors[..., -1]
    side = jnp.sum(jnp.sign(jnp.einsum("...td,...d->...t", q, v)), axis=-1, keepdims=True)
    return jnp.where(side < 0, -v, v)


def segment_mean(x: Array, segment: Array, segments: int) -> Array:
    """Mean of x [batch, slots] over equal `segment` ids in 0..segments-1, given back to every member."""

    def one(values: Array, ids: Array) -> Array:
        total = jax.ops.segment_sum(values, ids, segments)
        count = jax.ops.segment_sum(jnp.ones_like(values), ids, segments)
        return (total / jnp.maximum(count, 1.0))[ids]

    return jax.vmap(one)(x, segment)
