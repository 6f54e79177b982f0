"""Scorers of allocators' own methods: mean and variance over the window, layer-wide mass, structures of a head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from kvjax.policies.allocators.heads import Structure
from kvjax.policies.allocators.layers import row_variance, window_before
from kvjax.policies.base import Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.ordering import take, time_order, time_rank
from kvjax.policies.reducers.nearest import unit
from kvjax.policies.scorers.attention import AccumulatedAttention, pool


@dataclasses.dataclass(frozen=True)
class MeanVariance(Scorer):
    """CAKE's score: avgpool_kernel( mean_i A + gamma Var_i A ) over the last `window` queries, mean over the group.

    While decoding, the attention of the new query alone, not pooled: slots are no longer in time order.
    """

    window: int = 32
    kernel: int = 5
    gamma: float = 200.0
    needs: ClassVar[frozenset[str]] = frozenset({"q", "mass"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        if not obs.prefilling:
            return obs.group(obs.column_mass()), state
        probs, rows = window_before(obs, self.window)
        mean = jnp.sum(probs, axis=2) / jnp.maximum(rows, 1)[:, None, None]
        return obs.group(pool(mean + self.gamma * row_variance(probs, rows), self.kernel, "avg")), state


@dataclasses.dataclass(frozen=True)
class LayerMass(AccumulatedAttention):
    """Attention received so far from all queries, mean over all heads of the layer: one ranking for all heads."""

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots], equal for all heads that hold the same entries."""
        mass, state = super().score(obs, state)
        # Heads of one layer hold the same entries in the same slots, because they share the ranking.
        return jnp.broadcast_to(jnp.mean(mass, axis=1, keepdims=True), mass.shape), state


@dataclasses.dataclass(frozen=True)
class StructureOrder(Scorer):
    """FastGen's order: entries of the structure that a head takes come before all others, by their frequency."""

    profile: Structure = Structure()
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]: frequency in [0, 1], plus 2 inside the head's structure."""
        structure, frequency, special, often = self.profile.profile(obs)
        size = self.profile.size(self.profile.local, obs.length)
        near = obs.valid & (obs.pos >= (obs.length - size)[:, None, None])
        level = structure[..., None]
        member = special | (often & (level >= 1)) | (near & (level >= 2)) | (level == 3)
        return frequency + jnp.where(member, 2.0, 0.0), state


@dataclasses.dataclass(frozen=True)
class GlobalLocal(Scorer):
    """EMS's score: max(local, global * sum local / sum global).

    global: attention received from all queries of the call, per query that saw the entry; local: mean attention of the
    last `window` queries, average-pooled. Both mean over the query group; sums over the head's valid entries.
    """

    window: int = 32
    kernel: int = 7
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        first = (obs.length - obs.tokens)[:, None, None]
        seen_by = jnp.maximum(obs.length[:, None, None] - jnp.maximum(obs.pos, first), 1)
        overall = jnp.where(obs.valid, obs.group(obs.column_mass()) / seen_by, 0.0)
        rows = jnp.maximum(jnp.minimum(obs.tokens, self.window), 1)
        local = obs.group(obs.window_mass(self.window)) / rows[:, None, None]
        local = jnp.where(obs.valid, pool(jnp.where(obs.valid, local, 0.0), self.kernel, "avg"), 0.0)
        ratio = jnp.sum(local, axis=-1) / jnp.maximum(jnp.sum(overall, axis=-1), 1e-30)
        return jnp.maximum(local, overall * ratio[..., None]), state


@dataclasses.dataclass(frozen=True)
class Redundancy(Scorer):
    """Chelsea's order: in chunks of `chunk` tokens every other token is a merge source, the most similar go first.

    Round 1: sources are the even places of a chunk, targets the odd ones; a source's score is -max cosine to a target
    of its chunk. The next rounds alternate among the targets that are left: round r has places with r - 1 low bits set
    and the next one clear, and scores 3 (r - 1) higher, so that a round is used up before the next begins.
    """

    chunk: int = 16

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """f32 [batch, kv_heads, slots]."""
        order, rank = time_order(obs.pos), time_rank(obs.pos)
        keys = take(unit(obs.k), order)
        valid = take(obs.valid, order)
        pad = -keys.shape[2] % self.chunk
        b, h, _, d = keys.shape
        keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(b, h, -1, self.chunk, d)
        valid = jnp.pad(valid, ((0, 0), (0, 0), (0, pad))).reshape(b, h, -1, self.chunk)
        level = np.array([(~p & (p + 1)).bit_length() - 1 for p in range(self.chunk)])  # low bits set
        target = jnp.asarray(level[None, :] > level[:, None])
        cosine = jnp.einsum("bhpid,bhpjd->bhpij", keys, keys, precision="highest")
        best = jnp.max(jnp.where(target & valid[..., None, :], cosine, -1.0), axis=-1)
        score = 3.0 * jnp.asarray(level) - best
        return take(score.reshape(b, h, -1)[:, :, : obs.pos.shape[2]], rank), state
