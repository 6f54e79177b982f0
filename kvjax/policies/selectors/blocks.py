"""Blocks by one representative key (InfLLM, ActQKV)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.codecs.transforms import rope
from kvjax.policies.selectors.base import NEVER, Call, Entries, Index, Selector, index_axes
from kvjax.policies.selectors.grouping import grow_means
from kvjax.policies.selectors.pages import scatter_pages
from kvjax.types import ModelShape
from pallas_kernels import observe

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Representatives(Selector):
    """Blocks by their representative key, the mean of the `best` tokens of largest local attention (InfLLM).

    Local attention: probability that a token received from the prompt's queries at most `local` tokens later. Keys
    are taken before RoPE and the query at distance `local`, as if every block stood that far away. Index: keys [batch,
    kv_heads, blocks, head_dim] (before RoPE). Of blocks that are filled while decoding, the mean key. shared: one choice
    for all KV heads, by the sum of their scores.
    """

    block: int = 128
    best: int = 4
    local: int = 4096
    shared: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.best, self.local) < 1 or self.best > self.block:
            raise ValueError(
                f"{type(self).__name__}: needs 1 <= best <= block and local >= 1, got {self.best}, {self.block}"
            )

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots per block."""
        return self.block

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """One key a block."""
        size = (batch, shape.kv_heads, slots // self.block, shape.head_dim)
        return {"keys": ArraySpec(size, shape.dtype, index_axes(1))}

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """The mean of the most attended tokens of every block."""
        mass = observe.column_mass(
            call.q,
            entries.k,
            q_positions=call.q_pos,
            k_positions=entries.pos,
            scale=call.scale,
            window=self.local,
            softcap=call.softcap,
        )
        b, h, n, d = entries.k.shape
        mass = jnp.sum(mass.reshape(b, h, -1, n), axis=2)
        blocks = index["keys"].shape[2]
        k = put(jnp.zeros((b, h, blocks * self.block, d)), entries.slots, plain_keys(entries, call))
        mass = put(jnp.full((b, h, blocks * self.block), -1.0), entries.slots, mass)
        mass = mass.reshape(b, h, blocks, self.block)
        top, at = jax.lax.top_k(mass, self.best)
        k = jnp.take_along_axis(k.reshape(b, h, blocks, self.block, d), at[..., None], axis=3)
        held = (top >= 0)[..., None]
        keys = jnp.sum(jnp.where(held, k, 0), axis=3) / jnp.maximum(jnp.sum(held, axis=3), 1)
        return {**index, "keys": keys.astype(index["keys"].dtype)}

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """New tokens enter the mean of their block."""
        keys = grow_means(index["keys"], plain_keys(entries, call), entries.slots, self.block)
        return {**index, "keys": keys.astype(index["keys"].dtype)}

    def query(self, index: Index, call: Call) -> Array:
        """The query that ranks the blocks, f32 [batch, q_heads, head_dim] before RoPE at its position."""
        return call.q[:, :, -1].astype(jnp.float32)

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Sum over query heads (shared: over all of them) of the query at distance `local` . representative."""
        assert call.inv_freq is not None
        q = self.query(index, call)
        pos = jnp.broadcast_to(jnp.max(call.q_pos, axis=1)[:, None], q.shape[:2])
        q = rope(rope(q, pos, call.inv_freq, inverse=True), jnp.full_like(pos, self.local), call.inv_freq)
        b, _, d = q.shape
        q = q.reshape(b, -1, call.groups, d)
        scores = jnp.einsum("bhgd,bhpd->bhp", q, index["keys"].astype(jnp.float32), precision="highest")
        if self.shared:
            scores = jnp.broadcast_to(jnp.sum(scores, axis=1, keepdims=True), scores.shape)
        return scores, index


@dataclasses.dataclass(frozen=True)
class ProbeBlocks(Representatives):
    """InfLLM's blocks ranked by a probe query, and fewer of them where the ranking is clear (ActQKV).

    probe = sum_i w_i q_i over the last `window` queries, w_i proportional to their activation bias sum_c ((q_ic -
    mean_c) / std_c)^2; of equal queries their mean. cutoff: a layer reads max(1, round(H / log n * blocks)) of its
    blocks, H the entropy of softmax(scores) over n blocks, mean over KV heads: flat layers read all that `read`
    allows. Index: also ring f32 [batch, q_heads, window, head_dim] (last queries, unrotated; newest last) and asked int32 [batch].
    """

    window: int = 16
    cutoff: bool = True
    shared: bool = False

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        ring = (batch, shape.q_heads, self.window, shape.head_dim)
        return {
            **super().specs(batch, slots, shape),
            "ring": ArraySpec(ring, "float32", ("batch", "q_heads", None, None)),
            "asked": ArraySpec((batch,), "int32", ("batch",)),
        }

    def _push(self, index: Index, call: Call) -> Index:
        """The newest queries behind those that are there."""
        assert call.inv_freq is not None
        b, h, t, d = call.q.shape
        q = rope(call.q, jnp.broadcast_to(call.q_pos[:, None], (b, h, t)), call.inv_freq, inverse=True)
        every = jnp.concatenate([index["ring"], q], axis=2)
        old = jnp.arange(self.window) >= self.window - index["asked"][:, None]
        order = jnp.concatenate([jnp.where(old, -1, -2), jnp.where(call.q_pos >= 0, call.q_pos, -2)], axis=1)
        at = jnp.argsort(order, axis=1, stable=True)[:, -self.window :]
        held = jnp.minimum(index["asked"] + jnp.sum(call.q_pos >= 0, axis=1), self.window)
        ring = jnp.take_along_axis(every, at[:, None, :, None], axis=2)
        return {**index, "ring": ring, "asked": held.astype(jnp.int32)}

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """The blocks, and the prompt's last queries."""
        return self._push(super().build(index, entries, call, previous), call)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """New tokens enter their block, their queries the window."""
        return self._push(super().append(index, entries, call), call)

    def query(self, index: Index, call: Call) -> Array:
        """The probe, at the position of the newest query."""
        assert call.inv_freq is not None
        probe = probe_query(index["ring"], index["asked"])
        pos = jnp.broadcast_to(jnp.max(call.q_pos, axis=1)[:, None], probe.shape[:2])
        return rope(probe, pos, call.inv_freq)

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Scores by the probe, NEVER beyond the layer's share."""
        scores, index = super().score(index, call)
        if not self.cutoff or self.read == 1.0:
            return scores, index
        count = -(-call.fill // self.block)
        live = jnp.arange(scores.shape[2]) < count[..., None]
        p = jax.nn.softmax(jnp.where(live, scores * call.scale, -jnp.inf), axis=-1)
        entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0), axis=-1)
        density = jnp.mean(entropy / jnp.maximum(jnp.log(jnp.maximum(count, 2)), 1e-6), axis=1)
        tables = jnp.asarray(
            [-(-self.entries(n * self.block) // self.block) for n in range(scores.shape[2] + 1)]
        )
        most = jnp.maximum(1, jnp.round(density[:, None] * tables[count])).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(jnp.where(live, -scores, jnp.inf), axis=-1), axis=-1)
        return jnp.where(rank < most[..., None], scores, NEVER), index


def probe_query(ring: Array, held: Array) -> Array:
    """f32 [batch, q_heads, head_dim]: the last held int32 [batch] queries of ring [batch, q_heads, window, head_dim], weighted
    by their activation bias."""
    n = ring.shape[2]
    there = (jnp.arange(n) >= n - held[:, None])[:, None, :, None]
    count = jnp.maximum(held, 1)[:, None, None, None]
    mean = jnp.sum(jnp.where(there, ring, 0), axis=2, keepdims=True) / count
    off = jnp.where(there, ring - mean, 0)
    spread = jnp.sum(off**2, axis=2, keepdims=True) / count
    bias = jnp.sum(jnp.where(spread > 1e-12, off**2 / jnp.maximum(spread, 1e-12), 0), axis=-1, keepdims=True)
    total = jnp.sum(bias, axis=2, keepdims=True)
    weight = jnp.where(total > 0, bias / jnp.maximum(total, 1e-30), there / count)
    return jnp.sum(weight * ring, axis=2)


def plain_keys(entries: Entries, call: Call) -> Array:
    """Keys before RoPE, f32 [batch, kv_heads, n, head_dim]."""
    assert call.inv_freq is not None
    return rope(entries.k, entries.pos, call.inv_freq, inverse=True)


def put(array: Array, slots: Array, values: Array) -> Array:
    """`array` [batch, kv_heads, slots, ...] with `values` [batch, kv_heads, n, ...] at slots int32 (-1 = nowhere)."""
    return scatter_pages(array, slots, values, "set")
