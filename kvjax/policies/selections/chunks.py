"""Whole chunks of neighbouring tokens: ChunkKV, WindowKV, and the entropy-gated variant.

Chunks are cut by rank in time, so padding and earlier evictions do not shift them. All heads rank the same
chunks (scores are summed over heads); a head takes them up to its own count.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.policies.base import PROTECTED, Array, Selection
from kvjax.policies.ordering import split, take


def mask_to_index(mask: Array, capacity: int) -> Array:
    """Slots where mask [..., slots] holds, in slot order, int32 [..., capacity]; `slots` marks unused places."""
    slots = mask.shape[-1]
    index = jnp.sort(jnp.where(mask, jnp.arange(slots, dtype=jnp.int32), slots), axis=-1)[..., :capacity]
    pad = [(0, 0)] * (mask.ndim - 1) + [(0, capacity - index.shape[-1])]
    return jnp.pad(index, pad, constant_values=slots)


def in_time(scores: Array, live: Array, size: int) -> tuple[Array, Array, Array]:
    """Time order, cut in chunks: scores [batch, heads, chunks, size] (0 where a head has no entry), whether any
    head has one [batch, chunks, size], and the ranks [batch, heads, slots]."""
    order = jnp.argsort(~live, axis=-1, stable=True)
    rank = jnp.where(live, jnp.cumsum(live, axis=-1) - 1, live.shape[-1])
    used = take(live, order)
    token = split(jnp.where(used, take(scores, order), 0.0), size)
    return token, split(jnp.any(used, axis=1), size, False), rank


def descending_rank(x: Array) -> Array:
    """Rank of each element along the last axis, 0 = largest; ties in favour of the first."""
    return jnp.argsort(jnp.argsort(-x, axis=-1, stable=True), axis=-1)


@dataclasses.dataclass(frozen=True)
class Chunks(Selection):
    """The best chunks of `length` tokens that fit, whole; by mean score, or by the mean of their best `top`.

    separate: protected entries are kept on their own and chunks are cut from the others; otherwise they lift
    the chunks they are in. A count below one chunk keeps the best tokens of the best chunk. reuse: see `Selection`.
    """

    length: int = 10
    top: int | None = None
    separate: bool = False
    reuse: int = 1

    def select(self, scores: Array, valid: Array, counts: Array, capacity: int) -> Array:
        """See `Selection.select`."""
        fixed = valid & (scores >= PROTECTED) if self.separate else jnp.zeros_like(valid)
        counts = jnp.minimum(counts, capacity)
        room = counts - jnp.sum(fixed, axis=-1)
        token, used, rank = in_time(scores, valid & ~fixed, self.length)
        size = jnp.sum(used, axis=-1)
        best = -jnp.sort(-jnp.where(used[:, None], token, -jnp.inf), axis=-1)[..., : self.top]
        total = jnp.sum(jnp.where(best > -jnp.inf, best, 0.0), axis=(1, 3))
        mean = total / jnp.maximum(jnp.minimum(size, best.shape[-1]), 1)
        token = jnp.sum(token, axis=1)
        order = jnp.argsort(jnp.where(size > 0, -mean, jnp.inf), axis=-1, stable=True)
        fits = jnp.cumsum(take(size, order), axis=-1)[:, None] <= room[..., None]  # [batch, heads, chunks]
        place = jnp.argsort(order, axis=-1)
        whole = jnp.take_along_axis(fits, jnp.broadcast_to(place[:, None], fits.shape), axis=-1)
        # Nothing fits: part of the best chunk.
        inside = descending_rank(jnp.where(used, token, -jnp.inf))[:, None] < room[..., None, None]
        partial = (place == 0)[:, None, :, None] & inside & ~jnp.any(whole, axis=-1)[..., None, None]
        keep = (whole[..., None] | partial) & used[:, None]
        keep = keep.reshape(*counts.shape, -1)
        chosen = take(keep, jnp.minimum(rank, keep.shape[-1] - 1)) & valid & ~fixed
        return mask_to_index(chosen | fixed, capacity)


@dataclasses.dataclass(frozen=True)
class EntropyGatedChunks(Selection):
    """Chunks by falling mean score; one with a high score and low entropy contributes only its best `reduced`.

    Thresholds are the (lower) medians over chunks. The last chunk is cut to the count, and what is left over
    goes to the best unused tokens.
    """

    length: int = 10
    reduced: int = 4

    def select(self, scores: Array, valid: Array, counts: Array, capacity: int) -> Array:
        """See `Selection.select`."""
        counts = jnp.minimum(counts, capacity)
        token, used, rank = in_time(scores, valid, self.length)
        token, size = jnp.sum(token, axis=1), jnp.sum(used, axis=-1)
        mean = jnp.sum(token, axis=-1) / jnp.maximum(size, 1)
        entropy = self._entropy(token, used, size)
        live = size > 0
        gated = live & (mean >= _lower_median(mean, live)) & (entropy < _lower_median(entropy, live))
        cost = jnp.where(gated, jnp.minimum(size, self.reduced), size)
        order = jnp.argsort(jnp.where(live, -mean, jnp.inf), axis=-1, stable=True)
        ordered = take(cost, order)
        before = take(jnp.cumsum(ordered, axis=-1) - ordered, jnp.argsort(order, axis=-1))
        room = jnp.clip(counts[..., None] - before[:, None], 0, cost[:, None])  # [batch, heads, chunks]
        inside = descending_rank(jnp.where(used, token, -jnp.inf))
        keep = ((inside[:, None] < room[..., None]) & used[:, None]).reshape(*counts.shape, -1)
        flat = jnp.broadcast_to(jnp.where(used, token, -jnp.inf).reshape(token.shape[0], 1, -1), keep.shape)
        spare = (counts - jnp.sum(keep, axis=-1))[..., None]
        rest = descending_rank(jnp.where(keep, -jnp.inf, flat))
        keep |= (rest < spare) & (flat > -jnp.inf)
        return mask_to_index(take(keep, jnp.minimum(rank, keep.shape[-1] - 1)) & valid, capacity)

    def _entropy(self, token: Array, used: Array, size: Array) -> Array:
        low = jnp.min(jnp.where(used, token, jnp.inf), axis=-1, keepdims=True)
        shifted = jnp.where(used, token - jnp.minimum(low, 0.0), 0.0)
        p = shifted / (jnp.sum(shifted, axis=-1, keepdims=True) + 1e-8)
        h = -jnp.sum(jnp.where(used, p * jnp.log(p + 1e-8), 0.0), axis=-1)
        return jnp.where(size > 1, jnp.clip(h / jnp.log(jnp.maximum(size, 2)), 0.0, 1.0), 0.0)


def _lower_median(x: Array, mask: Array) -> Array:
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf), axis=-1)
    middle = (jnp.sum(mask, axis=-1, keepdims=True) - 1) // 2
    return jnp.take_along_axis(ordered, jnp.maximum(middle, 0), axis=-1)


@dataclasses.dataclass(frozen=True)
class Crush(Selection):
    """KVCrush: a share of the count goes to representatives of the entries that the scores would evict.

    Signature of an entry: one bit per head, set when its score is in the head's upper half. Evicted entries
    are sorted by Hamming distance to the anchor and picked at even strides.
    """

    share: float = 0.25
    anchor: str = "mean"

    def select(self, scores: Array, valid: Array, counts: Array, capacity: int) -> Array:
        """See `Selection.select`."""
        slots = scores.shape[-1]
        counts = jnp.minimum(counts, capacity)
        # The share applies to what is not protected, so that sinks and recent entries always stay.
        fixed = jnp.sum(valid & (scores >= PROTECTED), axis=-1)
        crush = (jnp.maximum(counts - fixed, 0) * round(self.share * 1000)) // 1000
        rank = descending_rank(jnp.where(valid, scores, -jnp.inf))
        crush = jnp.where(counts >= jnp.sum(valid, axis=-1), 0, crush)
        keep = valid & (rank < (counts - crush)[..., None])
        distance = self._distance(rank < (jnp.sum(valid, axis=-1, keepdims=True) + 1) // 2, valid)
        lost = valid & ~keep
        order = jnp.argsort(jnp.where(lost, distance[:, None], math.inf), axis=-1, stable=True)
        place = jnp.argsort(order, axis=-1)
        n, m = jnp.sum(lost, axis=-1)[..., None], crush[..., None]
        # Entry at place p represents when p = floor(i * n / m) for some i < m.
        i = -(-(place * m) // jnp.maximum(n, 1))
        keep |= lost & (i < m) & ((i * n) // jnp.maximum(m, 1) == place)
        return (
            mask_to_index(keep, min(capacity, slots)) if capacity <= slots else mask_to_index(keep, capacity)
        )

    def _distance(self, bits: Array, valid: Array) -> Array:
        """Hamming distance of every entry's signature [batch, heads, slots] to the anchor: [batch, slots]."""
        heads = jnp.arange(bits.shape[1])[:, None]
        if self.anchor == "mean":
            anchor = 2 * jnp.sum(bits & valid, axis=-1, keepdims=True) > jnp.sum(
                valid, axis=-1, keepdims=True
            )
        else:
            anchor = {"zeros": heads < 0, "ones": heads >= 0, "alternate": heads % 2 == 1}[self.anchor]
        return jnp.sum(bits != anchor, axis=1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Segments(Selection):
    """Entries of equal score belong together: whole runs of equal scores, best first, while they fit.

    When not even the best run fits, its oldest entries fill the count.
    """

    def select(self, scores: Array, valid: Array, counts: Array, capacity: int) -> Array:
        """See `Selection.select`."""
        slots = scores.shape[-1]
        scores = jnp.where(valid, scores, -jnp.inf)
        order = jnp.argsort(-scores, axis=-1, stable=True)
        ranked = take(scores, order)
        place = jnp.arange(slots, dtype=jnp.int32)
        ends = jnp.concatenate([ranked[..., 1:] != ranked[..., :-1], jnp.ones_like(valid[..., :1])], axis=-1)
        end = jax.lax.cummin(jnp.where(ends, place + 1, slots + 1), axis=scores.ndim - 1, reverse=True)
        count = jnp.minimum(counts, capacity)[..., None]
        whole = end <= count
        keep = jnp.where(jnp.any(whole, axis=-1, keepdims=True), whole, place < count)
        return mask_to_index(take(keep, jnp.argsort(order, axis=-1)) & valid, capacity)
