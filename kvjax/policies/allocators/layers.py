"""Layers of a model compete: the share of a layer follows from a statistic of its scores or its attention."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.allocators.shares import count, divide_layers, protected, split_layers
from kvjax.policies.base import Allocator, Array
from kvjax.policies.head_scores import check_file
from kvjax.policies.observation import Observation


class LayerCompetition(Allocator):
    """Base: `measure` gives a weight f32 [batch], layers share the budget in proportion, heads alike."""

    ragged: ClassVar[bool] = True
    scope: ClassVar[str] = "model"

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """A layer may win all it has."""
        return length

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        return split_layers(list(stats), scores, valid, keep)


def free_mass(scores: Array, valid: Array) -> Array:
    """Scores of entries that are not protected, shifted to be non-negative where some are negative; else 0."""
    free = valid & ~protected(scores)
    low = jnp.min(jnp.where(free, scores, 0.0), axis=-1, keepdims=True)
    return jnp.where(free, scores - low, 0.0)


@dataclasses.dataclass(frozen=True)
class Uncertainty(LayerCompetition):
    """ZigZagKV (arXiv 2412.09036): a layer whose mass is spread over more entries gets more.

    LMBA_l = mean over heads of the number of largest scores that reach the fraction p of the free mass;
    B_l = B_min + (B - B_min) L LMBA_l / sum LMBA, B_min = floor * B. Scores of the protected window are left out.
    """

    p: float = 0.9
    floor: float = 0.2

    def measure(self, obs: Observation, scores: Array) -> Array:
        """LMBA, f32 [batch]."""
        mass = jnp.sort(free_mass(scores, obs.valid), axis=-1, descending=True)
        reached = jnp.cumsum(mass, axis=-1)
        need = self.p * reached[..., -1:]
        lmba = 1 + jnp.sum((reached < need) & (mass > 0), axis=-1)
        return jnp.mean(lmba.astype(jnp.float32), axis=1)

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        low = []
        for s in scores:
            fixed = jnp.max(count(protected(s)), axis=1)
            low.append(jnp.maximum(keep * round(self.floor * 1000) // 1000 - fixed, 0))
        return split_layers(list(stats), scores, valid, keep, low)


@dataclasses.dataclass(frozen=True)
class Preference(LayerCompetition):
    """CAKE (arXiv 2503.12491): P = H^(1/tau1) V^(1/tau2), entropy and temporal variance of window attention.

    With A the attention of the last `window` queries on entries before the window: H = -sum A ln(A + 1e-10) over
    heads, queries and entries; V = sum over heads and entries of the variance of A over the queries (unbiased).
    b_l = P_l / sum P of the budget, window excluded, at most `ceiling` times the mean (None: no limit).
    """

    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0
    ceiling: int | None = None
    cascades: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def _most(self, keep: Array) -> Array | None:
        return None if self.ceiling is None else self.ceiling * keep

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        return split_layers(list(stats), scores, valid, keep, ceiling=self._most(keep))

    def cascade_counts(self, fixed, held, keep, layers, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        return divide_layers(list(stats), fixed, held, keep, ceiling=self._most(keep), layers=layers)

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """What the ceiling allows; layers that wait for the last hold no more candidates than that."""
        return length if self.ceiling is None else min(length, self.ceiling * keep)

    def measure(self, obs: Observation, scores: Array) -> Array:
        """P, f32 [batch]."""
        probs, rows = window_before(obs, self.window)
        entropy = -jnp.sum(probs * jnp.log(probs + 1e-10), axis=(1, 2, 3))
        spread = jnp.sum(row_variance(probs, rows), axis=(1, 2))
        return jnp.maximum(entropy, 0.0) ** (1 / self.tau1) * spread ** (1 / self.tau2)


def window_before(obs: Observation, window: int) -> tuple[Array, Array]:
    """Attention f32 [batch, q_heads, window, slots] of the last queries on entries before them; valid rows [batch]."""
    probs = obs.window_probs(window)
    rows = jnp.minimum(obs.tokens, window)
    pos = jnp.repeat(obs.pos, obs.groups, axis=1)
    before = (pos >= 0) & (pos < (obs.length - rows)[:, None, None])
    return jnp.where(before[:, :, None], probs, 0.0), rows


def row_variance(probs: Array, rows: Array) -> Array:
    """Unbiased variance over axis 2 of which the last `rows` int32 [batch] entries count: [batch, q_heads, slots]."""
    n = rows[:, None, None].astype(jnp.float32)
    used = jnp.arange(probs.shape[2]) >= probs.shape[2] - rows[:, None]
    mean = jnp.sum(probs, axis=2) / jnp.maximum(n, 1)
    gap = jnp.where(used[:, None, :, None], probs - mean[:, :, None], 0.0)
    return jnp.sum(gap * gap, axis=2) / jnp.maximum(n - 1, 1)


@dataclasses.dataclass(frozen=True)
class GlobalTop(LayerCompetition):
    """DynamicKV (arXiv 2412.14838): layers keep in proportion to their places in the global top-k of all scores.

    k = the budget of all layers and heads together, protected entries excluded; a layer gets at most rho times
    the mean. The authors re-allocate after every 4th layer; the last allocation, over all layers, is this one.
    """

    rho: int = 10

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """rho times the mean."""
        return min(length, self.rho * keep)

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        free = [jnp.where(v & ~protected(s), s, -jnp.inf) for s, v in zip(scores, valid)]
        rows, heads = free[0].shape[:2]
        everything = jnp.concatenate([f.reshape(rows, -1) for f in free], axis=1)
        fixed = sum(jnp.sum(jnp.minimum(count(protected(s)), keep[:, None]), axis=1) for s in scores)
        wanted = len(scores) * heads * keep - fixed
        order = jnp.sort(everything, axis=1, descending=True)
        last = jnp.clip(wanted - 1, 0, order.shape[1] - 1)
        level = jnp.where(wanted > 0, jnp.take_along_axis(order, last[:, None], axis=1)[:, 0], jnp.inf)
        won = [jnp.sum((f >= level[:, None, None]) & (f > -jnp.inf), axis=(1, 2)) for f in free]
        return split_layers(
            [w.astype(jnp.float32) for w in won], scores, valid, keep, ceiling=self.rho * keep
        )


@dataclasses.dataclass(frozen=True)
class GlobalPrefix(LayerCompetition):
    """PrefixKV (arXiv 2412.03409): every layer keeps its best entries up to one global level of mass p.

    With cdf_l the cumulative sum of the layer's sorted, normalised scores (mean over heads), layer l keeps the
    least number with cdf_l >= p; p is found by bisection so that the layers together keep the budget.
    """

    def measure(self, obs: Observation, scores: Array) -> Array:
        """cdf f32 [batch, slots]."""
        mass = jnp.mean(free_mass(scores, obs.valid), axis=1)
        mass = jnp.sort(mass, axis=-1, descending=True)
        return jnp.cumsum(mass, axis=-1) / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-30)

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        fixed = sum(jnp.minimum(jnp.max(count(protected(s)), axis=1), keep) for s in scores)
        total = len(scores) * keep - fixed
        room = [jnp.max(count(v & ~protected(s)), axis=1) for s, v in zip(scores, valid)]

        def sizes(p: Array) -> list[Array]:
            found = [jnp.sum(cdf < p[:, None], axis=-1, dtype=jnp.int32) + 1 for cdf in stats]
            return [jnp.minimum(f, r) for f, r in zip(found, room)]

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            lo, hi = bounds
            mid = (lo + hi) / 2
            fits = sum(sizes(mid)) <= total
            return jnp.where(fits, mid, lo), jnp.where(fits, hi, mid)

        zero = jnp.zeros(keep.shape, jnp.float32)
        level, _ = jax.lax.fori_loop(0, 24, halve, (zero, zero + 1))
        found = sizes(level)
        return split_layers([f.astype(jnp.float32) for f in found], scores, valid, keep, found)


@dataclasses.dataclass(frozen=True)
class Density(LayerCompetition):
    """D2O (arXiv 2406.13035): layers whose attention is concentrated on few keys get less.

    u_l = mean over heads of the min-max normalised (over heads) variance over keys of the attention that a key
    received from all prompt queries; share = softmax(-u) over layers. The first `first` and the last `last` layers
    stay whole where the budget allows it and leaves the others a tenth of the mean.
    """

    first: int = 0
    last: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def measure(self, obs: Observation, scores: Array) -> Array:
        """u, f32 [batch]."""
        mass = obs.column_mass()
        valid = jnp.repeat(obs.valid, obs.groups, axis=1)
        n = jnp.maximum(jnp.sum(valid, axis=-1), 1)
        mean = jnp.sum(jnp.where(valid, mass, 0.0), axis=-1) / n
        gap = jnp.where(valid, mass - mean[..., None], 0.0)
        var = jnp.sum(gap * gap, axis=-1) / jnp.maximum(n - 1, 1)
        low, high = jnp.min(var, axis=1, keepdims=True), jnp.max(var, axis=1, keepdims=True)
        return jnp.mean((var - low) / jnp.maximum(high - low, 1e-30), axis=1)

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        layers = len(scores)
        weights = jax.nn.softmax(-jnp.stack(stats), axis=0)
        held = [jnp.max(count(v), axis=1) for v in valid]
        whole = [i < self.first or i >= layers - self.last for i in range(layers)]
        spent = sum(h for h, w in zip(held, whole) if w) + (layers - sum(whole)) * (keep // 10)
        fits = spent <= layers * keep
        low: list[Any] = []
        for h, w, s in zip(held, whole, scores):
            fixed = jnp.max(count(protected(s)), axis=1)
            low.append(jnp.where(fits, h - fixed, 0) if w else jnp.zeros_like(h))
        return split_layers(list(weights), scores, valid, keep, low)


@dataclasses.dataclass(frozen=True)
class LayerErrors(LayerCompetition):
    """CompressKV (arXiv 2508.02401): B_l = floor + e_l (B - floor) L, in [floor, 3B], e_l an eviction error
    measured beforehand and normalised to sum 1; what the ceiling cuts goes to the other layers."""

    errors: tuple[float, ...] = ()
    floor: int = 32
    file: str = ""
    ahead: ClassVar[bool] = True

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """Three times the mean."""
        return min(length, 3 * keep)

    def check(self, shape: Any) -> None:
        """One error a layer."""
        check_file(self.file, shape)
        if len(self.errors) != shape.layers:
            raise ValueError(
                f"layer_errors has {len(self.errors)} entries, the model has {shape.layers} layers"
            )

    def measure(self, obs: Observation, scores: Array) -> Array:
        """The layer's error, f32 [batch]."""
        return jnp.full(obs.length.shape, self.errors[obs.layer], jnp.float32)

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        floor = jnp.minimum(self.floor, keep)
        low = [jnp.maximum(floor - jnp.max(count(protected(s)), axis=1), 0) for s in scores]
        return split_layers(list(stats), scores, valid, keep, low, ceiling=3 * keep)
