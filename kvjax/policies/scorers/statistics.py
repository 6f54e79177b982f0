"""Scorers that keep attention statistics per entry, in prefill and while decoding."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.ordering import hash_gumbel, time_order, time_rank
from pallas_kernels import observe


def fold_queries(obs: Observation, count: int, fn: Any, init: Any, block: int = 32) -> Any:
    """Fold `fn(carry, probs f32 [batch, q_heads, block, slots], q_pos [batch, block])` over the last queries.

    Oldest first, `block` queries at a time, so that memory stays O(slots). Padded queries have q_pos -1.
    """
    blocks = -(-count // block)
    q, q_pos = obs.last_queries(blocks * block)
    q = jnp.moveaxis(q.reshape(*q.shape[:2], blocks, block, q.shape[-1]), 2, 0)
    q_pos = jnp.moveaxis(q_pos.reshape(q_pos.shape[0], blocks, block), 1, 0)
    newest = (obs.length - count)[:, None]

    def step(carry: Any, x: tuple[Array, Array]) -> tuple[Any, None]:
        positions = jnp.where(x[1] >= newest, x[1], -1)
        probs = observe.window_probs(
            x[0],
            obs.k,
            q_positions=positions,
            k_positions=obs.pos,
            scale=obs.scale,
            window=obs.window,
            softcap=obs.softcap,
        )
        return fn(carry, probs, positions), None

    return jax.lax.scan(step, init, (q, q_pos))[0]


def visible_counts(obs: Observation, q_pos: Array) -> Array:
    """int32 [batch, kv_heads, queries]: entries that each query sees."""
    seen = (obs.pos[:, :, None] <= q_pos[:, None, :, None]) & obs.valid[:, :, None]
    return jnp.sum(seen, axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class MeanAndDeviation(Scorer):
    """RoCo: mean attention, but entries whose attention varies most are protected.

    S1, S2, c: sum, sum of squares and number of observing queries per entry (mean over the group first).
    score = S1 / c, plus 2 for the int(share * budget) entries of largest deviation sqrt(S2/c - mean^2).
    """

    prefill_share: float = 0.1
    decode_share: float = 0.3
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Sum, sum of squares and count."""
        return {n: ((), "float32") for n in ("sum", "squares", "count")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        if obs.prefilling:

            def moments(probs: Array, q_pos: Array) -> Array:
                a = obs.group(probs)
                seen = (q_pos[:, None, :, None] >= obs.pos[:, :, None]) & obs.valid[:, :, None]
                return jnp.stack([a.sum(2), (a * a).sum(2), seen.sum(2).astype(jnp.float32)])

            total, squares, count = obs.column_reduce(moments)
        else:
            total = obs.group(obs.column_mass())
            squares, count = total**2, obs.valid.astype(jnp.float32)
        new = {
            "sum": state["sum"] + total,
            "squares": state["squares"] + squares,
            "count": state["count"] + count,
        }
        n = jnp.maximum(new["count"], 1.0)
        mean = new["sum"] / n
        deviation = jnp.sqrt(jnp.maximum(new["squares"] / n - mean**2, 0.0))
        share = self.prefill_share if obs.prefilling else self.decode_share
        order = jnp.argsort(jnp.where(obs.valid, -deviation, jnp.inf), axis=-1, stable=True)
        safe = obs.need("keep") * round(share * 1000) // 1000
        varied = jnp.argsort(order, axis=-1) < safe[:, None, None]
        return mean + jnp.where(varied, 2.0, 0.0), new


@dataclasses.dataclass(frozen=True)
class RecentMessage(Scorer):
    """CORM: the age of the last query to which the entry was important, A >= 1 / (entries visible to it).

    score = (position + 1 of that query) - (length - window): at least 1 exactly when one of the last `window`
    queries (any of the group's) found the entry important.
    """

    window: int = 256
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """1 + position of the last query that found the entry important, 0 = none."""
        return {"important": ((), "int32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        if obs.prefilling:

            def mark(last: Array, probs: Array, q_pos: Array) -> Array:
                level = 1.0 / jnp.maximum(visible_counts(obs, q_pos), 1)
                hit = obs.group(probs, jnp.max) >= level[..., None]
                hit &= (q_pos >= 0)[:, None, :, None]
                return jnp.maximum(last, jnp.max(jnp.where(hit, q_pos[:, None, :, None] + 1, 0), axis=2))

            count = min(self.window, obs.need("q").shape[2])
            last = fold_queries(obs, count, mark, state["important"])
        else:
            level = 1.0 / jnp.maximum(jnp.sum(obs.valid, axis=-1, keepdims=True), 1)
            hit = obs.group(obs.column_mass(), jnp.max) >= level
            last = jnp.where(hit, obs.length[:, None, None], state["important"])
        return (last - (obs.length - self.window)[:, None, None]).astype(jnp.float32), {"important": last}


@dataclasses.dataclass(frozen=True)
class Persistence(Scorer):
    """Scissorhands: how often the entry was important, A >= 1 / visible, among the last `window` queries.

    score = marks / queries observed (at most `window`); a bit per query, packed in 32-bit words, newest lowest.
    Important to the group when the mean over its heads is.
    """

    window: int = 32
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    @property
    def words(self) -> int:
        """32-bit words per entry."""
        return -(-self.window // 32)

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The marks of the last 32 * words queries."""
        return {"marks": ((self.words,), "uint32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""

        def push(marks: Array, hit: Array, ok: Array) -> Array:
            carry = jnp.concatenate([hit[..., None].astype(jnp.uint32), marks[..., :-1] >> 31], axis=-1)
            return jnp.where(ok[:, None, None, None], (marks << 1) | carry, marks)

        if obs.prefilling:

            def mark(marks: Array, probs: Array, q_pos: Array) -> Array:
                level = 1.0 / jnp.maximum(visible_counts(obs, q_pos), 1)
                hits = obs.group(probs) >= level[..., None]
                for i in range(q_pos.shape[1]):
                    marks = push(marks, hits[:, :, i], q_pos[:, i] >= 0)
                return marks

            count = min(self.window, obs.need("q").shape[2])
            marks = fold_queries(obs, count, mark, state["marks"], block=8)
        else:
            level = 1.0 / jnp.maximum(jnp.sum(obs.valid, axis=-1, keepdims=True), 1)
            hit = obs.group(obs.column_mass()) >= level
            marks = push(state["marks"], hit, obs.tokens > 0)
        spare = 32 * self.words - self.window
        top = marks[..., -1:] & jnp.uint32(0xFFFFFFFF >> spare)
        counted = jnp.concatenate([marks[..., :-1], top], axis=-1)
        hits = jnp.sum(jax.lax.population_count(counted), axis=-1).astype(jnp.float32)
        observed = jnp.clip(obs.length[:, None, None] - obs.pos, 1, self.window)
        return hits / observed, {"marks": marks}


@dataclasses.dataclass(frozen=True)
class NoisyAttention(Scorer):
    """Keyformer: attention accumulated after adding Gumbel noise to the logits, softmax((x + G) / tau).

    softmax is shift-invariant, so the noise is added to log A. tau rises from `tau0` by `rise` per decode step,
    up to `tau1`. noise=0 and tau0=tau1=1 give H2O.
    """

    tau0: float = 1.0
    tau1: float = 2.0
    horizon: int = 1024
    noise: float = 1.0
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The accumulated score."""
        return {"score": ((), "float32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        pos = jnp.repeat(obs.pos, obs.groups, axis=1)[:, :, None]
        heads = jnp.arange(pos.shape[1])[:, None, None]

        def perturbed(probs: Array, q_pos: Array, tau: Array | float) -> Array:
            """[batch, q_heads, queries, slots] probabilities -> sum over queries of the noisy ones."""
            g = hash_gumbel(self.seed, obs.layer, heads, q_pos[:, None, :, None], pos) * self.noise
            logits = jnp.where(probs > 0, (jnp.log(jnp.maximum(probs, 1e-37)) + g) / tau, -jnp.inf)
            top = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
            e = jnp.exp(logits - top)
            return jnp.sum(e / jnp.maximum(jnp.sum(e, axis=-1, keepdims=True), 1e-30), axis=2)

        if obs.prefilling:
            added = obs.column_reduce(lambda p, q_pos: perturbed(p, q_pos, self.tau0))
        else:
            steps = jnp.minimum(obs.need("steps"), self.horizon)[:, None, None, None]
            tau = self.tau0 + steps * ((self.tau1 - self.tau0) / self.horizon)
            added = perturbed(obs.column_mass()[:, :, None], obs.need("q_pos"), tau)
        total = state["score"] + obs.group(added)
        return total, {"score": total}


@dataclasses.dataclass(frozen=True)
class AttendedTopK(Scorer):
    """Attendre's usage counters: an entry is attended when it is in the `top` of a query of its group.

    recent: score = minus the age of the last query that attended (LRA), 0 for the newest; else the number of times
    (LFA). Of entries used alike the newer one scores up to 1/2 more, so that the oldest leaves first.
    """

    top: int = 32
    recent: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Last attended (1 + position) or times attended."""
        return {"usage": ((), "int32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        top = min(self.top, obs.pos.shape[2])

        def use(usage: Array, probs: Array, q_pos: Array) -> Array:
            level = jax.lax.top_k(probs, top)[0][..., -1:]
            hit = (probs >= level) & (probs > 0)
            if self.recent:
                hit = obs.group(hit, jnp.any)
                return jnp.maximum(usage, jnp.max(jnp.where(hit, q_pos[:, None, :, None] + 1, 0), axis=2))
            return usage + jnp.sum(obs.group(hit, jnp.sum), axis=2, dtype=jnp.int32)

        if obs.prefilling:
            usage = fold_queries(obs, obs.need("q").shape[2], use, state["usage"])
        else:
            usage = use(state["usage"], obs.column_mass()[:, :, None], obs.need("q_pos"))
        length = obs.length[:, None, None]
        # Ages rather than positions: they are small, and exact in float32, where it matters.
        scores = (usage - length if self.recent else usage).astype(jnp.float32)
        return scores + 0.5 * obs.pos / jnp.maximum(length, 1), {"usage": usage}


@dataclasses.dataclass(frozen=True)
class TreeSweep(Scorer):
    """TreeKV: a pointer sweeps over the entries in time order; of the two at it the less attended one leaves.

    Means of attention per observing query. Only entries after the sinks and before the `recent` newest are
    swept; old regions are swept most often, so density falls with age. In prefill the sweep moves over blocks
    of `block` tokens; survivors get 1 plus their mean, others their mean.
    """

    sink: int = 4
    recent: int = 508
    block: int = 16
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Sum of attention and number of observing queries."""
        return {n: ((), "float32") for n in ("sum", "count")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        if obs.prefilling:
            total = obs.group(obs.column_mass())
            seen = jnp.clip(
                obs.length[:, None, None]
                - jnp.maximum(obs.pos, obs.length[:, None, None] - obs.tokens[:, None, None]),
                0,
            )
            count = seen.astype(jnp.float32)
        else:
            total, count = obs.group(obs.column_mass()), obs.valid.astype(jnp.float32)
        new = {"sum": state["sum"] + total, "count": state["count"] + count}
        mean = new["sum"] / jnp.maximum(new["count"], 1.0)
        swept = (obs.pos >= self.sink) & (obs.pos < (obs.length - self.recent)[:, None, None])
        room = jnp.maximum(obs.need("keep") - self.sink - self.recent, 1)[:, None]
        rank = time_rank(jnp.where(swept, obs.pos, -1))
        if not obs.prefilling:
            entered = (obs.length - self.sink - self.recent)[:, None, None]
            at = jnp.maximum(entered - room[..., None] - 1, 0) % room[..., None]
            pair = swept & ((rank == at) | (rank == at + 1))
            low = jnp.min(jnp.where(pair, mean, jnp.inf), axis=-1, keepdims=True)
            loser = pair & (mean <= low)
            oldest = jnp.min(jnp.where(loser, rank, obs.pos.shape[2]), axis=-1, keepdims=True)
            return jnp.where(loser & (rank == oldest), -1.0, mean), new
        order = time_order(jnp.where(swept, obs.pos, -1))
        ordered = jnp.take_along_axis(jnp.where(swept, mean, 0.0), order, axis=-1)
        alive = sweep(ordered, jnp.sum(swept, axis=-1), room, self.block)
        kept = jnp.take_along_axis(alive, jnp.minimum(rank, alive.shape[-1] - 1), axis=-1) & swept
        return mean + kept, new


def sweep(scores: Array, n: Array, room: Array, block: int) -> Array:
    """bool [batch, heads, slots]: which of the first n entries (in time order) survive TreeKV's sweep.

    scores [batch, heads, slots] in time order, n int32 [batch, heads], room int32 [batch, 1] entries to keep. The
    sweep runs over blocks of `block` entries; a partly filled last block counts as one.
    """
    slots = scores.shape[-1]
    pad = -slots % block
    grouped = jnp.pad(scores, ((0, 0), (0, 0), (0, pad))).reshape(*scores.shape[:2], -1, block)
    used = (jnp.arange(slots + pad) < n[..., None]).reshape(*n.shape, -1, block)
    value = jnp.sum(jnp.where(used, grouped, 0.0), axis=-1) / jnp.maximum(jnp.sum(used, axis=-1), 1)
    units, cap = -(-n // block), jnp.maximum(jnp.broadcast_to(room, n.shape) // block, 1)
    number = jnp.arange(value.shape[-1])

    def step(carry: tuple[Array, Array], u: Array) -> tuple[tuple[Array, Array], None]:
        alive, at = carry
        arrives = u < units
        alive = alive | ((number == u) & arrives[..., None])
        place = jnp.where(alive, jnp.cumsum(alive, axis=-1) - 1, -1)
        first, second = (
            jnp.sum(jnp.where(place == (at + i)[..., None], value, 0.0), axis=-1) for i in (0, 1)
        )
        full = arrives & (jnp.sum(alive, axis=-1) > cap)
        victim = jnp.where(second < first, at + 1, at)
        alive &= ~(full[..., None] & (place == victim[..., None]))
        return (alive, jnp.where(full, (at + 1) % cap, at)), None

    start = (jnp.zeros(value.shape, bool), jnp.zeros_like(n))
    (alive, _), _ = jax.lax.scan(step, start, number)
    return jnp.repeat(alive, block, axis=-1)[..., :slots] & (jnp.arange(slots) < n[..., None])


@dataclasses.dataclass(frozen=True)
class HashDistance(Scorer):
    """HashEvict: minus the Hamming distance between sign codes of the query and of each key.

    code(x) = [R'x >= 0] with a fixed Gaussian R (dim x bits) per layer; distances are summed over the query heads
    of the group, and in prefill over the last `window` queries. Ties leave the oldest first.
    """

    bits: int = 8
    window: int = 8
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The codes of the keys, 8 bits to a byte."""
        return {"code": ((-(-self.bits // 8),), "uint8")}

    def code(self, x: Array, layer: int) -> Array:
        """uint8 [..., bytes] codes of x [..., dim]."""
        key = jax.random.fold_in(jax.random.key(self.seed), layer)
        signs = x.astype(jnp.float32) @ jax.random.normal(key, (x.shape[-1], self.bits)) >= 0
        signs = jnp.pad(signs, [(0, 0)] * (x.ndim - 1) + [(0, -self.bits % 8)])
        return jnp.packbits(signs, axis=-1)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        if obs.prefilling:
            codes, window = self.code(obs.k, obs.layer), self.window
        else:  # only the newest entry is without a code
            newest = jnp.argmax(obs.pos, axis=-1)
            fresh = self.code(jnp.take_along_axis(obs.k, newest[..., None, None], axis=2), obs.layer)
            at = jnp.arange(obs.pos.shape[2]) == newest[..., None]
            codes, window = jnp.where(at[..., None], fresh, state["code"]), 1
        q, q_pos = obs.last_queries(window)
        asked = self.code(q, obs.layer).reshape(*obs.k.shape[:2], obs.groups * window, -1)
        live = jnp.tile(q_pos >= 0, (1, obs.groups))[:, None]
        total = jnp.zeros(obs.pos.shape, jnp.int32)
        for i in range(asked.shape[2]):
            apart = jax.lax.population_count(codes ^ asked[:, :, i, None])
            total += jnp.where(live[..., i, None], jnp.sum(apart, axis=-1, dtype=jnp.int32), 0)
        age = jnp.clip((obs.length[:, None, None] - obs.pos) * 2.0**-22, 0.0, 0.5)
        return -(total + age), {"code": codes}
