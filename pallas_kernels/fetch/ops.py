"""Blocks side by side out of host memory."""

from __future__ import annotations

import jax

from pallas_kernels.fetch import gpu
from pallas_kernels.fetch.reference import fetch_blocks_xla
from pallas_kernels.platform import check_dtype, check_shape, choose_implementation, require_hopper

Array = jax.Array


def fetch_blocks(far: Array, source: Array, *, implementation: str | None = None) -> Array:
    """The blocks of `far` that `source` names, side by side.

    Args:
      far: [*rows, blocks, ...]; on a GPU a view of pinned host memory.
      source: int32 [*rows, n], blocks of `far`, all of which must exist; a negative number asks for nothing.
      implementation: "xla", "mosaic_gpu" (Hopper, blocks of a multiple of 16 bytes: the copy engine moves them, asked by a
        few threads, so that kernels that run meanwhile keep their place and their bandwidth), or None for the best here.

    Returns: [*rows, n, ...]; what lies where nothing was asked for is not specified.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an `implementation` that cannot run.
    """
    op, rows = "fetch_blocks", source.shape[:-1]
    if source.ndim < 1 or far.ndim <= len(rows):
        raise ValueError(
            f"{op}: far must be [*rows, blocks, ...] and source [*rows, n], not {far.shape}, {source.shape}"
        )
    check_shape(op, "far", far.shape, (*rows, *[None] * (far.ndim - len(rows))))
    check_dtype(op, "source", source.dtype, ("int32",))
    unsupported = {"mosaic_gpu": require_hopper() or gpu.unsupported(far, source), "xla": None}
    chosen = choose_implementation(op, implementation, unsupported, ("mosaic_gpu", "xla"))
    return (gpu.fetch_blocks_gpu if chosen == "mosaic_gpu" else fetch_blocks_xla)(far, source)
