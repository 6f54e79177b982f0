"""Shapes of a layer's index: which KV heads a selector serves, its arrays, and the tables of blocks that it fills.

Heads that stream (`kvjax.policies.selectors.head_reads`) have no part in the index: the selector sees a model with the
retrieval heads of the layer only, and a layer in which all heads stream has no index at all.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from kvjax.arrays import ArraySpec, nbytes
from kvjax.types import Array, ModelShape

if TYPE_CHECKING:
    from kvjax.cache.plan import Plan

LEAD = ("batch", "kv_heads")
FRAMEWORK = ("chosen", "reads", "held", "moved")  # and held.FIELD: arrays that are not the selector's


def retrieving(plan: Plan, i: int) -> tuple[int, ...]:
    """KV heads of layer i that the selector chooses for; the others stream."""
    reads = plan.layers[i].policy.head_reads
    return tuple(range(plan.shape.kv_heads)) if reads is None else reads.retrieving(i)


def selector_shape(plan: Plan, i: int) -> ModelShape:
    """The model as layer i's selector sees it: retrieval heads only."""
    shape, heads = plan.shape, len(retrieving(plan, i))
    if heads == shape.kv_heads:
        return shape
    return dataclasses.replace(shape, kv_heads=heads, q_heads=heads * shape.q_heads // shape.kv_heads)


def of_heads(x: Array, heads: tuple[int, ...], kv_heads: int, axis: int = 1) -> Array:
    """x with the KV heads `heads` only; axis `axis` counts KV heads, or query heads grouped by KV head."""
    if len(heads) == kv_heads:
        return x
    group = x.shape[axis] // kv_heads
    at = np.concatenate([np.arange(h * group, (h + 1) * group) for h in heads]) if heads else np.zeros(0, int)
    return jnp.take(x, jnp.asarray(at, jnp.int32), axis=axis)


def put_heads(x: Array, heads: tuple[int, ...], kv_heads: int, fill: float = 0.0) -> Array:
    """Undo `of_heads` on axis 1; the other heads get `fill`."""
    if len(heads) == kv_heads:
        return x
    group = x.shape[1] // max(len(heads), 1)
    rest = jnp.full_like(x[:, :1], fill)
    parts = [
        x[:, heads.index(h) * group : (heads.index(h) + 1) * group]
        if h in heads
        else jnp.repeat(rest, group, axis=1)
        for h in range(kv_heads)
    ]
    return jnp.concatenate(parts, axis=1)


def constants(plan: Plan, i: int) -> dict[str, np.ndarray]:
    """The selector's calibration arrays of layer i, of its retrieval heads."""
    heads = list(retrieving(plan, i))
    every = plan.layers[i].policy.selector.constants(i, plan.shape) if heads else {}
    return {n: np.asarray(x)[heads] for n, x in every.items()}


def choice_width(plan: Plan, i: int) -> int:
    """Most blocks that a selection of layer i names for a retrieval head."""
    lp, block = plan.layers[i], plan.block(i)
    selector, total = lp.policy.selector, plan.longest(i)
    most = -(-selector.entries(total) // block)
    if lp.policy.head_reads is not None:  # the head that reads most decides
        counts = lp.policy.head_reads.entries(selector.read, i, np.int64(total))
        heads = list(retrieving(plan, i))
        most = -(-int(np.max(np.asarray(counts)[heads], initial=0)) // block)
    forced = -(-selector.sink // block) + -(-selector.recent // block) + 1
    return min(max(most, forced), lp.capacity // block)


def streaming_width(plan: Plan, i: int) -> int:
    """Most blocks that a streaming head of layer i reads; 0 when none streams."""
    lp, block = plan.layers[i], plan.block(i)
    if len(retrieving(plan, i)) == plan.shape.kv_heads:
        return 0
    reads, total = lp.policy.head_reads, plan.longest(i)
    most = int(np.max(reads.entries(lp.policy.selector.read, i, np.int64(total))))
    most = max(most, reads.sink + 1)
    return min(-(-reads.sink // block) + -(-most // block), lp.capacity // block)


def table_width(plan: Plan, i: int) -> int:
    """Most blocks that a head of layer i reads in a step: the choice, and what came after it where choices are kept."""
    width = streaming_width(plan, i)
    if not retrieving(plan, i):
        return width
    return max(width, choice_width(plan, i) + late_width(plan, i))


def late_width(plan: Plan, i: int) -> int:
    """Blocks of entries newer than a kept choice."""
    selector = plan.layers[i].policy.selector
    return -(-selector.recent // plan.block(i)) + 1 if selector.keeps_choice else 0


def specs(plan: Plan, i: int) -> dict[str, ArraySpec]:
    """The index of layer i: the selector's arrays, slots read at the last step, the choice where it is kept, and the
    blocks of the last step where the layer is offloaded."""
    lp, block, heads = plan.layers[i], plan.block(i), retrieving(plan, i)
    selector, lead = lp.policy.selector, (plan.batch, plan.shape.kv_heads)
    slots = -(-(lp.capacity + lp.policy.codec.residual) // block) * block
    out: dict[str, ArraySpec] = {}
    if heads:
        out |= selector.specs(plan.batch, slots, selector_shape(plan, i))
        if selector.keeps_choice:
            size = (plan.batch, len(heads), choice_width(plan, i))
            out["chosen"] = ArraySpec(size, "int32", (*LEAD, None), fill=-1)
        if len(heads) < plan.shape.kv_heads:  # a few heads are not worth splitting over a mesh
            out = {n: dataclasses.replace(s, axes=_replicated(s.axes)) for n, s in out.items()}
        out["reads"] = ArraySpec(lead, "int32", LEAD)
    if lp.offloaded:
        width, codec = table_width(plan, i), lp.policy.codec
        out["moved"] = ArraySpec(lead, "int32", LEAD)
        out["held"] = ArraySpec((*lead, width), "int32", (*LEAD, None), fill=-1)
        held = codec.specs(lead, (*LEAD, "held"), width * block, plan.shape.head_dim, plan.shape.dtype)
        out |= {f"held.{n}": s for n, s in held.items()}
    return out


def _replicated(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(None if a in ("kv_heads", "q_heads") else a for a in axes)


def own(index: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
    """The selector's part of `specs`."""
    return {n: s for n, s in index.items() if n not in FRAMEWORK and not n.startswith("held.")}


def scanned(plan: Plan, i: int) -> float:
    """Bytes of index and keys that one selection of layer i reads when all slots are filled."""
    if not retrieving(plan, i):
        return 0.0
    lp = plan.layers[i]
    return lp.policy.selector.scanned(own(specs(plan, i)), lp.capacity, plan.batch, selector_shape(plan, i))


def planned(plan: Plan, i: int, stored: np.ndarray) -> np.ndarray:
    """int64, like stored int64 [batch, kv_heads]: entries that a step of layer i is planned to read, in whole blocks."""
    policy, block = plan.layers[i].policy, plan.block(i)
    selector, reads = policy.selector, policy.head_reads
    if reads is None:
        wanted = np.vectorize(selector.entries, otypes=[np.int64])(stored)
    else:
        wanted = reads.entries(selector.read, i, stored)
        always = np.full(plan.shape.kv_heads, reads.sink + 1)
        always[list(retrieving(plan, i))] = selector.sink + selector.recent
        wanted = np.maximum(wanted, np.minimum(stored, always))
    return np.minimum(stored, -(-wanted // block) * block)


def memory(plan: Plan, i: int) -> float:
    """Bytes of layer i's index, as allocated."""
    return nbytes(specs(plan, i))
