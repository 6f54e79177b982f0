"""Sampling by locality-sensitive hashing (MagicPIG)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import ALWAYS, NEVER, Call, Entries, Index, Selector, index_axes
from kvjax.policies.selectors.grouping import heads_map, means, put_labels
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HashSampling(Selector):
    """Entries whose hash meets the query's in two of `tables` tables, their logits corrected for the odds (MagicPIG).

    hash: signs of `bits` random projections of k - mean k, or of q. With p = (1 - angle(q, k) / pi)**bits the
    odds of an entry are u = 1 - (1-p)^tables - tables p (1-p)^(tables-1), and its logit is q.k - log(u + 1e-4). Sinks,
    the prompt's last `local` entries and all that came later are read exactly. A KV head reads what any query head of
    its group met, and each query head attends to what it met itself. More entries than `read` are cut, most meetings
    first, which biases the estimate. Index: hashes int16 [batch, kv_heads, slots, tables], center f32
    [batch, kv_heads, head_dim], exact int32 [batch, kv_heads] (first slot of those that are always read).
    """

    bits: int = 10
    tables: int = 150
    local: int = 64
    seed: int = 0
    biased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 15 or self.tables < 2 or self.local < 0:
            raise ValueError(f"{type(self).__name__}: needs bits of 1 to 15, tables >= 2 and local >= 0")

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        lead, names = (batch, shape.kv_heads), ("batch", "kv_heads")
        return {
            "hashes": ArraySpec((*lead, slots, self.tables), "int16", index_axes(1), fill=-1),
            "center": ArraySpec((*lead, shape.head_dim), "float32", (*names, None)),
            "exact": ArraySpec(lead, "int32", names),
        }

    def hash(self, x: Array) -> Array:
        """int32 [..., tables] of x [..., head_dim]."""
        d = x.shape[-1]
        planes = np.random.default_rng(self.seed).standard_normal((d, self.tables * self.bits))
        signs = jnp.matmul(x.astype(jnp.float32), jnp.asarray(planes, jnp.float32), precision="highest") > 0
        signs = signs.reshape(*x.shape[:-1], self.tables, self.bits)
        return jnp.sum(signs << jnp.arange(self.bits), axis=-1)

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Hash the prompt."""
        valid = entries.pos >= 0
        k = jnp.where(valid[..., None], entries.k.astype(jnp.float32), 0)
        center = means(jnp.sum(k, axis=2)[:, :, None], jnp.sum(valid, axis=2)[..., None])[:, :, 0]
        hashes = jax.lax.map(lambda x: self.hash(x), jnp.moveaxis(k - center[:, :, None], 1, 0))
        return {
            "hashes": put_labels(index["hashes"], entries.slots, jnp.moveaxis(hashes, 0, 1)),
            "center": center,
            "exact": jnp.maximum(jnp.max(entries.slots, axis=-1) + 1 - self.local, 0).astype(jnp.int32),
        }

    def meetings(self, index: Index, call: Call) -> Array:
        """int32 [batch, kv_heads, groups, slots]: tables in which an entry meets a query head."""
        q = self.hash(call.grouped)
        one = lambda h, q: jnp.sum(h == q, axis=-1, dtype=jnp.int32)  # noqa: E731
        return heads_map(lambda h, q: jax.vmap(lambda q: one(h, q))(q))(index["hashes"], q)

    def _exact(self, index: Index) -> Array:
        """bool [batch, kv_heads, slots]."""
        slot = jnp.arange(index["hashes"].shape[2])
        return (slot < self.sink) | (slot >= index["exact"][..., None])

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """The most meetings with a head of the group; NEVER below two."""
        met = jnp.max(self.meetings(index, call), axis=2)
        none = 0.0 if self.read == 1.0 else NEVER
        scores = jnp.where(met >= 2, met.astype(jnp.float32), none)
        return jnp.where(self._exact(index), ALWAYS, scores), index

    def bias(self, index: Index, call: Call, slots: Array) -> Array:
        """-log(u + 1e-4) of sampled entries, 0 of those always read, NEVER where this head met none."""
        b, h, n = slots.shape
        at = jnp.maximum(slots, 0)
        stored = call.stored()
        k = jnp.take_along_axis(stored.k, jnp.minimum(at, stored.k.shape[2] - 1)[..., None], axis=2)
        k = k.astype(jnp.float32) - index["center"][:, :, None]
        q = call.grouped
        dots = jnp.einsum("bhgd,bhnd->bhgn", q, k, precision="highest")
        lengths = jnp.linalg.norm(q, axis=-1)[..., None] * jnp.linalg.norm(k, axis=-1)[:, :, None]
        odds = sampling_odds(dots / jnp.maximum(lengths, 1e-12), self.bits, self.tables)
        take = heads_map(lambda x, i: x[..., i])
        met = take(self.meetings(index, call), at) >= 2
        found = jnp.where(met, -jnp.log(odds + 1e-4), NEVER)
        newest = at >= call.fill[..., None] - self.recent
        exact = (take(self._exact(index), at) | newest)[:, :, None]
        return jnp.where(exact, 0.0, found).reshape(b, -1, n)


def sampling_odds(cosine: Array, bits: int, tables: int) -> Array:
    """Probability that two vectors of this cosine meet in at least 2 of `tables` tables of `bits` bits."""
    p = (1 - jnp.arccos(jnp.clip(cosine, -1, 1)) / jnp.pi) ** bits
    return 1 - (1 - p) ** (tables - 1) * (1 + (tables - 1) * p)
