"""Bounds of keys over a tree of chunks, refined where they are high: LeoAM's selector."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec, itembits
from kvjax.policies.selectors.base import NEVER, Call, Entries, Index, Selector, index_axes
from kvjax.policies.selectors.pages import scatter_pages
from kvjax.types import ModelShape

Array = jax.Array


def bounds(q: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """(lower, upper) bound of q.k over boxes: q [.., g, d], low and high [.., n, d] -> f32 [.., g, n].

    Boxes with low > high hold nothing: both bounds are NEVER.
    """
    q, empty = q.astype(jnp.float32), (low > high)[..., :1]
    low, high = (jnp.where(empty, 0, x).astype(jnp.float32) for x in (low, high))
    up, down = jnp.maximum(q, 0), jnp.minimum(q, 0)
    product = lambda a, b: jnp.einsum("...gd,...nd->...gn", a, b, precision="highest")  # noqa: E731
    nothing = jnp.swapaxes(empty, -1, -2)
    lower, upper = product(up, low) + product(down, high), product(up, high) + product(down, low)
    return jnp.where(nothing, NEVER, lower), jnp.where(nothing, NEVER, upper)


@dataclasses.dataclass(frozen=True)
class BoundsPyramid(Selector):
    """Chunks of `chunk` slots are ranked by their upper bound of q.k; the best are halved and ranked again, `rounds` times.

    index: low0, high0 .. lowR, highR [batch, kv_heads, slots / size, head_dim], element-wise extrema of the keys in chunks
    of chunk / 2^r slots. Every round keeps the chunks of `widen` times the entries to read, the last one those to read; what
    was dropped is not looked at again. A group of query heads shares the largest bound.
    """

    chunk: int = 128
    rounds: int = 3
    widen: float = 2.0

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots of the smallest chunk."""
        return max(1, self.chunk >> self.rounds)

    def check(self, shape: ModelShape) -> None:
        """chunk a power of two of at least 2^rounds; widen at least 1."""
        if self.rounds < 0 or self.widen < 1 or self.unit << self.rounds != self.chunk:
            raise ValueError(
                f"leoam: chunk={self.chunk} cannot be halved {self.rounds} times, or widen={self.widen} is below 1"
            )

    def _sizes(self) -> list[int]:
        return [self.chunk >> r for r in range(self.rounds + 1)]

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """Bounds of every level; an empty chunk has the empty interval."""
        limit, out = float(jnp.finfo(shape.dtype).max), {}
        for r, size in enumerate(self._sizes()):
            boxes = (batch, shape.kv_heads, -(-slots // size), shape.head_dim)
            out[f"low{r}"] = ArraySpec(boxes, shape.dtype, index_axes(1), fill=limit)
            out[f"high{r}"] = ArraySpec(boxes, shape.dtype, index_axes(1), fill=-limit)
        return out

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Widen the chunks that got entries, on every level."""
        out = dict(index)
        for r, size in enumerate(self._sizes()):
            at = jnp.where(entries.slots >= 0, entries.slots // size, -1)
            out[f"low{r}"] = scatter_pages(index[f"low{r}"], at, entries.k, "min")
            out[f"high{r}"] = scatter_pages(index[f"high{r}"], at, entries.k, "max")
        return out

    def _kept(self, r: int, slots: int) -> int:
        """Chunks of level r that are halved."""
        size = self.chunk >> r
        return min(-(-int(self.entries(slots) * self.widen) // size) + 1, -(-slots // size))

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Upper bounds of the smallest chunks that every round kept; NEVER for the others."""
        units = index[f"low{self.rounds}"].shape[2]
        q, slots = call.grouped, units * self.unit
        upper = jnp.max(bounds(q, index["low0"], index["high0"])[1], axis=2)
        number = jnp.broadcast_to(jnp.arange(upper.shape[2], dtype=jnp.int32), upper.shape)
        for r in range(1, self.rounds + 1):
            place = jax.lax.top_k(upper, min(self._kept(r - 1, slots), upper.shape[2]))[1]
            parents = jnp.take_along_axis(number, place, axis=2)
            number = jnp.stack([2 * parents, 2 * parents + 1], axis=-1).reshape(*parents.shape[:2], -1)
            boxes = index[f"low{r}"].shape[2]
            take = lambda x: jnp.take_along_axis(x, jnp.minimum(number, boxes - 1)[..., None], axis=2)  # noqa: E731, B023
            upper = jnp.max(bounds(q, take(index[f"low{r}"]), take(index[f"high{r}"]))[1], axis=2)
            upper = jnp.where(number < boxes, upper, NEVER)
        put = jax.vmap(jax.vmap(lambda n, x: jnp.full((units,), NEVER).at[n].set(x, mode="drop")))
        return put(number, upper), index

    def scanned(self, specs: dict[str, ArraySpec], slots: int, batch: int, shape: ModelShape) -> float:
        """The coarsest level, and two halves of each chunk that was kept."""
        boxes = -(-slots // self.chunk) + sum(2 * self._kept(r, slots) for r in range(self.rounds))
        return batch * shape.kv_heads * boxes * 2 * shape.head_dim * itembits(shape.dtype) / 8
