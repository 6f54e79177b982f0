"""Selectors over clusters of similar keys: ClusterKV, and RetroInfer's three zones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import Call, Entries, Index, Selector, index_axes, over_group
from kvjax.policies.selectors.grouping import (
    by_label,
    group_sums,
    heads_map,
    kmeans,
    label_spec,
    means,
    put_labels,
)
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Clusters(Selector):
    """Whole clusters of keys in order of q.centroid, the last one cut at the budget (ClusterKV).

    index, U clusters: centroids [batch, kv_heads, U, head_dim] (mean key), labels [batch, kv_heads, slots] (-1: in no
    cluster, always read), used and grouped int32 [batch, kv_heads]: clusters in use, and slots that were clustered.
    per: entries per cluster of the prompt. flush, into: so many new entries are clustered alone, into so many clusters.
    """

    per: int = 80
    rounds: int = 20
    flush: int = 320
    into: int = 4
    over: str = "softmax_max"
    cosine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.per, self.rounds, self.flush, self.into) < 1:
            raise ValueError(f"{type(self).__name__}: per, rounds, flush and into must be at least 1")

    def most(self, slots: int) -> int:
        """Clusters that `slots` slots can have."""
        return max(1, slots // self.per, slots // self.flush * self.into) + self.into

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        u, lead = self.most(slots), (batch, shape.kv_heads)
        count = ArraySpec(lead, "int32", ("batch", "kv_heads"))
        return {
            "centroids": ArraySpec((*lead, u, shape.head_dim), shape.dtype, index_axes(1)),
            "labels": label_spec(batch, slots, shape, u),
            "used": count,
            "grouped": count,
        }

    def groups(self, index: Index, entries: Entries, labels: Array) -> Index:
        """The index arrays that hold something of every cluster, from entries and their labels."""
        u = index["centroids"].shape[2]
        return {"centroids": means(*heads_map(lambda x, n: group_sums(x, n, u))(entries.k, labels))}

    def to_cluster(self, entries: Entries, valid: Array) -> Array:
        """Keys as they are clustered, [batch, kv_heads, n, head_dim]."""
        return entries.k

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Cluster everything but the sinks."""
        valid = (entries.slots >= self.sink) & (entries.pos >= 0)
        grouped = jnp.max(entries.slots, axis=-1) + 1
        return self._cluster(index, entries, valid, grouped, lambda n: jnp.maximum(n // self.per, 1))

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """When `flush` entries are in no cluster, cluster them; clusters that exist do not change."""
        end = jnp.max(entries.slots, axis=-1) + 1
        due = end - index["grouped"] >= self.flush

        def cluster(index: Index) -> Index:
            stored = call.stored()
            valid = (stored.slots >= index["grouped"][..., None]) & (stored.pos >= 0) & due[..., None]
            grouped = jnp.where(due, end, index["grouped"])
            return self._cluster(index, stored, valid, grouped, lambda n: jnp.minimum(n, self.into))

        return jax.lax.cond(jnp.any(due), cluster, lambda index: index, index)

    def _cluster(self, index: Index, entries: Entries, valid: Array, grouped: Array, size) -> Index:  # type: ignore[no-untyped-def]
        n = jnp.sum(valid, axis=-1, dtype=jnp.int32)
        u = index["centroids"].shape[2]
        count = jnp.where(n > 0, jnp.minimum(size(n), u - index["used"]), 0)
        x = self.to_cluster(entries, valid)
        labels = kmeans(x, valid, count, most=u, rounds=self.rounds, cosine=self.cosine)
        labels = jnp.where((labels >= 0) & (count > 0)[..., None], labels + index["used"][..., None], -1)
        made = self.groups(index, entries, labels)
        new = jnp.arange(u) - index["used"][..., None]
        new = (new >= 0) & (new < count[..., None])
        merged = {
            name: jnp.where(new.reshape(*new.shape, *(1,) * (x.ndim - 3)), x, index[name]).astype(
                index[name].dtype
            )
            for name, x in made.items()
        }
        slots = jnp.where(labels >= 0, entries.slots, -1)
        return {
            **index,
            **merged,
            "labels": put_labels(index["labels"], slots, labels),
            "used": index["used"] + count,
            "grouped": grouped.astype(jnp.int32),
        }

    def cluster_scores(self, index: Index, call: Call) -> Array:
        """f32 [batch, kv_heads, clusters], -inf where there is none."""
        q, c = call.grouped, index["centroids"].astype(jnp.float32)
        logits = jnp.einsum("bhgd,bhud->bhgu", q, c, precision="highest") * call.scale
        live = self._live(index)
        return jnp.where(live, over_group(logits, self.over, live[:, :, None]), -jnp.inf)

    def _live(self, index: Index) -> Array:
        return jnp.arange(index["centroids"].shape[2]) < index["used"][..., None]

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Of every slot, its cluster's."""
        return by_label(self.cluster_scores(index, call), index["labels"]), index


@dataclasses.dataclass(frozen=True)
class ThreeZones(Clusters):
    """Clusters read exactly, clusters read as one weighted entry, and the rest not at all (RetroInfer).

    index: also values [batch, kv_heads, U, head_dim] (mean value) and sizes int32 [batch, kv_heads, U]. Of a cluster
    that the budget cuts, what is left is estimated. estimated: share of the clusters in the estimation zone.
    """

    per: int = 16
    rounds: int = 10
    flush: int = 1024
    into: int = 64
    over: str = "softmax_mean"
    estimated: float = 0.232

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        specs = super().specs(batch, slots, shape)
        c = specs["centroids"]
        return {**specs, "values": c, "sizes": ArraySpec(c.shape[:3], "int32", index_axes(0))}

    def to_cluster(self, entries: Entries, valid: Array) -> Array:
        """Keys less their mean: by direction, they would all be alike."""
        k = jnp.where(valid[..., None], entries.k.astype(jnp.float32), 0)
        return k - means(jnp.sum(k, axis=2, keepdims=True), jnp.sum(valid, axis=2)[..., None])

    def groups(self, index: Index, entries: Entries, labels: Array) -> Index:
        """Mean keys, mean values and sizes."""
        u = index["centroids"].shape[2]
        k, sizes = heads_map(lambda x, n: group_sums(x, n, u))(entries.k, labels)
        v = heads_map(lambda x, n: group_sums(x, n, u))(entries.v, labels)[0]
        return {"centroids": means(k, sizes), "values": means(v, sizes), "sizes": sizes}

    def estimate(self, index: Index, call: Call, chosen: Array) -> tuple[Array, Array]:
        """Attention over the next clusters, each one entry of its size: logit q.centroid + log(entries not read)."""
        scores, u = self.cluster_scores(index, call), index["centroids"].shape[2]
        labels = index["labels"][..., : chosen.shape[2]].astype(jnp.int32)
        at = jnp.where(chosen & (labels >= 0), labels, u)
        read = heads_map(lambda n: jnp.zeros((u,), jnp.int32).at[n].add(1, mode="drop"))(at)
        left = index["sizes"] - read
        scores = jnp.where(left > 0, scores, -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
        zone = (rank < self.estimated * index["used"][..., None]) & (scores > -jnp.inf)
        c = index["centroids"].astype(jnp.float32)
        logits = jnp.einsum("bhgd,bhud->bhgu", call.grouped, c, precision="highest") * call.scale
        if call.softcap is not None:
            logits = call.softcap * jnp.tanh(logits / call.softcap)
        logits = jnp.where(zone[:, :, None], logits + jnp.log(jnp.maximum(left, 1))[:, :, None], -jnp.inf)
        return summary_attention(logits, index["values"])


def summary_attention(logits: Array, values: Array) -> tuple[Array, Array]:
    """(out f32 [batch, q_heads, 1, head_dim], lse f32 [batch, q_heads, 1]) of logits [batch, kv_heads, groups, n], -inf =
    not there, over values [batch, kv_heads, n, head_dim]."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    p = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
    out = jnp.einsum("bhgn,bhnd->bhgd", p, values.astype(jnp.float32), precision="highest")
    b, h, g, d = out.shape
    return out.reshape(b, h * g, 1, d), lse.reshape(b, h * g, 1)
