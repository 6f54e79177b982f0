"""Groups of entries: k-means per KV head, their means, and scores of slots from scores of their group."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import ALWAYS, index_axes
from kvjax.types import ModelShape

Array = jax.Array
_BLOCK = 1024  # entries whose distances to all centroids are held at a time


def heads_map(fn):  # type: ignore[no-untyped-def]
    """`fn` of one head's arrays, mapped over the leading batch and kv_heads axes of all arguments."""
    return jax.vmap(jax.vmap(fn))


def unit_length(x: Array) -> Array:
    """x [..., dim] over its length, in float32; 0 stays 0."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def nearest(x: Array, centroids: Array, live: Array, *, cosine: bool) -> Array:
    """int32 [n]: of each x [n, dim] the live centroid [groups, dim] of largest dot product, or least distance."""
    shift = 0.0 if cosine else 0.5 * jnp.sum(centroids**2, axis=-1)
    shift = jnp.where(live, shift, jnp.inf)
    blocks = -(-x.shape[0] // _BLOCK)
    padded = jnp.pad(x, ((0, blocks * _BLOCK - x.shape[0]), (0, 0))) if blocks > 1 else x

    def best(part: Array) -> Array:
        return jnp.argmax(jnp.matmul(part, centroids.T, precision="highest") - shift, axis=-1)

    found = jax.lax.map(best, padded.reshape(blocks, -1, x.shape[1]))
    return found.reshape(-1)[: x.shape[0]].astype(jnp.int32)


def group_sums(x: Array, labels: Array, groups: int) -> tuple[Array, Array]:
    """(sums f32 [groups, dim], sizes int32 [groups]) of x [n, dim] by label int32 [n]; label -1 counts nowhere."""
    at = jnp.where(labels < 0, groups, labels)
    sums = jnp.zeros((groups, x.shape[1]), jnp.float32).at[at].add(x.astype(jnp.float32), mode="drop")
    return sums, jnp.zeros((groups,), jnp.int32).at[at].add(1, mode="drop")


def means(sums: Array, sizes: Array) -> Array:
    """sums [..., groups, dim] over sizes [..., groups]; of an empty group 0."""
    return sums / jnp.maximum(sizes, 1)[..., None]


@functools.partial(jax.jit, static_argnames=("most", "rounds", "cosine"))
def kmeans(x: Array, valid: Array, groups: Array, *, most: int, rounds: int, cosine: bool = False) -> Array:
    """Labels int32 [batch, kv_heads, n] (-1 where not valid) of `rounds` rounds of Lloyd's algorithm.

    x [batch, kv_heads, n, dim]; groups int32 [batch, kv_heads], at most `most` and at least 1. It starts from evenly
    spaced entries, so that no random numbers are needed. cosine: by direction (x and centroids of unit length).
    """
    x = unit_length(x) if cosine else x.astype(jnp.float32)

    def one(x: Array, valid: Array, groups: Array) -> Array:
        count = jnp.sum(valid, dtype=jnp.int32)
        first = jnp.argsort(~valid, stable=True)
        j, groups = jnp.arange(most, dtype=jnp.int32), jnp.maximum(groups, 1)
        start = (count // groups) * j + (count % groups) * j // groups
        centroids = x[first[jnp.clip(start, 0, x.shape[0] - 1)]]
        live = j < groups

        def label(centroids: Array) -> Array:
            to = unit_length(centroids) if cosine else centroids
            return jnp.where(valid, nearest(x, to, live, cosine=cosine), -1)

        def step(_: int, centroids: Array) -> Array:
            sums, sizes = group_sums(x, label(centroids), most)
            return jnp.where((sizes > 0)[:, None], means(sums, sizes), centroids)

        return label(jax.lax.fori_loop(0, rounds, step, centroids))

    return heads_map(one)(x, valid, groups)


def by_label(scores: Array, labels: Array, missing: float = ALWAYS) -> Array:
    """f32 [batch, kv_heads, slots]: the score [batch, kv_heads, groups] of each slot's group; `missing` without one."""
    found = jnp.take_along_axis(scores, jnp.maximum(labels, 0).astype(jnp.int32), axis=2)
    return jnp.where(labels < 0, missing, found)


def put_labels(labels: Array, slots: Array, new: Array) -> Array:
    """`labels` [batch, kv_heads, slots] with `new` [batch, kv_heads, n] at slots int32 (-1 = nowhere)."""
    at = jnp.where(slots < 0, labels.shape[2], slots)
    return heads_map(lambda a, i, x: a.at[i].set(x.astype(a.dtype), mode="drop"))(labels, at, new)


def label_spec(batch: int, slots: int, shape: ModelShape, groups: int) -> ArraySpec:
    """A group's number for every slot, -1 = none: 2 bytes up to 32,767 groups."""
    dtype = "int16" if groups < 2**15 else "int32"
    return ArraySpec((batch, shape.kv_heads, slots), dtype, index_axes(0), fill=-1)


def grow_means(mean: Array, x: Array, slots: Array, page: int) -> Array:
    """Means [batch, kv_heads, pages, head_dim] of what each page's slots hold, after x [batch, kv_heads, n, head_dim] came to
    slots int32 (-1 = none). Slots fill in order, so that those below the first new one held an entry before."""
    pages = mean.shape[2]
    sums, new = heads_map(lambda x, n: group_sums(x, n, pages))(x, jnp.where(slots < 0, -1, slots // page))
    first = jnp.min(jnp.where(slots < 0, pages * page, slots), axis=-1, keepdims=True)
    old = jnp.clip(first - jnp.arange(pages) * page, 0, page)
    was = mean.astype(jnp.float32)
    return was + (sums - was * new[..., None]) / jnp.maximum(old + new, 1)[..., None]
