"""Probes: tokens that are run against the uncompressed cache to be observed, and are never stored.

A policy with a probe keeps the whole prompt (or chunk) until the probe has run; the scorer then sees the probe's
queries instead of the prompt's own. `kvjax.probe` runs them; here is only which tokens they are.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Passes:
    """Inputs of `passes` forward passes; each starts right after the prompt and forgets the one before."""

    tokens: Array  # int32 [passes, batch, n]
    offsets: Array  # int32 [passes, batch, n] position after the prompt's end, -1 = padding
    start: Array  # int32 [passes, batch] first position of the prompt that the pass is about
    end: Array  # int32 [passes, batch] one past the last such position


class Probe:
    """Base class; instances are frozen dataclasses."""

    def passes(self, tokens: Array, positions: Array) -> Passes:
        """The passes for one call's tokens and positions, int32 [batch, tokens] (position -1 = padding)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Fixed(Probe):
    """The same tokens for every row: an instruction, or pseudo tokens that only hold decode positions."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("a probe needs at least one token")

    def passes(self, tokens: Array, positions: Array) -> Passes:
        """One pass about the whole prompt."""
        batch, n = tokens.shape[0], len(self.ids)
        live = jnp.any(positions >= 0, axis=1)
        offsets = jnp.where(live[:, None], jnp.arange(n, dtype=jnp.int32), -1)
        start = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1)
        return Passes(
            tokens=jnp.broadcast_to(jnp.asarray(self.ids, jnp.int32), (1, batch, n)),
            offsets=offsets[None],
            start=jnp.where(live, start, 0)[None],
            end=(jnp.max(positions, axis=1) + 1)[None],
        )


@dataclasses.dataclass(frozen=True)
class Repeat(Probe):
    """The prompt itself, chunk by chunk: each pass reads `prefix`, the last `overlap` tokens before the chunk,
    and the chunk's tokens again (KVzip's context reconstruction)."""

    chunk: int = 2048
    overlap: int = 8
    prefix: tuple[int, ...] = ()

    def passes(self, tokens: Array, positions: Array) -> Passes:
        """ceil(tokens / chunk) passes of len(prefix) + overlap + chunk tokens."""
        size = min(self.chunk, tokens.shape[1])
        valid = positions >= 0
        first, count = jnp.argmax(valid, axis=1), jnp.sum(valid, axis=1, dtype=jnp.int32)
        number = jnp.arange(-(-tokens.shape[1] // size), dtype=jnp.int32)[:, None, None]
        index = number * size - self.overlap + jnp.arange(self.overlap + size, dtype=jnp.int32)
        inside = (index >= 0) & (index < count[None, :, None])
        inside &= number * size < count[None, :, None]  # nothing but overlap is left of a finished row
        at = jnp.clip(index + first[None, :, None], 0, tokens.shape[1] - 1)
        body = jax.vmap(lambda i: jnp.take_along_axis(tokens, i, axis=1))(at)
        head = jnp.broadcast_to(jnp.asarray(self.prefix, jnp.int32), (*body.shape[:2], len(self.prefix)))
        live = jnp.concatenate([jnp.broadcast_to(inside.any(-1, keepdims=True), head.shape), inside], axis=-1)
        # Tokens that are not there go last, so that a row's probe is contiguous.
        order = jnp.argsort(~live, axis=-1, stable=True)
        body = jnp.take_along_axis(jnp.concatenate([head, body], axis=-1), order, axis=-1)
        live = jnp.take_along_axis(live, order, axis=-1)
        offsets = jnp.where(live, jnp.cumsum(live, axis=-1) - 1, -1)
        base = jnp.take_along_axis(positions, first[:, None], axis=1)[:, 0]
        start = base + jnp.minimum(number[:, :, 0] * size, count)
        return Passes(
            tokens=body.astype(jnp.int32),
            offsets=offsets.astype(jnp.int32),
            start=start,
            end=base + jnp.minimum((number[:, :, 0] + 1) * size, count),
        )
