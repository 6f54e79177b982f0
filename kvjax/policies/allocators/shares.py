"""Dividing a whole number of entries exactly: by weights, between a floor and a ceiling each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.policies.base import PROTECTED, Array

_ROUNDS = 12  # a round ends when some shares hit their ceiling; what is then left goes out one by one


def spread(weights: Array, total: Array, low: Array, high: Array) -> Array:
    """Whole shares with sum min(total, sum high): low + the rest in proportion to weights, none above high.

    weights f32 [batch, n], not negative (all zero: equal). total int32 [batch]. low, high int32 [batch, n]. If
    the floors alone exceed the total they are cut in order, so that the total is never exceeded. What rounding
    leaves over goes to the largest fractions.
    """
    low = jnp.minimum(low, high)
    before = jnp.cumsum(low, axis=1) - low
    share = jnp.clip(total[:, None] - before, 0, low)
    weights = jnp.where(jnp.isfinite(weights), jnp.maximum(weights, 0.0), 0.0).astype(jnp.float32)
    some = jnp.sum(weights, axis=1, keepdims=True) > 0
    weights = jnp.where(some, weights, 1.0)
    # A scale that does not depend on the weights' magnitude, and a floor: after the positive weights are full,
    # the others still take what is left.
    weights = weights / jnp.maximum(jnp.max(weights, axis=1, keepdims=True), 1e-30) + 1e-12

    def fill(_: int, share: Array) -> Array:
        open_ = jnp.where(share < high, weights, 0.0)
        rest = total - jnp.sum(share, axis=1)
        part = open_ / jnp.maximum(jnp.sum(open_, axis=1, keepdims=True), 1e-30)
        add = jnp.minimum(jnp.floor(part * rest[:, None]).astype(jnp.int32), high - share)
        # float32 may round a part up: never hand out more than is left.
        return share + jnp.clip(rest[:, None] - (jnp.cumsum(add, axis=1) - add), 0, add)

    def last(_: int, share: Array) -> Array:
        rest = total - jnp.sum(share, axis=1)
        exact = (
            low + weights / jnp.sum(weights, axis=1, keepdims=True) * (total - jnp.sum(low, axis=1))[:, None]
        )
        order = jnp.argsort(jnp.where(share < high, share - exact, jnp.inf), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        return share + ((rank < rest[:, None]) & (share < high))

    share = jax.lax.fori_loop(0, _ROUNDS, fill, share)
    return jax.lax.fori_loop(0, 2, last, share)


def protected(scores: Array) -> Array:
    """bool [batch, kv_heads, slots]: sinks and recent entries, from protected scores."""
    return scores >= PROTECTED


def count(mask: Array) -> Array:
    """int32 [batch, kv_heads] set entries of a mask [batch, kv_heads, slots]."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def split_layers(
    weights: list[Array],
    scores,
    valid,
    keep: Array,
    low: list[Array] | None = None,
    ceiling: Array | None = None,
) -> list[Array]:
    """`divide_layers` of entries with protected scores and `valid` masks, [batch, kv_heads, slots] a layer."""
    fixed, held = [count(protected(s)) for s in scores], [count(v) for v in valid]
    return divide_layers(weights, fixed, held, keep, low, ceiling)


def divide_layers(
    weights: list[Array],
    fixed: list[Array],
    held: list[Array],
    keep: Array,
    low: list[Array] | None = None,
    ceiling: Array | None = None,
    layers: int | None = None,
) -> list[Array]:
    """Counts int32 [batch, kv_heads] of every layer, all heads of a layer alike, from weights [batch] a layer.

    The protected entries come first; the rest of `keep` per layer is spread by weight. fixed, held: protected and all
    entries, int32 [batch, kv_heads] a layer. low: least entries of each layer besides the protected ones, int32 [batch].
    ceiling: most entries of a layer, int32 [batch]; what it cuts goes to the others. layers: how many layers the budget is
    for, if these are only some of them.
    """
    least = jnp.stack([jnp.minimum(jnp.max(f, axis=1), keep) for f in fixed], axis=1)
    high = jnp.stack([jnp.max(h, axis=1) for h in held], axis=1)
    if ceiling is not None:
        high = jnp.minimum(high, ceiling[:, None])
    high = jnp.maximum(high - least, 0)
    total = (len(held) if layers is None else layers) * keep - jnp.sum(least, axis=1)
    floor = jnp.zeros_like(high) if low is None else jnp.stack(low, axis=1)
    share = spread(jnp.stack(weights, axis=1), total, floor, high) + least
    return [jnp.minimum(share[:, i : i + 1], h) for i, h in enumerate(held)]


def split_heads(
    weights: list[Array], scores, valid, keep: Array, low: list[Array] | None = None
) -> list[Array]:
    """Counts int32 [batch, kv_heads] of every layer from weights f32 [batch, kv_heads]: all heads compete.

    As `split_layers`, with a share for each (layer, head). low: int32 [batch, kv_heads] a layer.
    """
    fixed = [jnp.minimum(count(protected(s)), keep[:, None]) for s in scores]
    high = [count(v) for v in valid]
    heads = valid[0].shape[1]
    floor = fixed if low is None else [f + x for f, x in zip(fixed, low)]
    join = lambda xs: jnp.concatenate(xs, axis=1)  # noqa: E731
    share = spread(join(weights), len(scores) * heads * keep, join(floor), join(high))
    return [share[:, i * heads : (i + 1) * heads] for i in range(len(scores))]
