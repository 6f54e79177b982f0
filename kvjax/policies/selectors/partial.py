"""A few rotated channels of the keys: InfiniGen's selector."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import NEVER, Call, Entries, Index, Selector, index_axes
from kvjax.policies.selectors.pages import scatter_pages
from kvjax.types import ModelShape

Array = jax.Array


def skew(q: Array, k: Array) -> Array:
    """The orthogonal A [.., d, d] that gathers a head's energy in its first channels: the right singular vectors of its
    queries q [.., n, d], ordered by (singular value) * |k v|. q, k f32, rows of zeros for what is not there."""
    value, vectors = jnp.linalg.eigh(jnp.einsum("...nd,...ne->...de", q, q, precision="highest"))
    energy = jnp.linalg.norm(jnp.einsum("...nd,...de->...ne", k, vectors, precision="highest"), axis=-2)
    order = jnp.argsort(-jnp.sqrt(jnp.maximum(value, 0)) * energy, axis=-1)
    return jnp.take_along_axis(vectors, order[..., None, :], axis=-1)


@dataclasses.dataclass(frozen=True)
class PartialChannels(Selector):
    """Logits from the channels of q A and k A that carry the prompt's queries; A is `skew` of the prompt, per KV head.

    index: a [batch, kv_heads, head_dim, channels], the columns of A with the largest sum_t |(q A)_tc|, and the keys' part
    k [batch, kv_heads, slots, channels] = K a. With s = q a . k / sqrt(d), a head needs the n entries with s > max s - alpha;
    every head reads as many as the heads need on average, `read` at most. A group of query heads shares the largest
    s - max s. read=1.0 reads everything, whatever alpha. ahead: q is what the layer before foresaw.
    """

    ratio: float = 0.2
    alpha: float = 4.0
    ahead: bool = True  # type: ignore[misc]

    def _channels(self, shape: ModelShape) -> int:
        return max(1, round(shape.head_dim * self.ratio))

    def check(self, shape: ModelShape) -> None:
        """ratio in (0, 1], alpha above 0."""
        if not 0 < self.ratio <= 1 or self.alpha <= 0:
            raise ValueError(
                f"infinigen: ratio must be in (0, 1] and alpha above 0, got {self.ratio} and {self.alpha}"
            )

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """See the class."""
        h, d, c = shape.kv_heads, shape.head_dim, self._channels(shape)
        return {
            "a": ArraySpec((batch, h, d, c), "float32", ("batch", "kv_heads", "head_dim", None)),
            "k": ArraySpec((batch, h, slots, c), shape.dtype, index_axes(1)),
        }

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """The skew of this call's queries and all keys, its largest channels, and the keys' part."""
        b, h, _, d = entries.k.shape
        q = jnp.where((call.q_pos >= 0)[:, None, :, None], call.q, 0).astype(jnp.float32)
        q = q.reshape(b, h, -1, d)  # a group's queries one after the other
        a = skew(q, entries.k.astype(jnp.float32))
        sums = jnp.sum(jnp.abs(jnp.einsum("bhnd,bhde->bhne", q, a)), axis=2)
        best = jax.lax.top_k(sums, index["a"].shape[3])[1]
        index = index | {"a": jnp.take_along_axis(a, best[:, :, None], axis=3)}
        return self.append(index, entries, call)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """The new keys' part."""
        part = jnp.einsum("bhnd,bhdc->bhnc", entries.k.astype(jnp.float32), index["a"])
        return index | {"k": scatter_pages(index["k"], entries.slots, part, "set")}

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """s - max s of the group's best head; NEVER beyond the number that is needed."""
        q = jnp.einsum("bhgd,bhdc->bhgc", call.grouped, index["a"])
        s = jnp.einsum("bhgc,bhnc->bhgn", q, index["k"].astype(jnp.float32)) * call.scale
        if self.read == 1.0 and isinstance(self.read, float):
            return jnp.zeros(s.shape[:2] + s.shape[3:]), index
        used = jnp.arange(s.shape[3]) < call.fill[..., None]
        s = jnp.where(used[:, :, None], s, NEVER)
        below = jnp.max(s - jnp.max(s, axis=3, keepdims=True), axis=2)
        needed = jnp.mean(jnp.sum(below > -self.alpha, axis=2), axis=1)  # [batch]
        most = min(self.entries(s.shape[3]), s.shape[3])
        ranked = jax.lax.top_k(below, most)[0]
        last = jnp.clip(jnp.ceil(needed).astype(jnp.int32), 1, most) - 1
        limit = jnp.take_along_axis(
            ranked, jnp.broadcast_to(last[:, None, None], (*below.shape[:2], 1)), axis=2
        )
        return jnp.where(below >= limit, below, NEVER), index
