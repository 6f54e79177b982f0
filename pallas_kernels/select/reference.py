"""The largest scores' numbers in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
_NONE = np.int32(2**31 - 1)


def select_top_xla(scores: Array, counts: Array, width: int) -> Array:
    """See `ops.select_top`: a full `top_k` by score, then a sort of the numbers."""
    allowed = jnp.where(scores > -jnp.inf, jnp.where(scores == 0, 0.0, scores), -jnp.inf)
    best, numbers = jax.lax.top_k(allowed, width)
    keep = (jnp.arange(width) < counts[..., None]) & (best > -jnp.inf)
    numbers = jnp.sort(jnp.where(keep, numbers, _NONE), axis=-1)
    return jnp.where(numbers == _NONE, -1, numbers)
