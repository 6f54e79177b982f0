"""Patterns that do not look at the data: sinks with a window, for all heads or for streaming heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.policies.allocators.heads import HeadRoles
from kvjax.policies.allocators.tables import check_table
from kvjax.policies.head_scores import Table, check_file
from kvjax.policies.prefill_patterns.base import PrefillPattern
from kvjax.policies.prefill_patterns.blocks import Blocks
from kvjax.types import ModelShape

Array = jax.Array


def check_sizes(name: str, **sizes: int) -> None:
    """ValueError for a negative size."""
    for what, n in sizes.items():
        if n < 0:
            raise ValueError(f"{name}: {what} cannot be negative, got {n}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape(PrefillPattern):
    """The first `sink` tokens and the last `window` before each query; the last `last` queries read everything."""

    sink: int = 128
    window: int = 3968
    last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("a_shape", sink=self.sink, window=self.window, last=self.last)

    def keep(self, x: Blocks) -> Array:
        """Sinks, window and dense last rows, at block granularity."""
        keep = x.sinks(self.sink) | x.near(self.window)
        return keep | x.last_rows(self.last) if self.last else keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming(PrefillPattern):
    """Streaming heads read sinks and a window, retrieval heads everything; roles are per KV head.

    scores: [layers][kv_heads], how much of a retrieval head each is; the lowest `sparsity` of all heads stream.
    """

    scores: Table
    file: str = ""
    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("duo_prefill", sink=self.sink, recent=self.recent)
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(f"duo_prefill: sparsity must be in [0, 1], got {self.sparsity}")

    def check(self, shape: ModelShape) -> None:
        """A score for every layer and KV head."""
        check_file(self.file, shape)
        check_table("head scores", self.scores, shape)

    def keep(self, x: Blocks) -> Array:
        """Everything for the retrieval heads of the layer."""
        roles = HeadRoles(self.scores, self.sink + self.recent, 1.0 - self.sparsity)
        full = jnp.asarray(roles.rank[x.obs.layer] < roles.full_heads)
        full = jnp.repeat(full, x.obs.groups)[None, :, None, None]
        return full | x.sinks(self.sink) | x.near(self.recent)
