"""Pages of similar keys, stored side by side (IceCache)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import Call, Entries, Index, Selector, index_axes, over_group
from kvjax.policies.selectors.grouping import grow_means, heads_map
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SemanticPages(Selector):
    """Pages of similar keys, which are stored side by side, by query . mean key (IceCache).

    The prompt's entries are moved: a balanced binary tree splits them by their projection on the direction in which
    they differ most, down to pages of `page`; the first `sink` stay in front. New entries fill pages in time order.
    Index: keys [batch, kv_heads, pages, head_dim] (mean key of a page).
    """

    page: int = 16
    rounds: int = 4
    over: str = "softmax_max"
    reorders: ClassVar[bool] = True

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots per page."""
        return self.page

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """One key a page."""
        size = (batch, shape.kv_heads, slots // self.page, shape.head_dim)
        return {"keys": ArraySpec(size, shape.dtype, index_axes(1))}

    def order(self, entries: Entries, call: Call) -> Array:
        """The leaves of the tree from left to right."""
        n = entries.k.shape[2]
        leaves = 1
        while leaves * self.page < n:
            leaves *= 2
        size = leaves * self.page
        k = jnp.pad(entries.k.astype(jnp.float32), ((0, 0), (0, 0), (0, size - n), (0, 0)))
        pos = jnp.pad(entries.pos, ((0, 0), (0, 0), (0, size - n)), constant_values=-1)
        first = jnp.cumsum(pos >= 0, axis=-1) <= self.sink
        found = heads_map(lambda k, p, f: bisect(k, p >= 0, f & (p >= 0), leaves, self.rounds))(k, pos, first)
        return found[..., :n].astype(jnp.int32)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """New tokens enter the mean of their page."""
        keys = grow_means(index["keys"], entries.k, entries.slots, self.page)
        return {"keys": keys.astype(index["keys"].dtype)}

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Query . mean key of every page."""
        keys = index["keys"].astype(jnp.float32)
        scores = jnp.einsum("bhgd,bhpd->bhgp", call.grouped, keys, precision="highest") * call.scale
        live = jnp.arange(keys.shape[2]) * self.page < call.fill[..., None]
        return over_group(scores, self.over, live[:, :, None]), index


def bisect(x: Array, valid: Array, first: Array, leaves: int, rounds: int) -> Array:
    """int32 [n]: an order of x [n, dim] in which `leaves` (a power of two) runs of equal length hold similar rows.

    Each run is halved at the median of its rows' projections on their main direction (`rounds` power iterations from
    the row farthest from the mean). Rows that are not valid go to the end, those in `first` to the front.
    """
    n, d = x.shape
    order = jnp.arange(n)
    groups = 1
    while groups < leaves:
        rows = x[order].reshape(groups, -1, d)
        ok = valid[order].reshape(groups, -1)
        mean = jnp.sum(jnp.where(ok[..., None], rows, 0), 1, keepdims=True) / jnp.maximum(
            jnp.sum(ok, 1)[:, None, None], 1
        )
        off = jnp.where(ok[..., None], rows - mean, 0)
        far = jnp.argmax(jnp.sum(off**2, -1), axis=1)
        axis = jnp.take_along_axis(off, far[:, None, None], axis=1)[:, 0]
        for _ in range(rounds):
            axis = jnp.einsum("gnd,gn->gd", off, jnp.einsum("gnd,gd->gn", off, axis))
            axis = axis / jnp.maximum(jnp.linalg.norm(axis, axis=-1, keepdims=True), 1e-20)
        key = jnp.einsum("gnd,gd->gn", off, axis)
        key = jnp.where(ok, key, jnp.inf)
        key = jnp.where(first[order].reshape(groups, -1), -jnp.inf, key)
        within = jnp.argsort(key, axis=1, stable=True)
        order = jnp.take_along_axis(order.reshape(groups, -1), within, axis=1).reshape(-1)
        groups *= 2
    return order
