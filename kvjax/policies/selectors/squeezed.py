"""Squeezed Attention: thresholds on the softmax over centroids, in two levels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import NEVER, Call, Entries, Index, Selector, index_axes
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
class CentroidThreshold(Selector):
    """Entries whose cluster's share of the softmax over clusters exceeds a threshold of the prompt's last queries.

    S_c = exp(q.mu_c) / sum_j N_j exp(q.mu_j), mean over the query heads of a KV head. Clusters of clusters are looked up
    first; those below their own threshold are pruned, and leave the sum. Index, U clusters and V of the coarse level:
    fine [batch, kv_heads, U, head_dim], coarse [.., V, head_dim], sizes int32 [.., U], parents int32 [.., U] (-1: empty),
    labels [.., slots] (-1: always read), thresholds f32 [batch, 2] (coarse, fine; one for all heads of a layer).

    per, coarse_per: entries per cluster. percentile, coarse_percentile: share of the prompt's entries below the
    threshold. window: the last queries that set it, and the newest entries left out of the clusters.
    """

    per: int = 20
    coarse_per: int = 100
    percentile: float = 0.9
    coarse_percentile: float = 0.5
    window: int = 100
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.percentile < 1 and 0 <= self.coarse_percentile < 1):
            raise ValueError(f"{type(self).__name__}: percentiles must be in [0, 1)")
        if min(self.per, self.coarse_per, self.window, self.rounds) < 1:
            raise ValueError(f"{type(self).__name__}: per, coarse_per, window and rounds must be at least 1")

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        u, v = max(1, slots // self.per), max(1, slots // self.coarse_per)
        lead = (batch, shape.kv_heads)
        number = ArraySpec((*lead, u), "int32", index_axes(0))
        return {
            "fine": ArraySpec((*lead, u, shape.head_dim), shape.dtype, index_axes(1)),
            "coarse": ArraySpec((*lead, v, shape.head_dim), shape.dtype, index_axes(1)),
            "sizes": number,
            "parents": dataclasses.replace(number, fill=-1),
            "labels": label_spec(batch, slots, shape, u),
            "thresholds": ArraySpec((batch, 2), "float32", ("batch", None)),
        }

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Cluster all but the last `window` entries, then the centroids, then replay the last queries."""
        u, v = index["fine"].shape[2], index["coarse"].shape[2]
        valid = entries.pos >= 0
        stored = jnp.sum(valid, axis=-1, keepdims=True)
        valid &= (entries.slots < stored - self.window) & (entries.slots >= 0)
        n = jnp.sum(valid, axis=-1, dtype=jnp.int32)
        labels = kmeans(
            entries.k, valid, jnp.clip(n // self.per, 1, u), most=u, rounds=self.rounds, cosine=True
        )
        fine, sizes = heads_map(lambda x, i: group_sums(x, i, u))(entries.k, labels)
        fine, full = means(fine, sizes), sizes > 0
        count = jnp.clip(n // self.coarse_per, 1, v)
        parents = kmeans(fine, full, count, most=v, rounds=self.rounds, cosine=True)
        coarse = means(*heads_map(lambda x, i: group_sums(x, i, v))(fine, parents))
        made = {
            "fine": fine.astype(index["fine"].dtype),
            "coarse": coarse.astype(index["coarse"].dtype),
            "sizes": sizes,
            "parents": parents,
            "labels": put_labels(index["labels"], jnp.where(labels >= 0, entries.slots, -1), labels),
        }
        return {**made, "thresholds": self._thresholds(made, call)}

    def _thresholds(self, index: Index, call: Call) -> Array:
        """f32 [batch, 2]: quantiles, over entries, heads and the last queries, of the entries' S."""
        valid = call.q_pos >= 0
        order = jnp.argsort(jnp.where(valid, call.q_pos, -1), axis=1)[:, -self.window :]
        q = jnp.take_along_axis(call.q, order[:, None, :, None], axis=2)
        used = jnp.take_along_axis(valid, order, axis=1)
        b, h, t, d = q.shape
        kv = index["fine"].shape[1]
        q = q.reshape(b, kv, h // kv, t, d).transpose(0, 3, 1, 2, 4).astype(jnp.float32)
        out = []
        for level, share in (("coarse", self.coarse_percentile), ("fine", self.percentile)):
            s, sizes = jax.vmap(lambda q, level=level: self._share(index, q, call.scale, level), in_axes=1)(q)
            weight = jnp.broadcast_to(sizes, s.shape) * used.T[:, :, None, None]
            out.append(jax.vmap(_weighted_quantile, in_axes=(1, 1, None))(s, weight, share))
        return jnp.stack(out, axis=1)

    def _share(
        self, index: Index, q: Array, scale: float, level: str, keep: Array | None = None
    ) -> tuple[Array, Array]:
        """(S f32 [batch, kv_heads, groups of the level], entries of each) of q [batch, kv_heads, heads, head_dim]."""
        sizes = index["sizes"]
        if level == "coarse":
            v = index["coarse"].shape[2]
            at = jnp.where(index["parents"] < 0, v, index["parents"])
            sizes = heads_map(lambda i, n: jnp.zeros((v,), jnp.int32).at[i].add(n, mode="drop"))(at, sizes)
        live = (sizes > 0) if keep is None else keep & (sizes > 0)
        centroids = index[level].astype(jnp.float32)
        logits = jnp.einsum("bhgd,bhud->bhgu", q, centroids, precision="highest") * scale
        logits = jnp.where(live[:, :, None], logits, -jnp.inf)
        top = jnp.max(logits, axis=-1, keepdims=True)
        e = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
        total = jnp.sum(e * sizes[:, :, None], axis=-1, keepdims=True)
        return jnp.mean(e / jnp.maximum(total, 1e-30), axis=2), sizes

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """S of every slot's cluster, NEVER at or below the threshold (read=1.0 reads what is below it too)."""
        limits = index["thresholds"][:, :, None, None]
        above, _ = self._share(index, call.grouped, call.scale, "coarse")
        parents = jnp.maximum(index["parents"], 0)
        keep = jnp.take_along_axis(above >= limits[:, 0], parents, axis=2)
        if self.read == 1.0:
            keep = jnp.ones_like(keep)
        s, _ = self._share(index, call.grouped, call.scale, "fine", keep)
        if self.read != 1.0:
            s = jnp.where(keep & (s >= limits[:, 1]), s, NEVER)
        return by_label(s, index["labels"]), index


def _weighted_quantile(x: Array, weight: Array, share: float) -> Array:
    """The smallest x with at least `share` of the weight at or below it, of arrays of one shape."""
    x, weight = x.reshape(-1), weight.reshape(-1).astype(jnp.float32)
    order = jnp.argsort(x)
    total = jnp.cumsum(weight[order])
    at = jnp.searchsorted(total, jnp.maximum(share * total[-1], 0.5), side="left")
    return x[order][jnp.clip(at, 0, x.shape[0] - 1)]
