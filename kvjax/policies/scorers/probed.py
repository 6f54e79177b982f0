"""Scorers of probes, and of entries that only a later phase may evict."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.ordering import time_rank
from kvjax.policies.scorers.statistics import fold_queries
from kvjax.policies.scorers.windows import lift_window, outside, segment_mean
from kvjax.policies.scorers.wrappers import projected_norm


@dataclasses.dataclass(frozen=True)
class Reconstruction(Scorer):
    """KVzip: the largest attention that an entry of the chunk gets while the model repeats the chunk.

    The softmax of a repeating query runs over the first `sink` entries, the chunk's entries and the repeated
    input so far. plus: attention times ||v Wo[h]||_2 / ||x_i||_2, x_i the attention input of the query. Maximum
    over the group and all queries; entries keep their score when later chunks arrive.
    """

    prefill_only: ClassVar[bool] = True
    sink: int = 4
    plus: bool = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Queries; with `plus` also the output projection and the layer input."""
        return frozenset({"q", "wo", "hidden"} if self.plus else {"q"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The score."""
        return {"score": ((), "float32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        start, end = (x[:, None, None] for x in obs.span or (jnp.zeros_like(obs.length), obs.length))
        q_pos = obs.need("q_pos")
        own = obs.pos >= (obs.length - obs.tokens)[:, None, None]
        chunk = (obs.pos >= start) & (obs.pos < end) & ~own
        seen = chunk | own | (obs.pos < self.sink)
        narrowed = obs.replace(pos=jnp.where(seen, obs.pos, -1))
        if self.plus:
            size = projected_norm(obs.v, obs.need("wo"), 2)
            norm = jnp.linalg.norm(obs.need("hidden").astype(jnp.float32), axis=-1)
            first = (obs.length - obs.tokens)[:, None]

        def widest(best: Array, probs: Array, positions: Array) -> Array:
            if self.plus:
                at = jnp.clip(positions - first, 0, norm.shape[1] - 1)
                x = jnp.maximum(jnp.take_along_axis(norm, at, axis=1), 1e-12)
                probs = probs * size[:, :, None] / x[:, None, :, None]
            return jnp.maximum(best, obs.group(jnp.max(probs, axis=2), jnp.max))

        zero = jnp.zeros(obs.pos.shape, jnp.float32)
        best = fold_queries(narrowed, q_pos.shape[1], widest, zero)
        scores = jnp.maximum(state["score"], jnp.where(chunk, best, 0.0))
        return scores, {"score": scores}


@dataclasses.dataclass(frozen=True)
class Replay(Scorer):
    """KVCompose: attention that an entry gets while the model reads the prompt a second time.

    Maximum over the replayed queries, mean over the group, plus the mean over KV heads.
    """

    prefill_only: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The score, for entries that later chunks no longer replay."""
        return {"score": ((), "float32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        q = obs.need("q")

        def widest(best: Array, probs: Array, positions: Array) -> Array:
            return jnp.maximum(best, jnp.max(probs, axis=2))

        zero = jnp.zeros((*q.shape[:2], obs.pos.shape[2]), jnp.float32)
        scores = obs.group(fold_queries(obs, q.shape[2], widest, zero))
        scores = scores + jnp.mean(scores, axis=1, keepdims=True)
        scores = jnp.maximum(state["score"], scores)
        return scores, {"score": scores}


@dataclasses.dataclass(frozen=True)
class DecodeRegion(Scorer):
    """SCOPE: the inner scorer decides about the prompt once; afterwards only generated entries may leave.

    While decoding, score = attention of the current query (mean over the group); what is left of the prompt and
    the `recent` newest entries are lifted.
    """

    inner: Scorer
    recent: int = 256

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The inner scorer's fields and the decode mass."""
        return self.inner.needs | {"mass"}

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """1 for entries of the prompt, and the inner scorer's state."""
        return {"pinned": ((), "int8"), **self.inner.slot_state()}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        if obs.prefilling:
            scores, inner = self.inner.score(obs, {n: x for n, x in state.items() if n != "pinned"})
            return scores, {**inner, "pinned": jnp.ones_like(state["pinned"])}
        newest = obs.pos >= (obs.length - self.recent)[:, None, None]
        scores = obs.group(obs.column_mass()) + jnp.where(newest, 1e6, 0.0)
        return jnp.where(state["pinned"] > 0, 1e9, scores), state


@dataclasses.dataclass(frozen=True)
class Shots(Scorer):
    """ShotKV: mean window attention of a segment (summed over heads), given to each of its tokens.

    A segment ends at a token in `separators`; without separators segments have `length` tokens. A chunk of the
    prompt starts a new segment. The last `window` positions are lifted.
    """

    prefill_only: ClassVar[bool] = True
    window: int = 32
    separators: tuple[int, ...] = ()
    length: int = 32

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Queries, and the token ids when separators are given."""
        return frozenset({"q", "token_ids"} if self.separators else {"q"})

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """1 + position of the first token of the entry's segment."""
        return {"segment": ((), "int32")}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots], equal over heads and within a segment."""
        q_pos = obs.need("q_pos")
        if self.separators:
            ids = obs.need("token_ids")
            stops = jnp.any(ids[..., None] == jnp.asarray(self.separators), axis=-1) & (q_pos >= 0)
            after = jnp.pad(stops[:, :-1], ((0, 0), (1, 0)))
            first = q_pos == jnp.min(jnp.where(q_pos >= 0, q_pos, 2**30), axis=1, keepdims=True)
            start = jax.lax.cummax(jnp.where((after | first) & (q_pos >= 0), q_pos, -1), axis=1)
        else:
            start = jnp.where(q_pos >= 0, q_pos // self.length * self.length, -1)
        t, slots = q_pos.shape[1], obs.pos.shape[2]
        new = jnp.broadcast_to((start + 1)[:, None], (*obs.pos.shape[:2], t)).astype(jnp.int32)
        segment = jnp.concatenate([state["segment"][:, :, : slots - t], new], axis=2)
        mass = outside(obs, obs.group(jnp.sum(obs.window_probs(self.window), axis=2)), self.window)
        order = jnp.argsort(time_rank(obs.pos), axis=-1)
        ids = jnp.take_along_axis(segment, order, axis=-1)
        changes = jnp.pad(ids[..., 1:] != ids[..., :-1], ((0, 0), (0, 0), (1, 0)))
        number = jnp.take_along_axis(jnp.cumsum(changes, axis=-1), time_rank(obs.pos), axis=-1)
        rows = obs.pos.shape[0] * obs.kv_heads
        total = jnp.broadcast_to(jnp.sum(mass, axis=1, keepdims=True), obs.pos.shape)
        means = segment_mean(total.reshape(rows, slots), number.reshape(rows, slots), slots)
        return lift_window(obs, means.reshape(obs.pos.shape), self.window), {"segment": segment}
