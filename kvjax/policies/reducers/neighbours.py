"""Losers are merged into a survivor that is near in the sequence: KVMerger, Elastic Cache, Chelsea, CaM."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import PROTECTED, Array, State
from kvjax.policies.observation import Observation
from kvjax.policies.ordering import hash_uniform, take, time_order, time_rank
from kvjax.policies.reducers.nearest import blend, fold, gather, losers, unit
from kvjax.policies.reducing import LOG_COUNT, Reducer, Written


def places_of(index: Array, slots: int) -> Array:
    """int32 [batch, kv_heads, slots]: the place of each survivor in `index`, -1 for other slots."""
    number = jnp.broadcast_to(jnp.arange(index.shape[2]), index.shape)

    def one(i: Array, n: Array) -> Array:
        return jnp.full(slots, -1, jnp.int32).at[i].set(n.astype(jnp.int32), mode="drop")

    return jax.vmap(jax.vmap(one))(index, number)


def last_seen(x: Array, where: Array) -> Array:
    """For each entry the latest x [..., n] at or before it where `where` holds, else -1; x is not negative."""
    n = x.shape[-1]
    at = jax.lax.cummax(jnp.where(where, jnp.arange(n), -1), axis=x.ndim - 1)
    return jnp.where(at >= 0, jnp.take_along_axis(x, jnp.maximum(at, 0), axis=-1), -1)


def anchors(obs: Observation, index: Array, connected: Array | None = None) -> Array:
    """int32 [batch, kv_heads, slots]: the place of the survivor nearest in time, -1 if there is none.

    connected: bool per entry in time order, True when it belongs to the same set as the entry before it; only
    survivors of the same set count. Equal distances go to the earlier survivor.
    """
    order, rank = time_order(obs.pos), time_rank(obs.pos)
    place = take(places_of(index, obs.pos.shape[2]), order)  # in time order
    step = jnp.broadcast_to(jnp.arange(place.shape[-1]), place.shape)
    group = jnp.zeros_like(place) if connected is None else jnp.cumsum(~connected, axis=-1)
    here = place >= 0
    flip = lambda x: jnp.flip(x, axis=-1)  # noqa: E731
    before, after = last_seen(step, here), flip(last_seen(flip(step), flip(here)))

    def same(at: Array) -> Array:
        other = jnp.take_along_axis(group, jnp.maximum(at, 0), axis=-1)
        return (at >= 0) & (other == group)

    far = jnp.iinfo(jnp.int32).max
    to_before = jnp.where(same(before), step - before, far)
    to_after = jnp.where(same(after), after - step, far)
    at = jnp.where(to_before <= to_after, before, after)
    found = jnp.minimum(to_before, to_after) < far
    return take(jnp.where(found, jnp.take_along_axis(place, jnp.maximum(at, 0), axis=-1), -1), rank)


def recount(state: State, index: Array, joined: Array, place: Array) -> State:
    """The survivors' slot state; LOG_COUNT includes the tokens of the losers that `joined` at `place` [.., slots]."""
    usable = index < joined.shape[2]
    kept = {
        n: jnp.where(usable.reshape(*usable.shape, *(1,) * (x.ndim - 3)), gather(x, index), 0)
        for n, x in state.items()
    }
    number = jnp.where(joined, jnp.exp(state[LOG_COUNT]), 0.0)
    _, added = fold(number[..., None], number, place, index.shape[2])
    kept[LOG_COUNT] = jnp.where(
        usable & (added > 0), jnp.log(jnp.exp(kept[LOG_COUNT]) + added), kept[LOG_COUNT]
    )
    return kept


@dataclasses.dataclass(frozen=True)
class Anchors(Reducer):
    """Elastic Cache: keys and values of losers are averaged into the survivor nearest in the sequence."""

    merges: ClassVar[bool] = True

    def reduce(self, obs: Observation, index: Array, scores: Array) -> tuple[Array, Array]:
        """Exact means of the clusters, the anchor included."""
        place = anchors(obs, index)
        weight = (losers(obs, index) & (place >= 0)).astype(jnp.float32)
        return tuple(
            blend(gather(x, index), *fold(x, weight, jnp.maximum(place, 0), index.shape[2]))
            for x in (obs.k, obs.v)
        )


