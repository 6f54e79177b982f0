"""All layers and heads compete for one budget: by single scores (KVzip), or by composite tokens (KVCompose)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import Allocator, Array


def winners(candidates: Array, total: Array) -> Array:
    """How many of each row's `total` largest candidates lie in each group: int32 [batch, groups].

    candidates f32 [batch, groups, n], -inf = none; total int32 [batch]. Ties go to earlier groups.
    """
    b, groups, n = candidates.shape
    order = jnp.argsort(-candidates.reshape(b, groups * n), axis=1, stable=True)
    live = jnp.sum(candidates > -jnp.inf, axis=(1, 2))
    won = jnp.arange(groups * n) < jnp.minimum(total, live)[:, None]
    group = jnp.where(won, order // n, groups)
    return jax.vmap(lambda x: jnp.bincount(x, length=groups + 1))(group)[:, :groups].astype(jnp.int32)


def _stacked(scores: Sequence[Array], valid: Sequence[Array]) -> Array:
    """f32 [batch, layers, heads, slots], padded to the widest layer with -inf."""
    slots = max(s.shape[2] for s in scores)
    padded = [
        jnp.pad(
            jnp.where(v, s, -jnp.inf), ((0, 0), (0, 0), (0, slots - s.shape[2])), constant_values=-jnp.inf
        )
        for s, v in zip(scores, valid)
    ]
    return jnp.stack(padded, axis=1)


@dataclasses.dataclass(frozen=True)
class GlobalHeads(Allocator):
    """The best layers * kv_heads * keep entries of the model stay, wherever they are."""

    ragged: ClassVar[bool] = True
    scope: ClassVar[str] = "model"

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """A head may keep everything."""
        return length

    def model_counts(
        self,
        scores: Sequence[Array],
        valid: Sequence[Array],
        keep: Array,
        length: Array,
        stats: Sequence[Any],
    ) -> list[Array]:
        """int32 [batch, kv_heads] per layer; their sum is exact."""
        x = _stacked(scores, valid)
        b, layers, heads, slots = x.shape
        counts = winners(x.reshape(b, layers * heads, slots), layers * heads * keep)
        return list(jnp.moveaxis(counts.reshape(b, layers, heads), 1, 0))


@dataclasses.dataclass(frozen=True)
class CompositeTokens(Allocator):
    """KVCompose: the i-th best entries of a layer's heads form composite token i; those compete over layers.

    A composite token's score is the mean over heads; layer 0 uses the maximum over all layers at each rank. The
    best layers * keep composite tokens stay, so heads of one layer keep equal numbers.
    """

    ragged: ClassVar[bool] = True
    scope: ClassVar[str] = "model"

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """A layer may keep everything."""
        return length

    def model_counts(
        self,
        scores: Sequence[Array],
        valid: Sequence[Array],
        keep: Array,
        length: Array,
        stats: Sequence[Any],
    ) -> list[Array]:
        """int32 [batch, kv_heads] per layer, equal over heads."""
        x = -jnp.sort(-_stacked(scores, valid), axis=-1)
        composite = jnp.mean(x, axis=2)  # -inf as soon as one head has no entry of that rank
        composite = composite.at[:, 0].set(jnp.max(composite, axis=1))
        counts = winners(composite, len(scores) * keep)
        return [jnp.broadcast_to(counts[:, i, None], s.shape[:2]) for i, s in enumerate(scores)]
