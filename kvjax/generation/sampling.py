"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty; seeded per row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of one row. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    Filters apply in the order repetition penalty, temperature, top-k, top-p, min-p. Equal seeds give equal
    tokens, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 = off), got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty must be > 0 (1 = off), got {self.repetition_penalty}")


@struct.dataclass
class SamplingArrays:
    """Sampling settings of a batch. `greedy` and `penalize` are static: they decide what is compiled."""

    temperature: Array  # f32 [batch]
    top_k: Array  # int32 [batch]
    top_p: Array  # f32 [batch]
    min_p: Array  # f32 [batch]
    penalty: Array  # f32 [batch]
    key: Array  # PRNG keys [batch]
    greedy: bool = struct.field(pytree_node=False, default=True)
    penalize: bool = struct.field(pytree_node=False, default=False)


def batch_sampling(rows: Sequence[Sampling]) -> SamplingArrays:
    """Stack the settings of each row."""

    def stack(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(r, name) for r in rows], dtype)

    return SamplingArrays(
        temperature=stack("temperature", np.float32),
        top_k=stack("top_k", np.int32),
        top_p=stack("top_p", np.float32),
        min_p=stack("min_p", np.float32),
        penalty=stack("repetition_penalty", np.float32),
        key=jax.vmap(jax.random.key)(stack("seed", np.uint32)),
        greedy=all(r.temperature == 0.0 for r in rows),
        penalize=any(r.repetition_penalty != 1.0 for r in rows),
    )


def sample(logits: Array, settings: SamplingArrays, index: Array, seen: Array | None) -> Array:
    """Next token of each row, int32 [batch].

    logits f32 [batch, vocab]; index int32 [batch]: how many tokens the row has generated (it selects the random
    draw); seen bool [batch, vocab]: tokens of the prompt and the output so far, for the repetition penalty.
    """
    if settings.penalize and seen is not None:
        penalty = settings.penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if settings.greedy:
        return best
    filtered = filter_logits(logits, settings)
    keys = jax.vmap(jax.random.fold_in)(settings.key, index)
    drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
    return jnp.where(settings.temperature == 0.0, best, drawn)


def filter_logits(logits: Array, settings: SamplingArrays) -> Array:
    """Tempered logits [batch, vocab] with tokens outside top-k, top-p or min-p at -inf."""
    vocab = logits.shape[-1]
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    logits = logits / temperature[:, None]
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(vocab)
    top_k = jnp.where(settings.top_k > 0, settings.top_k, vocab)
    keep = rank < top_k[:, None]
    probs = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of better tokens; the best one always stays
    keep &= (before < settings.top_p[:, None]) & (probs >= settings.min_p[:, None] * probs[:, :1])
    ranked = jnp.where(keep, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
