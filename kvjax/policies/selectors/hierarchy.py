"""Top-k from coarse to fine over pooled keys, the coarse levels standing in for what is not read (LLSA)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec, nbytes
from kvjax.policies.selectors.base import NEVER, Call, Entries, Index, Selector, index_axes, over_group
from kvjax.policies.selectors.clusters import summary_attention
from kvjax.policies.selectors.grouping import grow_means, heads_map
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PooledLevels(Selector):
    """Blocks of `block` slots, searched below the best blocks of blocks only, by q . mean key (LLSA).

    Two levels: means of `block` slots, and of `block`**2. The best coarse blocks, as many as fine ones are read, are
    opened; the best fine blocks inside them are read. What is not read is attended through its means: a fine block of an
    opened one as one entry of weight n, a coarse block that stays closed as one of weight n, n the entries it holds that are
    not read. The published method counts what is read in the coarse levels too, which the model is trained for; `overlap`
    does that. Index, per level: keys1, values1 [batch, kv_heads, blocks, head_dim], keys2, values2 likewise.
    """

    block: int = 16
    overlap: bool = False
    over: str = "softmax_max"

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots per fine block."""
        return self.block

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        out = {}
        for level in (1, 2):
            size = (batch, shape.kv_heads, -(-slots // self.block**level), shape.head_dim)
            spec = ArraySpec(size, shape.dtype, index_axes(1))
            out |= {f"keys{level}": spec, f"values{level}": spec}
        return out

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """New entries enter the means of their blocks."""
        out = {}
        for level in (1, 2):
            for name, x in (("keys", entries.k), ("values", entries.v)):
                old = index[f"{name}{level}"]
                mean = grow_means(old, x, entries.slots, self.block**level)
                out[f"{name}{level}"] = mean.astype(old.dtype)
        return out

    def _opened(self, index: Index, call: Call) -> tuple[Array, Array]:
        """(numbers int32 [batch, kv_heads, n] of the coarse blocks that are opened, -1 = unused; logits of all coarse blocks f32
        [batch, kv_heads, groups, coarse])."""
        size, coarse = self.block**2, index["keys2"].shape[2]
        logits = _logits(call, index["keys2"])
        live = jnp.arange(coarse) * size < call.fill[..., None]
        score = jnp.where(live, over_group(logits, self.over, live[:, :, None]), -jnp.inf)
        wanted = [
            -(-self.entries(min(n * size, index["keys1"].shape[2] * self.block)) // self.block)
            for n in range(coarse + 1)
        ]
        width = min(coarse, max(wanted))
        top, at = jax.lax.top_k(score, width)
        count = jnp.asarray(wanted)[-(-call.fill // size)][..., None]
        return jnp.where((jnp.arange(width) < count) & (top > -jnp.inf), at, -1), logits

    def _children(self, opened: Array, index: Index) -> Array:
        """Numbers int32 [batch, kv_heads, n * block] of the fine blocks in opened coarse ones, -1 = none."""
        n = jnp.arange(self.block, dtype=jnp.int32)
        child = jnp.where(opened[..., None] < 0, -1, opened[..., None] * self.block + n)
        child = child.reshape(*opened.shape[:2], -1)
        return jnp.where(child < index["keys1"].shape[2], child, -1)

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Of the fine blocks in opened ones q . mean key; NEVER elsewhere."""
        opened, _ = self._opened(index, call)
        child = self._children(opened, index)
        keys = _take(index["keys1"], child)
        live = (child >= 0) & (child * self.block < call.fill[..., None])
        found = over_group(_logits(call, keys), self.over, live[:, :, None])
        fine = index["keys1"].shape[2]
        at = jnp.where(live, child, fine)
        return heads_map(lambda n, x: jnp.full((fine,), NEVER).at[n].set(x, mode="drop"))(at, found), index

    def estimate(self, index: Index, call: Call, chosen: Array) -> tuple[Array, Array]:
        """Closed coarse blocks, and the fine blocks of opened ones that are not read."""
        fine, coarse = chosen.shape[2], index["keys2"].shape[2]
        opened, logits2 = self._opened(index, call)
        held = jnp.clip(call.fill[..., None] - jnp.arange(fine) * self.block, 0, self.block)
        left = held if self.overlap else jnp.where(chosen, 0, held)
        pad = coarse * self.block - fine
        left2 = jnp.sum(
            jnp.pad(left, ((0, 0), (0, 0), (0, pad))).reshape(*left.shape[:2], coarse, -1), axis=-1
        )
        at = jnp.where(opened < 0, coarse, opened)
        is_open = heads_map(lambda n: jnp.zeros((coarse,), bool).at[n].set(True, mode="drop"))(at)
        left2 = left2 if self.overlap else jnp.where(is_open, 0, left2)
        child = self._children(opened, index)
        child = jnp.where(child < fine, child, -1)
        left1 = jnp.where(child < 0, 0, jnp.take_along_axis(left, jnp.maximum(child, 0), axis=2))
        logits = jnp.concatenate([_logits(call, _take(index["keys1"], child)), logits2], axis=-1)
        weight = jnp.concatenate([left1, left2], axis=-1)[:, :, None]
        logits = jnp.where(weight > 0, logits + jnp.log(jnp.maximum(weight, 1)), -jnp.inf)
        values = jnp.concatenate(
            [_take(index["values1"], child), index["values2"].astype(jnp.float32)], axis=2
        )
        return summary_attention(logits, values)

    def scanned(self, specs: dict[str, ArraySpec], slots: int, batch: int, shape: ModelShape) -> float:
        """The coarse level, and what lies below the opened blocks."""
        fine = -(-slots // self.block)
        opened = min(1.0, -(-self.entries(slots) // self.block) * self.block / fine)
        share = {"1": opened, "2": 1.0}
        return sum(nbytes({n: s}) * share[n[-1]] for n, s in specs.items())


def _logits(call: Call, keys: Array) -> Array:
    """f32 [batch, kv_heads, groups, n]."""
    q, k = call.grouped, keys.astype(jnp.float32)
    logits = jnp.einsum("bhgd,bhnd->bhgn", q, k, precision="highest") * call.scale
    return logits if call.softcap is None else call.softcap * jnp.tanh(logits / call.softcap)


def _take(x: Array, at: Array) -> Array:
    """Rows f32 [batch, kv_heads, n, head_dim] of x at int32 [batch, kv_heads, n]."""
    return jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=2).astype(jnp.float32)
