"""Selectors over pages of consecutive slots."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import Call, Entries, Index, Selector, index_axes, over_group
from kvjax.types import ModelShape

Array = jax.Array


def scatter_pages(array: Array, pages: Array, values: Array, how: str) -> Array:
    """Combine values [batch, kv_heads, n, ...] into array [batch, kv_heads, pages, ...] at pages int32 [batch, kv_heads, n]
    (-1 = dropped). how: 'min', 'max', 'add' or 'set'."""
    pages = jnp.where(pages < 0, array.shape[2], pages)

    def put(a: Array, p: Array, x: Array) -> Array:
        return getattr(a.at[p], how)(x.astype(a.dtype), mode="drop")

    return jax.vmap(jax.vmap(put))(array, pages, values)


@dataclasses.dataclass(frozen=True)
class PageBounds(Selector):
    """Element-wise bounds of each page's keys; score = an upper bound of q.k over the page (Quest).

    index: bounds [batch, kv_heads, pages, 2 head_dim] in the keys' dtype, k_max then -k_min; score(q, page) =
    sum_c max(q_c k_max_c, q_c k_min_c). over: how the query heads of a group share one choice, see `over_group`.
    """

    page: int = 16
    over: str = "max"

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots per page."""
        return self.page

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """Bounds of every page; an empty page has the empty interval."""
        size = (batch, shape.kv_heads, slots // self.page, 2 * shape.head_dim)
        limit = float(jnp.finfo(shape.dtype).max)
        return {"bounds": ArraySpec(size, shape.dtype, index_axes(1), fill=-limit)}

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Widen the bounds of the pages that got entries."""
        pages = jnp.where(entries.slots >= 0, entries.slots // self.page, -1)
        ends = jnp.concatenate([entries.k, -entries.k], axis=-1)
        return {"bounds": scatter_pages(index["bounds"], pages, ends, "max")}

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """The bound: positive channels of q times k_max plus negative ones times k_min, as one matrix product.

        Of an empty page it is -inf: every term is a huge negative number, or 0.
        """
        q = call.grouped
        q = jnp.concatenate([jnp.maximum(q, 0), jnp.maximum(-q, 0)], axis=-1).astype(index["bounds"].dtype)
        scores = jnp.einsum("bhgd,bhpd->bhgp", q, index["bounds"], preferred_element_type=jnp.float32)
        return over_group(scores, self.over), index


@dataclasses.dataclass(frozen=True)
class SubChunkBounds(PageBounds):
    """Pages of `page` slots by the best bound of their sub-chunks of `chunk` slots (LServe).

    index: bounds [batch, kv_heads, sub-chunks, 2 head_dim], as `PageBounds`. least: entries that every head reads at
    least, so that heads with few entries (streaming heads) are read whole.
    """

    page: int = 64
    chunk: int = 16
    least: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1 or self.page % self.chunk:
            raise ValueError(f"LServe: page={self.page} must be a multiple of chunk={self.chunk}")

    @property
    def fine(self) -> PageBounds:
        """The bounds of the sub-chunks."""
        return PageBounds(1.0, page=self.chunk, over=self.over)

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """Bounds of every sub-chunk."""
        return self.fine.specs(batch, slots, shape)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Widen the bounds of the sub-chunks that got entries."""
        return self.fine.append(index, entries, call)

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """The largest bound of a page's sub-chunks."""
        scores, _ = self.fine.score(index, call)
        return jnp.max(scores.reshape(*scores.shape[:2], -1, self.page // self.chunk), axis=-1), index

    def entries(self, stored: int) -> int:
        """At least `least`."""
        return min(stored, max(super().entries(stored), self.least))


@dataclasses.dataclass(frozen=True)
class ExactTopK(Selector):
    """The oracle: every stored key is scored. score = q.k, combined over the group; reads all keys to choose."""

    over: str = "softmax_max"

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Logits of every slot."""
        entries = call.stored()
        q, k = call.grouped, entries.k.astype(jnp.float32)
        logits = jnp.einsum("bhgd,bhnd->bhgn", q, k, precision="highest") * call.scale
        return over_group(logits, self.over, (entries.pos >= 0)[:, :, None]), index

    def scanned(self, specs: dict[str, ArraySpec], slots: int, batch: int, shape: ModelShape) -> float:
        """All keys."""
        return float(batch * shape.kv_heads * slots * shape.head_dim * jnp.dtype(shape.dtype).itemsize)
