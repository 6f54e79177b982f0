"""Calls of inline functions (`pallas_kernels.ptx`) from a Mosaic GPU kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.state import types as state_types
from jax.experimental.pallas import mosaic_gpu as plgpu


def inline(body, *args, result: int | None = None) -> Any:
    """Call an inline function on refs, scalars and arrays of registers, in the layouts that those have here.

    body: called with the lowering's context and the arguments' MLIR values. result: f32 registers a thread that it returns.
    """
    layout = plgpu.Layout.WG_STRIDED

    def kind(x):
        if isinstance(x, state_types.TransformedRef) or isinstance(jax.typeof(x), state_types.AbstractRef):
            return plgpu.RefType()
        shape = jnp.shape(x)
        return layout(shape, vec_size=1) if shape else plgpu.Layout.WG_SPLAT(())

    ret = None
    if result is not None:
        shape = (128 * result,)
        ret = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout(shape, vec_size=1))
    return plgpu.inline_mgpu(arg_types=jax.tree.map(kind, args), return_type=ret)(body)(*args)


def raw(x):
    """The ref as it lies in memory, without the view that undoes its tiling."""
    return x.ref if isinstance(x, state_types.TransformedRef) else x
