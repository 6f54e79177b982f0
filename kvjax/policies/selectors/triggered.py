"""Selection at semantic boundaries only (LouisKV)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import Call, Entries, Index
from kvjax.policies.selectors.clusters import Clusters
from kvjax.policies.selectors.grouping import put_labels, unit_length
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Boundaries(Clusters):
    """Clusters of the prompt and segments of the output, looked up when the query turns (LouisKV).

    r_t = mean over all query heads of cos(q_{t-1}, q_t); below `trigger`, the entries since the last boundary become a
    unit of their own (its key: their mean), and a new choice is made; else the last one stays. Entries of the
    open segment are in no unit: the newest of them are read by `recent`. Index: as `Clusters`, and last [batch,
    q_heads, head_dim] (the query before), opened int32 [batch, kv_heads] (first slot of the open segment), total f32
    [batch, kv_heads, head_dim] (sum of its keys), newest f32 [batch, kv_heads, head_dim] (the newest key), end int32
    [batch, kv_heads] (slots in the index), due bool [batch].
    """

    per: int = 16
    over: str = "softmax_mean"
    trigger: float = 0.7
    flush: int = 1 << 30
    into: int = 1
    segments: int = 16  # slots of a segment for which the index has room, on average
    cosine: ClassVar[bool] = False
    triggered: ClassVar[bool] = True

    def most(self, slots: int) -> int:
        """Clusters of a prompt, or segments of an output, of `slots` slots."""
        return max(1, slots // min(self.per, self.segments))

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        heads, lead = (batch, shape.kv_heads), ("batch", "kv_heads")
        return {
            **super().specs(batch, slots, shape),
            "last": ArraySpec((batch, shape.q_heads, shape.head_dim), "float32", ("batch", "q_heads", None)),
            "opened": ArraySpec(heads, "int32", lead),
            "end": ArraySpec(heads, "int32", lead),
            "total": ArraySpec((*heads, shape.head_dim), "float32", (*lead, None)),
            "newest": ArraySpec((*heads, shape.head_dim), "float32", (*lead, None)),
            "due": ArraySpec((batch,), "bool", ("batch",)),
        }

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Cluster the prompt; its last query is the first to compare with."""
        made = super().build(index, entries, call, previous)
        newest = jnp.argmax(call.q_pos, axis=1)[:, None, None, None]
        last = jnp.take_along_axis(call.q, newest, axis=2)[:, :, 0].astype(jnp.float32)
        return {**made, "last": last, "opened": made["grouped"], "end": made["grouped"]}

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Add the new keys to the open segment."""
        valid = entries.slots >= 0
        new = jnp.where(valid[..., None], entries.k.astype(jnp.float32), 0)
        at = jnp.argmax(entries.slots, axis=-1)[..., None, None]
        newest = jnp.take_along_axis(new, at, axis=2)[:, :, 0]
        some = jnp.any(valid, axis=-1)
        return {
            **index,
            "total": index["total"] + jnp.sum(new, axis=2),
            "newest": jnp.where(some[..., None], newest, index["newest"]),
            "end": jnp.maximum(index["end"], jnp.max(entries.slots, axis=-1) + 1),
        }

    def due(self, index: Index, call: Call) -> tuple[Array, Index]:
        """bool [batch]: the mean cosine of this query and the last is below the trigger."""
        q = call.q[:, :, -1].astype(jnp.float32)
        r = jnp.mean(jnp.sum(unit_length(q) * unit_length(index["last"]), axis=-1), axis=1)
        due = r < self.trigger
        return due, {**index, "last": q, "due": due}

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Close the open segments of the rows that are due, then score clusters and segments alike."""
        return super().score(self._close(index), call)

    def _close(self, index: Index) -> Index:
        """The segment [opened, newest slot) as a unit; the newest entry belongs to the next one."""
        u = index["centroids"].shape[2]
        end = index["end"] - 1
        size = end - index["opened"]
        close = index["due"][:, None] & (size > 0) & (index["used"] < u)
        mean = (index["total"] - index["newest"]) / jnp.maximum(size, 1)[..., None]
        here = (jnp.arange(u) == index["used"][..., None]) & close[..., None]
        slot = jnp.arange(index["labels"].shape[2], dtype=jnp.int32)
        inside = (slot >= index["opened"][..., None]) & (slot < end[..., None]) & close[..., None]
        labels = jnp.broadcast_to(index["used"][..., None], inside.shape)
        centroids = jnp.where(here[..., None], mean[:, :, None], index["centroids"].astype(jnp.float32))
        return {
            **index,
            "centroids": centroids.astype(index["centroids"].dtype),
            "labels": put_labels(index["labels"], jnp.where(inside, slot, -1), labels),
            "used": index["used"] + close,
            "opened": jnp.where(close, end, index["opened"]),
            "total": jnp.where(close[..., None], index["newest"], index["total"]),
        }
