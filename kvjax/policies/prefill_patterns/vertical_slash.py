"""Vertical-slash patterns, and the choice between patterns head by head (MInference)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.policies.observation import Observation
from kvjax.policies.prefill_patterns.base import PrefillPattern
from kvjax.policies.prefill_patterns.blocks import Blocks, largest
from kvjax.policies.prefill_patterns.static import check_sizes
from pallas_kernels.platform import dot_precision
from pallas_kernels.prefill_attention.reference import pad_axis

Array = jax.Array


def vertical_slash(x: Blocks, vertical: int, slash: int, first: int, nearest: int) -> Array:
    """Mask of the `vertical` columns and `slash` distances that the last queries attend to most.

    The first `first` positions and the `nearest` smallest distances are always among them.
    """
    columns = x.probs.sum(2)
    columns = jnp.where(x.per_q_head((x.obs.pos >= 0) & (x.obs.pos < first)), jnp.inf, columns)
    chosen = largest(columns, vertical) & (columns > 0)
    distance = x.distance_mass.at[..., :nearest].set(jnp.inf)
    return (x.sum_blocks(chosen)[:, :, None] > 0) | x.band(largest(distance, slash) & (distance > 0))


def pooled(x: Blocks) -> tuple[Array, Array]:
    """Means of every block's queries f32 [batch, q_heads, q_blocks, head_dim] and keys [batch, kv_heads, k_blocks, ...]."""

    def mean(array: Array, pos: Array, blocks: int) -> Array:
        array = jnp.where((pos >= 0)[..., None], array, 0)
        array = pad_axis(array, 2, blocks * x.block).reshape(*array.shape[:2], blocks, x.block, -1)
        filled = pad_axis(pos >= 0, 2, blocks * x.block).reshape(*pos.shape[:2], blocks, x.block).sum(-1)
        return array.sum(3, dtype=jnp.float32) / jnp.maximum(filled, 1)[..., None]

    obs: Observation = x.obs
    return (
        mean(obs.need("q"), obs.need("q_pos")[:, None], x.q_blocks),
        mean(obs.k, obs.pos, x.k_blocks),
    )


def pooled_logits(x: Blocks, q: Array, k: Array) -> Array:
    """scale * q.k of pooled queries [batch, q_heads, n, head_dim] and keys: f32 [batch, q_heads, n, k_blocks]."""
    b, h, n, d = q.shape
    rows = q.reshape(b, k.shape[1], -1, d)
    logits = jnp.einsum("bhqd,bhkd->bhqk", rows, k, precision=dot_precision(k.dtype)).reshape(b, h, n, -1)
    logits = logits * x.obs.scale
    return logits if x.obs.softcap is None else x.obs.softcap * jnp.tanh(logits / x.obs.softcap)


def block_sparse(x: Blocks, count: int) -> Array:
    """Mask of the `count` key blocks whose mean key fits the query block's mean query best."""
    logits = jnp.where(x.visible, pooled_logits(x, *pooled(x)), -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0.0))  # in (0, 1] where visible: order is kept
    return largest(weight, count) & x.visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(PrefillPattern):
    """The columns and diagonals that the last `sample` queries attend to most; a chosen token brings its block."""

    vertical: int = 1000
    slash: int = 6096
    first: int = 30
    nearest: int = 100
    min_recall: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("vertical_slash", vertical=self.vertical, slash=self.slash)

    def keep(self, x: Blocks) -> Array:
        """See `vertical_slash`."""
        return vertical_slash(x, self.vertical, self.slash, self.first, self.nearest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MInference(VerticalSlash):
    """Head by head, the cheapest of A-shape, vertical-slash and block-sparse that recalls enough.

    Of the patterns whose estimated recall reaches `min_recall`, a head takes the one with the fewest blocks; where
    none does, all blocks are read.
    """

    sink: int = 100
    window: int = 800
    tokens: int = 6400

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("minference", sink=self.sink, window=self.window, tokens=self.tokens)

    def keep(self, x: Blocks) -> Array:
        """The cheapest pattern that recalls enough; the best one where none does."""
        always = x.sinks(1) | x.near(1)
        shape = (x.obs.pos.shape[0], x.q_heads, x.q_blocks, x.k_blocks)
        count = max(1, self.tokens // self.block)
        candidates = [
            jnp.broadcast_to((keep | always) & x.visible, shape)
            for keep in (x.sinks(self.sink) | x.near(self.window), super().keep(x), block_sparse(x, count))
        ]
        recall = jnp.stack([x.recall(keep) for keep in candidates])
        cost = jnp.stack([keep.sum((2, 3), dtype=jnp.int32) for keep in candidates])
        enough = recall >= self.min_recall
        cheapest = jnp.argmin(jnp.where(enough, cost, jnp.iinfo(jnp.int32).max), axis=0)
        choice = jnp.where(enough.any(0), cheapest, jnp.argmax(recall, axis=0))[..., None, None]
        return jnp.where(choice == 0, candidates[0], jnp.where(choice == 1, candidates[1], candidates[2]))
