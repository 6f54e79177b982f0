"""Top-k as a decode step needs it: which scores are the largest, in ascending order of their numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.platform import check_dtype, check_shape, choose_implementation, require_hopper
from pallas_kernels.select import gpu
from pallas_kernels.select.reference import select_top_xla

Array = jax.Array

# Shorter rows are left to XLA: its sort of a row that fits one CTA's shared memory is a single pass, while the kernel's
# barriers and histograms cost the same for every length. Measured from 2,048 on: 6.9 us for 64 rows against 25.3.
LEAST_SIZE = 2048


def select_top(scores: Array, counts: Array, *, width: int, implementation: str | None = None) -> Array:
    """The numbers of the largest scores of every row, in ascending order.

    The same set as `jax.lax.top_k` gives: of equal scores the lower numbers are taken (the two zeros are equal). Scores of
    -inf and NaN are never taken, +inf is the largest.

    Args:
      scores: f32 [batch, heads, n].
      counts: int32 [batch, heads]: how many to take; below 0 counts as 0, above `width` as `width`.
      width: numbers per row of the result, at most n.
      implementation: "xla" (CPU, TPU and any GPU; TPU has no kernel, its sort of a row is one operation of the compiler),
        "mosaic_gpu" (Hopper) or None for the best here.

    Returns: int32 [batch, heads, width]; -1 fills the end of rows with fewer than `width` numbers.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an `implementation` that cannot run.
    """
    if scores.ndim != 3:
        raise ValueError(f"select_top: scores must be [batch, heads, n], not {scores.shape}")
    check_dtype("select_top", "scores", scores.dtype, ("float32",))
    check_shape("select_top", "counts", counts.shape, scores.shape[:2])
    check_dtype("select_top", "counts", counts.dtype, ("int32",))
    size = scores.shape[2]
    if not 0 <= width <= size:
        raise ValueError(f"select_top: width={width} must be between 0 and the {size} scores of a row")
    unsupported = {"mosaic_gpu": require_hopper() or gpu.unsupported(scores, width), "xla": None}
    preference = ("mosaic_gpu", "xla") if size >= LEAST_SIZE else ("xla",)
    chosen = choose_implementation("select_top", implementation, unsupported, preference)
    if chosen == "mosaic_gpu":
        return gpu.select_top_gpu(scores, counts, width)
    return select_top_xla(scores, counts, width).astype(jnp.int32)
