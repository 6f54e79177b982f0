"""What merging reducers share: survivors and losers, the nearest survivor of each loser, weighted sums into them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.policies.base import Array
from kvjax.policies.observation import Observation

_BLOCK = 256  # losers compared with all survivors at a time: O(block * places) memory, never [slots, slots]


def gather(x: Array, index: Array) -> Array:
    """x [batch, kv_heads, slots, ...] at index [batch, kv_heads, places]; places outside the slots read any slot."""
    safe = jnp.minimum(index, x.shape[2] - 1)
    return jax.vmap(jax.vmap(lambda a, i: a[i]))(x, safe)


def losers(obs: Observation, index: Array) -> Array:
    """bool [batch, kv_heads, slots]: valid entries that `index` does not name."""
    slots = obs.pos.shape[2]
    kept = jax.vmap(jax.vmap(lambda i: jnp.zeros(slots, bool).at[i].set(True, mode="drop")))(index)
    return obs.valid & ~kept


def unit(x: Array) -> Array:
    """f32 vectors of length 1; zero vectors stay."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def nearest(keys: Array, centres: Array, usable: Array) -> tuple[Array, Array]:
    """(cosine f32, place int32) [batch, kv_heads, slots]: the most similar usable centre of every key.

    keys [batch, kv_heads, slots, head_dim]; centres [batch, kv_heads, places, head_dim]; usable bool [.., places].
    Ties go to the earlier place. Without a usable centre the cosine is -inf.
    """
    return _largest_product(unit(keys), unit(centres), 0.0, usable)


def closest(keys: Array, centres: Array, usable: Array) -> tuple[Array, Array]:
    """(squared Euclidean distance f32, place int32), as `nearest`; without a usable centre the distance is inf."""
    half = 0.5 * jnp.sum(centres * centres, axis=-1)  # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2)
    best, place = _largest_product(keys, centres, half[:, :, None], usable)
    return jnp.maximum(jnp.sum(keys * keys, axis=-1) - 2 * best, 0.0), place


def _largest_product(keys: Array, centres: Array, minus: Array | float, usable: Array) -> tuple[Array, Array]:
    """max and argmax over usable centres of key . centre - minus [batch, kv_heads, 1, places], keys in blocks."""
    b, h, s, d = keys.shape
    block = min(_BLOCK, s)
    parts = -(-s // block)
    padded = jnp.pad(keys, ((0, 0), (0, 0), (0, parts * block - s), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, h, parts, block, d), 2, 0)

    def one(x: Array) -> tuple[Array, Array]:
        found = jnp.einsum("bhsd,bhpd->bhsp", x, centres, precision="highest") - minus
        found = jnp.where(usable[:, :, None], found, -jnp.inf)
        return jnp.max(found, axis=-1), jnp.argmax(found, axis=-1).astype(jnp.int32)

    best, place = jax.lax.map(one, blocks)
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(b, h, parts * block)[:, :, :s]  # noqa: E731
    return join(best), join(place)


def fold(x: Array, weight: Array, place: Array, places: int) -> tuple[Array, Array]:
    """(sum of weight * x f32 [batch, kv_heads, places, head_dim], sum of weight [.., places]) by target place.

    x [batch, kv_heads, slots, head_dim]; weight f32 and place int32 [batch, kv_heads, slots]; weight 0 adds nothing.
    """

    def one(x: Array, w: Array, p: Array) -> tuple[Array, Array]:
        # A weight of 0 must not let an empty slot's NaN through.
        x = jnp.where((w > 0)[:, None], w[:, None] * x.astype(jnp.float32), 0.0)
        total = jnp.zeros((places, x.shape[1]), jnp.float32).at[p].add(x, mode="drop")
        return total, jnp.zeros(places, jnp.float32).at[p].add(w, mode="drop")

    return jax.vmap(jax.vmap(one))(x, weight, place)


def blend(mine: Array, added: Array, weight: Array, own: Array | float = 1.0) -> Array:
    """(own * mine + added) / (own + weight) where weight > 0, else mine untouched, in mine's dtype."""
    own = jnp.broadcast_to(jnp.asarray(own, jnp.float32), weight.shape)
    mixed = (own[..., None] * mine.astype(jnp.float32) + added) / jnp.maximum(own + weight, 1e-30)[..., None]
    return jnp.where((weight > 0)[..., None], mixed.astype(mine.dtype), mine)