@dataclasses.dataclass(frozen=True)
class GaussianSets(Reducer):
    """KVMerger: runs of adjacent tokens with similar keys are merged into their pivot with Gaussian weights.

    A token belongs to the set of the one before it while cos(k_i, k_(i+1)) >= threshold; protected tokens are sets of
    their own. Survivors are the pivots; a loser joins the nearest pivot of its set, and vanishes without one.
    w_i = exp(-||k_p - k_i||^2 / (2 sigma^2)), w_p = 1, normalised; k, v <- sum w_i k_i, sum w_i v_i. sigma: two
    passes, sigma^2 = mean squared distance first, then sigma = sum w / (sqrt(2) |S|) (second-hand, the paper's rule
    is circular). The paper multiplies v by |S|, which changes the numerator alone; counted=True adds log |S| to the
    pivot's logit instead, so that the softmax counts all of the set.
    """

    threshold: float = 0.75
    counted: bool = False
    merges: ClassVar[bool] = True

    @property
    def weighs(self) -> bool:
        """Pivots count as many times as their sets have tokens, if counted."""
        return self.counted

    def apply(
        self, obs: Observation, index: Array, scores: Array, state: State
    ) -> tuple[Array, Array, State | None]:
        """Pivots with their sets merged in."""
        order = time_order(obs.pos)
        keys = take(unit(obs.k), order)
        cosine = jnp.sum(keys[:, :, 1:] * keys[:, :, :-1], axis=-1)
        cosine = jnp.pad(cosine, ((0, 0), (0, 0), (1, 0)), constant_values=-1.0)
        alone = take(scores >= PROTECTED, order)
        split = alone | jnp.pad(alone, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
        place = anchors(obs, index, connected=(cosine >= self.threshold) & ~split)
        joined = losers(obs, index) & (place >= 0)
        place, places = jnp.maximum(place, 0), index.shape[2]
        pivot = gather(obs.k, index)
        gap = obs.k.astype(jnp.float32) - gather(pivot, place).astype(jnp.float32)
        far = jnp.where(joined, jnp.sum(gap * gap, axis=-1), 0.0)
        one = joined.astype(jnp.float32)
        total, size = fold(far[..., None], one, place, places)
        sigma2 = total[..., 0] / jnp.maximum(size, 1.0)
        for _ in range(2):
            spread = jnp.take_along_axis(jnp.maximum(sigma2, 1e-12), place, axis=-1)
            weight = jnp.where(joined, jnp.exp(-far / (2 * spread)), 0.0)
            _, total = fold(far[..., None], weight, place, places)
            sigma2 = ((1.0 + total) / (jnp.sqrt(2.0) * (1.0 + size))) ** 2
        k, v = (blend(gather(x, index), *fold(x, weight, place, places)) for x in (obs.k, obs.v))
        return k, v, recount(state, index, joined, place) if self.counted else None


@dataclasses.dataclass(frozen=True)
class ChunkClusters(Reducer):
    """Chelsea: a loser joins the most similar survivor of its chunk of `chunk` tokens; clusters become their means.

    counted: a cluster's mean weighs its tokens alike however often it was merged, and log of their number is added to its
    logit, so that the softmax counts them all.
    """

    chunk: int = 16
    counted: bool = False
    merges: ClassVar[bool] = True

    @property
    def weighs(self) -> bool:
        """Means count as many times as their clusters have tokens, if counted."""
        return self.counted

    def apply(
        self, obs: Observation, index: Array, scores: Array, state: State
    ) -> tuple[Array, Array, State | None]:
        """Survivors replaced by the means of their clusters; a loser whose chunk kept nothing vanishes."""
        slots = obs.pos.shape[2]
        order, rank = time_order(obs.pos), time_rank(obs.pos)
        place = take(places_of(index, slots), order)
        keys = take(unit(obs.k), order)
        pad = -slots % self.chunk
        parts = (slots + pad) // self.chunk
        b, h, d = keys.shape[0], keys.shape[1], keys.shape[-1]
        place = jnp.pad(place, ((0, 0), (0, 0), (0, pad)), constant_values=-1).reshape(
            b, h, parts, self.chunk
        )
        keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(b, h, parts, self.chunk, d)
        cosine = jnp.einsum("bhpid,bhpjd->bhpij", keys, keys, precision="highest")
        cosine = jnp.where(place[:, :, :, None] >= 0, cosine, -jnp.inf)
        best = jnp.take_along_axis(place, jnp.argmax(cosine, axis=-1), axis=-1)
        best = jnp.where(jnp.max(cosine, axis=-1) > -jnp.inf, best, -1)
        place = take(best.reshape(b, h, -1)[:, :, :slots], rank)
        joined, place = losers(obs, index) & (place >= 0), jnp.maximum(place, 0)
        number = jnp.exp(state[LOG_COUNT]) if self.counted else jnp.ones(joined.shape)
        weight, own = jnp.where(joined, number, 0.0), gather(number, index)
        k, v = (blend(gather(x, index), *fold(x, weight, place, index.shape[2]), own) for x in (obs.k, obs.v))
        return k, v, recount(state, index, joined, place) if self.counted else None


@dataclasses.dataclass(frozen=True)
class ValueCascade(Reducer):
    """CaM: a loser's value is added, divided by m, to each of the next m survivors, with probability p; keys stay.

    p = clip(a_e / mean a over those m survivors, 0, 1), a = attention received from this call's queries, mean over the
    query group; one draw per loser and head. Where fewer than m survivors follow, the value is divided among them. In a
    decode step the loser is the entry that is evicted and a the attention of the step's query, as in the paper.
    """

    m: int = 32
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})
    merges: ClassVar[bool] = True
    absorbs: ClassVar[bool] = True

    def probability(self, obs: Observation, index: Array) -> tuple[Array, Array, Array]:
        """(p f32, first place int32, survivors in the window int32), all [batch, kv_heads, slots]."""
        slots, places = obs.pos.shape[2], index.shape[2]
        usable = index < slots
        kept = jnp.sum(usable, axis=-1, keepdims=True)
        pos = jnp.where(usable, gather(obs.pos, index), jnp.iinfo(jnp.int32).max)
        first = jax.vmap(jax.vmap(lambda a, x: jnp.searchsorted(a, x, side="right")))(pos, obs.pos)
        last = jnp.minimum(first + self.m, kept)
        mass = obs.group(obs.column_mass())
        total = jnp.cumsum(jnp.where(usable, gather(mass, index), 0.0), axis=-1)
        total = jnp.pad(total, ((0, 0), (0, 0), (1, 0)))
        window = jnp.take_along_axis(total, jnp.minimum(last, places), axis=-1) - jnp.take_along_axis(
            total, jnp.minimum(first, places), axis=-1
        )
        n = jnp.maximum(last - first, 0)
        mean = window / jnp.maximum(n, 1)
        return jnp.where(losers(obs, index) & (n > 0), _odds(mass, mean), 0.0), first, n

    def reduce(self, obs: Observation, index: Array, scores: Array) -> tuple[Array, Array]:
        """Survivors' keys, and their values with what cascades into them."""
        p, first, n = self.probability(obs, index)
        drawn = self.drawn(obs, obs.pos, p)
        share = jnp.where(drawn, 1.0 / jnp.maximum(n, 1), 0.0)
        places = index.shape[2]
        # Add to the window [first, first + n) by a running sum of differences.
        edges = [jnp.minimum(x, places) for x in (first, first + n)]
        started, ended = (fold(obs.v, share, at, places + 1)[0] for at in edges)
        opened, closed = (fold(obs.v, drawn.astype(jnp.float32), at, places + 1)[1] for at in edges)
        added = jnp.cumsum(started - ended, axis=2)[:, :, :places]
        # Whole numbers: a survivor that nothing cascades into stays bit-identical.
        touched = jnp.cumsum(opened - closed, axis=2)[:, :, :places] > 0
        v = gather(obs.v, index)
        return gather(obs.k, index), jnp.where(
            touched[..., None], (v.astype(jnp.float32) + added).astype(v.dtype), v
        )

    def drawn(self, obs: Observation, pos: Array, p: Array) -> Array:
        """bool [batch, kv_heads, n]: the draws for losers at positions `pos` with probabilities p, likewise."""
        head = jnp.arange(pos.shape[1])[:, None]
        return (p > 0) & (hash_uniform(pos, head, obs.layer, self.seed) < p)

    def absorb(self, obs: Observation, victim: Array) -> Written:
        """The next m entries' values with a share of the evicted one's; m slots a head change, or none."""
        at = jnp.maximum(victim, 0)[..., None]
        pos = gather(obs.pos, at)
        later = obs.valid & (obs.pos > pos) & (victim >= 0)[..., None]
        gap = jnp.where(later, obs.pos - pos, jnp.iinfo(jnp.int32).max)
        _, slots = jax.lax.top_k(-gap, min(self.m, obs.pos.shape[2]))
        some = gather(later, slots)
        n = jnp.sum(some, axis=-1, keepdims=True)
        mass = obs.group(obs.column_mass())
        mean = jnp.sum(jnp.where(some, gather(mass, slots), 0.0), axis=-1, keepdims=True) / jnp.maximum(n, 1)
        drawn = self.drawn(obs, pos, jnp.where(n > 0, _odds(gather(mass, at), mean), 0.0))
        share = gather(obs.v, at).astype(jnp.float32) / jnp.maximum(n, 1)[..., None]
        v = gather(obs.v, slots).astype(jnp.float32) + share
        return Written(jnp.where(drawn & some, slots, -1).astype(jnp.int32), gather(obs.k, slots), v)


def _odds(mass: Array, mean: Array) -> Array:
    """clip(mass / mean, 0, 1); where the mean is 0: 1 if there is mass."""
    ratio = jnp.clip(mass / jnp.maximum(mean, 1e-30), 0.0, 1.0)
    return jnp.where(mean > 0, ratio, (mass > 0).astype(jnp.float32))
