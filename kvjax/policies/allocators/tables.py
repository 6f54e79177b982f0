"""Budgets written down: per layer, or per layer and head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from kvjax.policies.allocators.shares import count
from kvjax.policies.base import Allocator, Array
from kvjax.types import ModelShape

Entry = int | float


def check_entries(name: str, values: Sequence[Entry]) -> tuple[Entry, ...]:
    """The values as a tuple; ValueError unless each is an int >= 1 or a float in (0, 1]."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{name} must be a list of budgets, got {values!r}")
    for x in values:
        good = isinstance(x, int | float) and not isinstance(x, bool) and x > 0
        if not good or (isinstance(x, float) and x > 1):
            raise ValueError(f"{name}: a budget is an int of at least 1 or a float in (0, 1], got {x!r}")
    return tuple(values)


def _entries(value: Entry, length: Any) -> Any:
    """Entries of a row of `length`; ints or arrays. Fractions in units of 1/1000: host and device agree."""
    if isinstance(value, float):
        return length * round(value * 1000) // 1000
    return min(value, length) if isinstance(length, int) else jnp.minimum(value, length)


@dataclasses.dataclass(frozen=True)
class LayerTable(Allocator):
    """Layer i keeps table[i]: an int, or a fraction of the row. The policy's own budget is not used."""

    table: tuple[Entry, ...]

    def check(self, shape: ModelShape) -> None:
        """One budget a layer."""
        if len(self.table) != shape.layers:
            raise ValueError(
                f"layer_budgets has {len(self.table)} entries, the model has {shape.layers} layers"
            )

    def layer_keep(self, layer: int, layers: int, keep: Any, length: Any) -> Any:
        """The layer's own budget, at least 1 entry."""
        kept = _entries(self.table[layer], length)
        return max(1, kept) if isinstance(kept, int) else jnp.maximum(1, kept)


@dataclasses.dataclass(frozen=True)
class HeadTable(Allocator):
    """Head h of layer i keeps table[i][h]: an int, or a fraction of the row."""

    table: tuple[tuple[Entry, ...], ...]
    ragged: ClassVar[bool] = True

    def check(self, shape: ModelShape) -> None:
        """One row a layer, one budget a KV head."""
        check_table("head_budgets", self.table, shape)

    def layer_keep(self, layer: int, layers: int, keep: Any, length: Any) -> Any:
        """Mean of the layer's heads, rounded up."""
        row = self.table[layer]
        return -(-sum(_entries(x, length) for x in row) // len(row))

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """The largest entry of the table."""
        return max(_entries(x, length) for row in self.table for x in row)

    def layer_counts(self, scores, valid, keep, layer, layers, length, stats) -> Array:
        """int32 [batch, kv_heads]."""
        row = [jnp.maximum(1, _entries(x, length)) for x in self.table[layer]]
        return jnp.minimum(jnp.stack(row, axis=1), count(valid))


def check_table(name: str, table: Any, shape: ModelShape) -> None:
    """ValueError unless `table` has a row a layer and an entry a KV head."""
    if len(table) != shape.layers or any(len(row) != shape.kv_heads for row in table):
        raise ValueError(
            f"{name} is a table of {len(table)} x {len(table[0])}, the model has {shape.layers} layers and "
            f"{shape.kv_heads} KV heads"
        )
