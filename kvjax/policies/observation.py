"""What a policy may look at: the queries, keys, values and attention of one call on one layer.

Everything is computed lazily under `jit`: a scorer that does not use a field costs nothing, because the
compiler removes what is not read. A caller outside this library fills only the fields that a policy's `needs`
names; a missing one raises a ValueError that says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import observe
from pallas_kernels.platform import target_platform

Array = jax.Array

NEG = -1e30  # below every score; finite so that arithmetic on it stays finite


@struct.dataclass
class Observation:
    """One call (`tokens` new tokens a row) seen from one layer. Shapes in comments; `slots` counts all entries.

    Entries are those stored before this call, then this call's own; `pos` says which are empty (-1).
    """

    q: Array | None  # [batch, q_heads, tokens, head_dim], after RoPE
    q_pos: Array | None  # int32 [batch, tokens], -1 = padding
    k: Array  # [batch, kv_heads, slots, head_dim], after RoPE
    v: Array  # [batch, kv_heads, slots, head_dim]
    pos: Array  # int32 [batch, kv_heads, slots], -1 = empty
    length: Array  # int32 [batch], position after the newest token; tokens seen, unless keys were re-rotated
    lse: Array | None = None  # f32 [batch, q_heads, tokens], log-sum-exp of this call's attention
    mass: Array | None = None  # f32 [batch, q_heads, slots], probability summed over this call's queries
    hidden: Array | None = None  # [batch, tokens, embed]
    wo: Array | None = None  # [q_heads, head_dim, embed]
    inv_freq: Array | None = None  # f32 [rotary_dim // 2]
    keep: Array | None = None  # int32 [batch], mean entries per head that the budget leaves this layer
    steps: Array | None = None  # int32 [batch], tokens since the prompt was compressed, this call included
    token_ids: Array | None = None  # int32 [batch, tokens]
    span: tuple[Array, Array] | None = (
        None  # int32 [batch] twice: positions a probe is about, first and past last
    )
    const: dict[str, Array] = struct.field(default_factory=dict)  # this layer's calibration arrays
    state: dict[str, Array] = struct.field(default_factory=dict)  # f32 [batch, kv_heads] each: the reducer's
    layer: int = struct.field(pytree_node=False, default=0)
    layers: int = struct.field(pytree_node=False, default=1)
    scale: float = struct.field(pytree_node=False, default=1.0)
    window: int | None = struct.field(pytree_node=False, default=None)
    softcap: float | None = struct.field(pytree_node=False, default=None)
    prefilling: bool = struct.field(pytree_node=False, default=True)
    # The entries are this call's tokens in the order of its queries, and `lse` is over exactly them.
    aligned: bool = struct.field(pytree_node=False, default=False)

    def need(self, name: str) -> Array:
        """The field `name`; ValueError when the caller did not supply it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this policy observes {name!r}, which the caller did not supply")
        return value

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.k.shape[1]

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.need("q").shape[1] // self.k.shape[1]

    @property
    def valid(self) -> Array:
        """bool [batch, kv_heads, slots]: the slot holds an entry."""
        return self.pos >= 0

    @property
    def tokens(self) -> Array:
        """int32 [batch]: this call's tokens, padding excluded."""
        return jnp.sum(self.need("q_pos") >= 0, axis=1, dtype=jnp.int32)

    def group(self, x: Array, reduce: Callable[..., Array] = jnp.mean) -> Array:
        """[batch, q_heads, ...] -> [batch, kv_heads, ...] by `reduce` over the query heads of a KV head."""
        b, h = x.shape[:2]
        return reduce(x.reshape(b, self.kv_heads, h // self.kv_heads, *x.shape[2:]), axis=2)

    def last_queries(self, count: int) -> tuple[Array, Array]:
        """The last `count` valid queries of each row: q [batch, q_heads, count, head_dim], positions [batch, count].

        A row with fewer than `count` tokens is padded in front with position -1.
        """
        q = self.need("q")
        index, ok = self._last(count)
        rows = jax.vmap(lambda a, i: a[:, i])(q, index)
        return rows, jnp.where(ok, jnp.take_along_axis(self.need("q_pos"), index, axis=1), -1)

    def _last(self, count: int) -> tuple[Array, Array]:
        """(index of each row's last `count` tokens int32 [batch, count], whether there is such a token)."""
        first = jnp.argmax(self.need("q_pos") >= 0, axis=1)
        index = (first + self.tokens)[:, None] - count + jnp.arange(count)
        ok = (index >= first[:, None]) & (self.tokens > 0)[:, None]
        return jnp.where(ok, index, 0), ok

    def window_probs(self, count: int) -> Array:
        """f32 [batch, q_heads, count, slots]: attention of the last `count` queries over all visible entries.

        The softmax runs over every visible entry before anything is cut away; a padded query's row is 0.
        """
        return self.probs_of(*self.last_queries(count))

    def window_mass(self, count: int) -> Array:
        """f32 [batch, q_heads, slots]: `window_probs` summed over the queries, in O(slots) memory."""
        q, q_pos = self.last_queries(count)
        lse = None
        if self.aligned and self.lse is not None:
            index, ok = self._last(count)
            lse = jnp.where(ok[:, None], jnp.take_along_axis(self.lse, index[:, None], axis=2), -jnp.inf)
        return observe.window_mass(
            q,
            self.k,
            q_positions=q_pos,
            k_positions=self.pos,
            lse=lse,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )

    def probs_of(self, q: Array, q_pos: Array) -> Array:
        """`window_probs` of queries q [batch, q_heads, count, head_dim] at positions int32 [batch, count]."""
        return observe.window_probs(
            q,
            self.k,
            q_positions=q_pos,
            k_positions=self.pos,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )

    def column_mass(self) -> Array:
        """f32 [batch, q_heads, slots]: probability that each entry received, summed over this call's queries."""
        if self.mass is not None:
            return self.mass
        return observe.column_mass(
            self.need("q"),
            self.k,
            q_positions=self.need("q_pos"),
            k_positions=self.pos,
            lse=self.lse,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            # The kernels need it; XLA on a CPU would save half the products and hold a tenth more memory.
            causal_aligned=self.aligned and target_platform() != "cpu",
        )

    def column_reduce(self, fn: Callable[[Array, Array], Any]) -> Any:
        """Sum over query blocks of `fn(probs f32 [batch, q_heads, block, slots], q_pos [batch, block])`.

        For statistics of attention columns other than their sum, in O(slots) memory.
        """
        return observe.column_reduce(
            fn,
            self.need("q"),
            self.k,
            q_positions=self.need("q_pos"),
            k_positions=self.pos,
            lse=self.lse,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )

    def rotate(self, x: Array, positions: Array) -> Array:
        """Apply RoPE at `positions` (int32, broadcastable to x[..., 0]); negative positions undo it.

        Halves convention: channel i pairs with channel i + rotary_dim/2; channels past rotary_dim stay.
        """
        inv_freq = self.need("inv_freq")
        angle = positions[..., None].astype(jnp.float32) * inv_freq
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        half = inv_freq.shape[0]
        a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)

    def unrotated_keys(self) -> Array:
        """Keys before RoPE, [batch, kv_heads, slots, head_dim]: the rotation undone at each entry's position."""
        return self.rotate(self.k, -jnp.maximum(self.pos, 0))

    def unrotated_queries(self) -> Array:
        """Queries before RoPE, [batch, q_heads, tokens, head_dim]."""
        return self.rotate(self.need("q"), -jnp.maximum(self.need("q_pos"), 0)[:, None])
