"""SubGen's two samples of everything that left the window: keys by cluster, values by their norm (arXiv 2402.06082)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.policies.base import PROTECTED, Array, State
from kvjax.policies.observation import NEG, Observation
from kvjax.policies.ordering import hash_uniform, take, time_order
from kvjax.policies.reducers.nearest import closest, gather, losers
from kvjax.policies.reducing import LOG_COUNT, LOG_VALUE, Reducer, Survivors

SAMPLE = "sample"  # 0: an entry itself; c > 0: sample c - 1 of keys; -j < 0: sample j - 1 of values
NUMBER = "number"  # of a key sample: tokens in its cluster
_LAST = jnp.iinfo(jnp.int32).max


class _Part(NamedTuple):
    """Places of a layer that are filled alike, [batch, kv_heads, n(, head_dim)]."""

    ok: Array
    k: Array
    v: Array
    pos: Array
    log_count: Array
    log_value: Array
    sample: Array
    number: Array


@dataclasses.dataclass(frozen=True)
class StreamingSketch(Reducer):
    """What attention needs of dropped entries, estimated from a fixed number of slots.

    Protected entries stay themselves. Of the other slots `values` hold value samples (s of them), and the rest key samples
    of M clusters, `copies` (t) each. With n_i the tokens of cluster i and mu = sum ||v||^2 over all dropped entries:

        tau = sum_i n_i / t sum_(k in S_i) e^(q.k),     z = sum_samples mu / (s ||v||^2) e^(q.k) v

    estimate denominator and numerator without bias; both are joined with the exact entries' sums. So a key sample has the
    log-weights (log n_i / t, -inf) of (denominator, numerator), a value sample (-inf, log mu / (s ||v||^2)); the value of a
    key sample is never read and holds the cluster's centre. See `kvjax.cache.weighted`.

    A dropped key joins the nearest centre (Euclidean, after RoPE) if it is within `radius` or M clusters exist, else it
    becomes a centre; of several dropped at once the farthest goes first (greedy k-centre). Every slot of S_i is a uniform
    draw from the cluster, every value sample one in proportion to ||v||^2, independent of each other. Entries that are
    dropped together replace a slot with the probability that replacing it one by one would have had, so that the law of
    the samples is that of the streaming algorithm. Draws are hashes of position, slot, head, layer and `seed`.
    """

    copies: int = 1
    values: float = 0.5
    radius: float = 0.0
    seed: int = 0
    merges: ClassVar[bool] = True
    resamples: ClassVar[bool] = True

    @property
    def weighs(self) -> bool:
        """Every sample has weights of its own."""
        return True

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The two log-weights, and which sample of how many tokens a slot is."""
        weights = {LOG_COUNT: ((), "float32"), LOG_VALUE: ((), "float32")}
        return {**weights, SAMPLE: ((), "int32"), NUMBER: ((), "int32")}

    def state(self) -> dict[str, float]:
        """mu."""
        return {"mass": 0.0}

    def sizes(self, rest: Array) -> tuple[Array, Array]:
        """(clusters, value samples) int32 for `rest` slots beside the exact ones; none without both."""
        clusters = rest * round((1 - self.values) * 1000) // 1000 // self.copies
        samples = rest - clusters * self.copies
        some = (clusters > 0) & (samples > 0)
        return clusters * some, samples * some

    def survivors(self, obs: Observation, index: Array, scores: Array, state: State) -> Survivors:
        """Protected entries in time order, then key samples, then value samples; all that was selected if none is lost."""
        places, gone = index.shape[2], losers(obs, index)
        over = jnp.any(gone, axis=-1, keepdims=True)
        sample = jnp.where(obs.valid, state[SAMPLE], 0)
        exact = obs.valid & ~gone & (scores >= PROTECTED) & (sample == 0)
        lost = obs.valid & (sample == 0) & ~exact & over
        kept = jnp.sum(index < obs.pos.shape[2], axis=-1, dtype=jnp.int32)
        clusters, samples = self.sizes(kept - jnp.sum(exact, axis=-1, dtype=jnp.int32))
        by_time = time_order(obs.pos)
        values, mass = self._values(obs, lost, by_time, sample, samples, places)
        parts = (
            _exact(obs, exact, by_time, places),
            self._keys(obs, lost, by_time, sample, state[NUMBER], clusters, places // self.copies),
            values,
        )
        whole = _Part(*(jnp.concatenate(x, axis=2) for x in zip(*parts)))
        pack, filled = _slots_of(_numbered(whole.ok), places)
        new = _Part(filled, *(gather(x, pack) for x in whole[1:]))
        names = dict(zip((LOG_COUNT, LOG_VALUE, SAMPLE, NUMBER), new[4:]))
        selected = index < obs.pos.shape[2]

        def choose(made: Array, old: Array) -> Array:
            return jnp.where(over.reshape(*over.shape, *(1,) * (made.ndim - 3)), made, gather(old, index))

        def flat(made: Array, old: Array) -> Array:
            return jnp.where(new.ok & over, made, jnp.where(selected & ~over, gather(old, index), 0))

        return Survivors(
            choose(new.k, obs.k),
            choose(new.v, obs.v),
            jnp.where(over, jnp.where(new.ok, new.pos, -1), jnp.where(selected, gather(obs.pos, index), -1)),
            {
                n: flat(names[n], x) if n in names else jnp.where(selected, gather(x, index), 0)
                for n, x in state.items()
            },
            {"mass": mass},
        )

    def _draw(self, obs: Observation, number: Array, salt: int) -> Array:
        """f32 (0, 1) [batch, kv_heads, n] for samples `number` int32 [n] of this moment."""
        head = jnp.arange(obs.pos.shape[1])[:, None]
        return hash_uniform(obs.length[:, None, None], 2 * number + salt, head, obs.layer, self.seed)

    def _keys(
        self,
        obs: Observation,
        lost: Array,
        by_time: Array,
        sample: Array,
        count: Array,
        clusters: Array,
        most: int,
    ) -> _Part:
        """Key samples after `lost` joined their clusters, of which there may be `clusters` [batch, kv_heads] <= most."""
        number = jnp.arange(most * self.copies)
        cluster = number // self.copies
        at, had = _slots_of(sample - 1, number.size)
        held = jnp.where(had, gather(count, at), 0)
        first = slice(None, None, self.copies)
        centre = jnp.where(had[..., first, None], gather(obs.v, at[..., first]), 0).astype(jnp.float32)
        used = jnp.sum(had[..., first], axis=-1, dtype=jnp.int32)
        centre, used, joined = self._open(obs, lost, centre, used, clusters)
        joined = jnp.where(lost, joined, most)
        order = take(by_time, jnp.argsort(take(joined, by_time), axis=-1, stable=True))
        added = jax.vmap(jax.vmap(lambda j: jnp.zeros(most, jnp.int32).at[j].add(1, mode="drop")))(joined)
        begin = jnp.cumsum(added, axis=-1) - added
        total = held + added[..., cluster]
        draw = jnp.floor(self._draw(obs, number, 0) * total).astype(jnp.int32)
        draw = jnp.minimum(draw, total - 1)
        fresh = (draw >= held) & (total > 0)
        member = gather(order, jnp.where(fresh, begin[..., cluster] + draw - held, 0))
        source = jnp.where(fresh, member, at)
        ok = (total > 0) & (cluster < clusters[..., None])
        weight = jnp.log(jnp.maximum(total, 1) / self.copies)
        return _Part(
            ok,
            gather(obs.k, source),
            centre[..., cluster, :].astype(obs.v.dtype),
            gather(obs.pos, source),
            weight,
            jnp.full_like(weight, NEG),
            jnp.broadcast_to(1 + number, ok.shape),
            total,
        )

    def _open(
        self, obs: Observation, lost: Array, centre: Array, used: Array, clusters: Array
    ) -> tuple[Array, Array, Array]:
        """(centres, their number, cluster of every lost entry): new centres, farthest first, while there is room."""
        most, slot = centre.shape[2], jnp.arange(obs.pos.shape[2])
        keys = jnp.where(lost[..., None], obs.k, 0).astype(jnp.float32)
        gap, joined = closest(keys, centre, jnp.arange(most) < used[..., None])
        limit = self.radius * abs(self.radius)

        def room(state: tuple[Array, ...]) -> Array:
            _, used, gap, _ = state
            far = jnp.max(jnp.where(lost, gap, -jnp.inf), axis=-1)
            return (used < clusters) & (far > limit)

        def add(state: tuple[Array, ...]) -> tuple[Array, ...]:
            centre, used, gap, joined = state
            go, far = room(state)[..., None], jnp.where(lost, gap, -jnp.inf)
            top = far == jnp.max(far, axis=-1, keepdims=True)
            pick = jnp.argmin(jnp.where(top, obs.pos, _LAST), axis=-1)[..., None]
            key = gather(keys, pick)
            centre = jnp.where((go & (jnp.arange(most) == used[..., None]))[..., None], key, centre)
            new = jnp.sum((keys - key) ** 2, axis=-1)
            mine = slot == pick
            nearer = go & ((new < gap) | mine)
            gap = jnp.where(go & mine, -jnp.inf, jnp.where(nearer, new, gap))
            return centre, used + go[..., 0], gap, jnp.where(nearer, used[..., None], joined)

        state = jax.lax.while_loop(lambda s: jnp.any(room(s)), add, (centre, used, gap, joined))
        return state[0], state[1], state[3]

    def _values(
        self, obs: Observation, lost: Array, by_time: Array, sample: Array, samples: Array, most: int
    ) -> tuple[_Part, Array]:
        """(value samples after `lost` left, mu [batch, kv_heads]); there are `samples` [batch, kv_heads] <= most."""
        number = jnp.arange(most)
        at, had = _slots_of(-sample - 1, most)
        # Samples that the budget gained start as copies: each still has the right law.
        old = jnp.sum(had, axis=-1, keepdims=True)
        at = jnp.take_along_axis(at, number % jnp.maximum(old, 1), axis=-1)
        squares = lambda v: jnp.sum(v.astype(jnp.float32) ** 2, axis=-1)  # noqa: E731
        # Sums in time order, so that they do not depend on where entries are stored.
        reached = jnp.cumsum(take(squares(jnp.where(lost[..., None], obs.v, 0)), by_time), axis=-1)
        before = obs.state.get("mass", jnp.zeros(old.shape[:2]))[..., None]
        mass = before + reached[..., -1:]
        target = self._draw(obs, number, 1) * mass - before
        fresh = (target >= 0) & (mass > before)
        rank = jax.vmap(jax.vmap(lambda c, t: jnp.searchsorted(c, t, side="right")))(reached, target)
        source = jnp.where(fresh, take(by_time, jnp.minimum(rank, obs.pos.shape[2] - 1)), at)
        v = gather(obs.v, source)
        ok = (number < samples[..., None]) & (fresh | (old > 0))
        norm = jnp.where(ok, squares(v), 0.0)
        weight = (
            jnp.log(mass) - jnp.log(jnp.maximum(samples, 1))[..., None] - jnp.log(jnp.maximum(norm, 1e-30))
        )
        return _Part(
            ok & (norm > 0),
            gather(obs.k, source),
            v,
            gather(obs.pos, source),
            jnp.full(ok.shape, NEG),
            jnp.where(norm > 0, weight, NEG),
            jnp.broadcast_to(-1 - number, ok.shape),
            jnp.zeros(ok.shape, jnp.int32),
        ), mass[..., 0]


def _exact(obs: Observation, exact: Array, by_time: Array, places: int) -> _Part:
    """The entries that stay themselves, in time order."""
    rank, ok = _slots_of(_numbered(take(exact, by_time)), places)
    order, none = take(by_time, rank), jnp.zeros(ok.shape)
    zero = none.astype(jnp.int32)
    return _Part(
        ok, gather(obs.k, order), gather(obs.v, order), gather(obs.pos, order), none, none, zero, zero
    )


def _numbered(some: Array) -> Array:
    """int32 [..., n]: 0, 1, ... where `some` holds, -1 elsewhere."""
    return jnp.where(some, jnp.cumsum(some, axis=-1, dtype=jnp.int32) - 1, -1)


def _slots_of(number: Array, most: int) -> tuple[Array, Array]:
    """(slot of each number 0..most-1, whether there is one) from the numbers int32 [batch, kv_heads, slots] of slots."""
    slots = number.shape[2]

    def put(n: Array) -> Array:
        where = jnp.where(n < 0, most, n)
        return jnp.full(most, slots, jnp.int32).at[where].set(jnp.arange(slots), mode="drop")

    at = jax.vmap(jax.vmap(put))(number)
    return jnp.minimum(at, slots - 1), at < slots
