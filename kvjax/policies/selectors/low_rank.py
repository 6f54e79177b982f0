"""Keys in low rank on the device, values fetched: ShadowKV's selector."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec, itembits
from kvjax.codecs.transforms import rope
from kvjax.policies.selectors.base import NEVER, Call, Entries, Index, Selector, index_axes, over_group
from kvjax.policies.selectors.pages import scatter_pages
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LowRankKeys(Selector):
    """Landmarks choose chunks; chosen keys are rebuilt from a low-rank product, outlier chunks stay exact.

    index: u [batch, slots, rank] and s [batch, kv_heads, rank, head_dim] with u s = the best approximation of rank `rank` of
    the prompt's keys before RoPE, all KV heads side by side; mark [batch, kv_heads, chunks, head_dim], sums of a chunk's
    keys after RoPE (new tokens included); outlier [batch, kv_heads, outliers] chunks and their exact keys and values.
    An outlier is a chunk whose least similar key (cosine to the chunk's mean) is least similar of all; outliers are attended
    at every step beside the `read` entries. The score of a chunk: softmax over the landmarks of q.mean, `over` the group.
    """

    chunk: int = 8
    rank: int = 160
    outliers: int = 48
    over: str = "softmax_max"
    supplies = frozenset({"k"})

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots per chunk."""
        return self.chunk

    def _rank(self, shape: ModelShape) -> int:
        return min(self.rank, shape.kv_heads * shape.head_dim)

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """See the class; positions of the prompt's slots rotate the rebuilt keys."""
        h, d, r, dtype = shape.kv_heads, shape.head_dim, self._rank(shape), shape.dtype
        far = (batch, h, self.outliers * self.chunk, d)
        axes = ("batch", "kv_heads", None, "head_dim")
        return {
            "u": ArraySpec((batch, slots, r), dtype, ("batch", "slots", None)),
            "s": ArraySpec((batch, h, r, d), dtype, axes),
            "at": ArraySpec((batch, h, slots), "int32", index_axes(0)),
            "mark": ArraySpec((batch, h, slots // self.chunk, d), dtype, index_axes(1)),
            "outlier": ArraySpec((batch, h, self.outliers), "int32", ("batch", "kv_heads", None), fill=-1),
            "outlier_k": ArraySpec(far, dtype, axes),
            "outlier_v": ArraySpec(far, dtype, axes),
        }

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Landmarks, outliers and the truncated singular value decomposition, through the Gram matrix of the channels."""
        index = self.append(index, entries, call)
        b, h, n, d = entries.k.shape
        valid = (entries.pos >= 0)[..., None]
        plain = rope(entries.k.astype(jnp.float32), jnp.maximum(entries.pos, 0), call.inv_freq, inverse=True)
        flat = jnp.where(valid, plain, 0).transpose(0, 2, 1, 3).reshape(b, n, h * d)
        gram = jnp.einsum("bnc,bne->bce", flat, flat, precision="highest")
        rank = index["s"].shape[2]
        basis = jnp.linalg.eigh(gram)[1][..., ::-1][..., :rank]  # [batch, h * d, rank]
        u = jnp.einsum("bnc,bcr->bnr", flat, basis, precision="highest")
        s = basis.reshape(b, h, d, rank).swapaxes(2, 3)
        return self._outliers(index, entries, call) | {
            "u": u.astype(index["u"].dtype),
            "s": s.astype(index["s"].dtype),
            "at": jnp.maximum(entries.pos, 0),
        }

    def _outliers(self, index: Index, entries: Entries, call: Call) -> Index:
        b, h, n, d = entries.k.shape
        k = entries.k.reshape(b, h, -1, self.chunk, d).astype(jnp.float32)
        mean = jnp.mean(k, axis=3, keepdims=True)
        size = jnp.linalg.norm(k, axis=-1) * jnp.linalg.norm(mean, axis=-1)
        least = jnp.min(jnp.sum(k * mean, axis=-1) / jnp.maximum(size, 1e-12), axis=3)  # [b, h, chunks]
        number = jnp.arange(least.shape[2], dtype=jnp.int32)
        local = jnp.maximum(call.fill - self.recent, 0)[..., None] // self.chunk
        count = min(self.outliers, least.shape[2])
        worst, chosen = jax.lax.top_k(jnp.where(number < local, -least, NEVER), count)
        chosen = jnp.where(worst > NEVER, chosen, -1)
        chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, self.outliers - count)), constant_values=-1)

        def take(x: Array) -> Array:
            x = x.reshape(b, h, -1, self.chunk, d)
            got = jnp.take_along_axis(x, jnp.maximum(chosen, 0)[..., None, None], axis=2)
            return got.reshape(b, h, -1, d).astype(index["outlier_k"].dtype)

        return index | {"outlier": chosen, "outlier_k": take(entries.k), "outlier_v": take(entries.v)}

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Add new keys to the sums of their chunks."""
        chunks = jnp.where(entries.slots >= 0, entries.slots // self.chunk, -1)
        return index | {"mark": scatter_pages(index["mark"], chunks, entries.k, "add")}

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Outliers are never chosen: `estimate` attends to them."""
        mean = index["mark"].astype(jnp.float32) / self.chunk
        logits = jnp.einsum("bhgd,bhcd->bhgc", call.grouped, mean) * call.scale
        chunks = mean.shape[2]
        put = jax.vmap(jax.vmap(lambda n: jnp.zeros((chunks,), bool).at[n].set(True, mode="drop")))
        outlier = put(jnp.where(index["outlier"] < 0, chunks, index["outlier"]))
        used = (jnp.arange(chunks) * self.chunk < call.fill[..., None]) & ~outlier
        return jnp.where(outlier, NEVER, over_group(logits, self.over, used[:, :, None])), index

    def supply(self, index: Index, call: Call, slots: Array) -> dict[str, Array]:
        """k = RoPE(u s) at the slots' positions."""
        slots = jnp.minimum(slots, index["u"].shape[1] - 1)
        rows = jax.vmap(lambda u, n: jnp.take(u, n, axis=0, mode="clip"))(index["u"], slots)
        k = jnp.einsum("bhnr,bhrd->bhnd", rows, index["s"], preferred_element_type=jnp.float32)
        at = jnp.take_along_axis(index["at"], slots, axis=2)
        return {"k": rope(k, at, call.inv_freq)}

    def estimate(self, index: Index, call: Call, chosen: Array) -> tuple[Array, Array]:
        """Exact attention over the outliers."""
        k, v = index["outlier_k"].astype(jnp.float32), index["outlier_v"].astype(jnp.float32)
        logits = jnp.einsum("bhgd,bhnd->bhgn", call.grouped, k) * call.scale
        if call.softcap is not None:
            logits = call.softcap * jnp.tanh(logits / call.softcap)
        used = jnp.repeat(index["outlier"] >= 0, self.chunk, axis=2)
        logits = jnp.where(used[:, :, None], logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        p = jnp.exp(logits - jnp.where(lse > -jnp.inf, lse, 0)[..., None])
        out = jnp.einsum("bhgn,bhnd->bhgd", p, v)
        heads = out.shape[1] * out.shape[2]
        return out.reshape(out.shape[0], heads, 1, -1), lse.reshape(out.shape[0], heads, 1)

    def scanned(self, specs: dict[str, ArraySpec], slots: int, batch: int, shape: ModelShape) -> float:
        """Landmarks, outliers, the factor s, and rows of u in place of the read keys."""
        names = ("mark", "s", "outlier_k", "outlier_v")
        rows = self.entries(slots) * (self._rank(shape) - shape.head_dim) * itembits(shape.dtype) / 8
        return float(sum(specs[n].nbytes for n in names) + batch * shape.kv_heads * rows)
