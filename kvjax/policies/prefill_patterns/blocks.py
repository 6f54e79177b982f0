"""A call's queries and slots in blocks: which block may see which, and what the last queries attend to.

A mask here is bool [batch or 1, q_heads or 1, q_blocks, k_blocks]: the key blocks that a query block reads. Positions
decide, not indices, so that the same code serves a whole prompt and a chunk after stored entries of any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvjax.policies.observation import Observation
from pallas_kernels.prefill_attention.reference import pad_axis

Array = jax.Array
_LAST = jnp.iinfo(jnp.int32).max
_INF_BITS = 0x7F800000


class Blocks:
    """The observation `obs` cut into blocks of `block` queries and `block` slots; `sample` last queries are looked at.

    aligned: queries and slots are the same tokens, each row's first token in slot 0.
    """

    def __init__(self, obs: Observation, block: int, sample: int, aligned: bool) -> None:
        self.obs, self.block, self.aligned = obs, block, aligned
        self.q_heads, self.tokens = obs.need("q").shape[1:3]
        self.slots = obs.k.shape[2]
        self.sample = min(sample, self.tokens)
        self.q_blocks, self.k_blocks = -(-self.tokens // block), -(-self.slots // block)

    def per_q_head(self, x: Array) -> Array:
        """[batch, kv_heads, ...] -> [batch, q_heads, ...]."""
        return jnp.repeat(x, self.obs.groups, axis=1)

    @functools.cached_property
    def q_range(self) -> tuple[Array, Array]:
        """First and last position of every query block, int32 [batch, 1, q_blocks, 1]; (large, -1) if it has none."""
        pos = pad_axis(self.obs.need("q_pos"), 1, self.q_blocks * self.block, -1)
        return tuple(x[:, None, :, None] for x in _range(pos, self.block))  # type: ignore[return-value]

    @functools.cached_property
    def k_range(self) -> tuple[Array, Array]:
        """First and last position of every key block, int32 [batch, q_heads, 1, k_blocks]; (large, -1) if empty."""
        pos = pad_axis(self.obs.pos, 2, self.k_blocks * self.block, -1)
        return tuple(self.per_q_head(x)[:, :, None] for x in _range(pos, self.block))  # type: ignore[return-value]

    @functools.cached_property
    def visible(self) -> Array:
        """The mask of dense attention: some query of the block sees some slot of the key block."""
        return self.k_range[0] <= self.q_range[1]

    def near(self, window: int) -> Array:
        """Mask of the key blocks with one of the `window` positions up to some query; 1 gives the diagonal."""
        return (self.k_range[1] > self.q_range[0] - window) & self.visible

    def sinks(self, count: int) -> Array:
        """Mask of the key blocks with one of the first `count` positions."""
        return (self.k_range[0] < count) & self.visible

    def last_rows(self, count: int) -> Array:
        """Dense mask of the query blocks that hold one of a row's last `count` tokens."""
        newest = jnp.max(self.q_range[1], axis=2, keepdims=True)
        return (self.q_range[1] > newest - count) & self.visible

    @functools.cached_property
    def probs(self) -> Array:
        """f32 [batch, q_heads, sample, slots]: attention of the last queries; rows of padding are 0."""
        return self.obs.window_probs(self.sample)

    @functools.cached_property
    def probs_by_block(self) -> Array:
        """f32 [batch, q_heads, sample, k_blocks]: `probs` summed over every key block."""
        return self.sum_blocks(self.probs)

    def sum_blocks(self, x: Array) -> Array:
        """[..., slots] -> [..., k_blocks], summed."""
        x = pad_axis(x, x.ndim - 1, self.k_blocks * self.block)
        return x.reshape(*x.shape[:-1], self.k_blocks, self.block).sum(-1)

    def spread_queries(self) -> tuple[Array, Array]:
        """`sample` queries at even distances, the last one among them: q [batch, q_heads, sample, head_dim] and their
        places int32 [batch, sample] in the call. A row with fewer tokens has some of them twice."""
        q, q_pos = self.obs.need("q"), self.obs.need("q_pos")
        end = (jnp.arange(self.sample) + 1) * self.obs.tokens[:, None] // self.sample
        index = jnp.argmax(q_pos >= 0, axis=1)[:, None] + jnp.maximum(end - 1, 0)
        return jax.vmap(lambda a, i: a[:, i])(q, index), index

    def recall(self, keep: Array, spread: bool = False) -> Array:
        """f32 [batch, q_heads]: the share of the last queries' attention that the mask `keep` covers.

        spread: of `spread_queries` instead, which also speak for the rows before.
        """
        q_pos = self.obs.need("q_pos")
        if spread:
            q, place = self.spread_queries()
            probs = self.obs.probs_of(q, jnp.take_along_axis(q_pos, place, axis=1))
            mass, row = self.sum_blocks(probs), place // self.block
        else:
            end = jnp.argmax(q_pos >= 0, axis=1) + self.obs.tokens
            mass = self.probs_by_block
            row = jnp.maximum(end[:, None] - self.sample + jnp.arange(self.sample), 0) // self.block
        shape = (self.obs.pos.shape[0], self.q_heads, self.q_blocks, self.k_blocks)
        rows = jax.vmap(lambda a, i: a[:, i])(jnp.broadcast_to(keep, shape), row)
        covered, total = jnp.sum(jnp.where(rows, mass, 0.0), axis=(2, 3)), jnp.sum(mass, axis=(2, 3))
        return jnp.where(total > 0, covered / jnp.where(total > 0, total, 1.0), 1.0)

    @functools.cached_property
    def distance_mass(self) -> Array:
        """f32 [batch, q_heads, slots + 1]: `probs` summed along diagonals, by distance (query minus key position).

        Distances beyond the last entry, which only stored entries with gaps between them have, count there.
        """
        n, s = self.probs.shape[2:]
        if self.aligned:
            # Row r is query tokens - n + r. Shifted by r, all rows have distance tokens - column.
            skew = jnp.pad(self.probs, ((0, 0), (0, 0), (0, 0), (n, 0)))
            skew = skew.reshape(*skew.shape[:2], n * (s + n))
            skew = jnp.pad(skew, ((0, 0), (0, 0), (0, n)))
            by_column = skew.reshape(*skew.shape[:2], n, s + n + 1)[..., : s + n].sum(2)
            column = self.obs.tokens[:, None, None] - jnp.arange(s + 1)
            got = jnp.take_along_axis(by_column, jnp.clip(column, 0, s + n - 1), axis=2)
            return jnp.where((column >= 0) & (column < s + n), got, 0.0)
        _, q_pos = self.obs.last_queries(self.sample)
        distance = q_pos[:, None, :, None] - self.per_q_head(self.obs.pos)[:, :, None]
        place = jnp.clip(distance, 0, s).reshape(*self.probs.shape[:2], -1)
        add = jax.vmap(jax.vmap(lambda p, x: jnp.zeros((s + 1,)).at[p].add(x)))
        return add(place, self.probs.reshape(place.shape))

    def band(self, chosen: Array) -> Array:
        """Mask of the blocks that hold a pair at a distance in `chosen` bool [batch, q_heads, distances].

        The last distance stands for all beyond.
        """
        n = chosen.shape[-1]
        upto = jnp.pad(jnp.cumsum(chosen, axis=-1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
        low = jnp.clip(self.q_range[0] - self.k_range[1], 0, n - 1)  # the nearest pair of two blocks
        high = jnp.clip(self.q_range[1] - self.k_range[0], -1, n - 1)
        shape = jnp.broadcast_shapes(low.shape, high.shape)

        def count(at: Array) -> Array:
            flat = jnp.broadcast_to(at, shape).reshape(*shape[:2], -1)
            return jnp.take_along_axis(upto, flat, axis=2).reshape(shape)

        return (count(high + 1) > count(jnp.minimum(low, high + 1))) & self.visible


def _range(pos: Array, block: int) -> tuple[Array, Array]:
    pos = pos.reshape(*pos.shape[:-1], -1, block)
    return jnp.where(pos < 0, _LAST, pos).min(-1), pos.max(-1)


def _largest(x: Array, enough: Callable[[Array], Array], axes: int) -> Array:
    """Mask of the largest entries of x >= 0, as few as make `enough` true; equal entries come together.

    enough: bool [...] from a mask of x's shape; true for the full mask. Found by bisection over the bits of the
    smallest entry taken: exact, and 31 passes over x cost less than sorting it.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    lead = x.shape[: x.ndim - axes]
    low, high = jnp.zeros(lead, jnp.int32), jnp.full(lead, _INF_BITS + 1, jnp.int32)
    tail = (...,) + (None,) * axes

    def halve(_: int, limits: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = limits
        middle = low + (high - low) // 2
        ok = enough(bits >= middle[tail])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return bits >= low[tail]


def largest(x: Array, count: Array | int) -> Array:
    """Mask of the `count` largest entries of x >= 0 along the last axis; ties at the edge are all taken."""
    count = jnp.asarray(count)
    return _largest(x, lambda keep: keep.sum(-1, dtype=jnp.int32) >= count, 1) & (count > 0)[..., None]


def covering(x: Array, target: Array, axes: int = 1) -> Array:
    """Mask of the fewest entries of x >= 0 over the last `axes` axes whose sum is at least `target` [...]."""
    over = tuple(range(x.ndim - axes, x.ndim))
    return _largest(x, lambda keep: jnp.sum(jnp.where(keep, x, 0.0), axis=over) >= target, axes)
