"""Memory of the Hopper decode kernel: how stored fields are viewed, what lies in shared memory, and the copies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.formats import EIGHT_BIT, PACKED_BITS

Array = jax.Array


def flat(x: Array, name: str, fmt: str) -> Array:
    """Fields as the kernel's copies slice them: [rows of all, dim], [slots of all], or [heads or pages, groups, n]."""
    if name in ("k", "v") or (name in ("k_scale", "k_zero") and fmt in PACKED_BITS):
        return x.reshape(-1, x.shape[-1])
    if fmt in EIGHT_BIT:
        return x.reshape(-1)
    return x.reshape(-1, *x.shape[-2:])


def _tiling(dtype) -> tuple:
    size = jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, 128 // size)), plgpu.SwizzleTransform(128)


def scratch(plan, window, store, fields, copies) -> dict:
    """Shared memory: stages of every field, the q and P tiles, and small areas."""
    stages = plan.stages
    shapes = {"k": (plan.k_rows, plan.dim), "v": (plan.k_rows, plan.dim)}
    if plan.split:
        shapes |= {"k_scale": (plan.block,), "v_scale": (plan.block,)}
    if plan.packed:
        shapes |= {n: (plan.key_groups, plan.dim) for n in ("k_scale", "k_zero")}
        shapes |= {n: (plan.dim // plan.group, plan.block) for n in ("v_scale", "v_zero")}
    out = {}
    for name in fields:
        dtype = getattr(store, name).dtype
        transforms = _tiling(dtype) if name in ("k", "v") else ()
        out[name] = plgpu.SMEM((stages, *shapes[name]), dtype, transforms=transforms)
    plans = [plan, window] if window else [plan]
    q_rows = max(
        p.n_scores * (2 * p.key_groups if p.packed else 1) * -(-p.q_dim * p.q_bytes // 128) for p in plans
    )
    p_rows = max(2 * p.n_values * -(-p.block * 2 // 128) for p in plans)
    # The step works on these by address: 16-bit elements stand for their bytes, the tiling for their alignment.
    swizzled = _tiling(jnp.float16)
    out["q_tile"] = plgpu.SMEM((q_rows, 64), jnp.float16, transforms=swizzled)
    out["p_tile"] = plgpu.SMEM((p_rows, 64), jnp.float16, transforms=swizzled)
    if plan.bulk:
        out["reference_tile"] = plgpu.SMEM((2 * plan.reference_columns,), jnp.float32)
    out["scratch"] = plgpu.SMEM((4 * 4 * max(2, *(p.logical for p in plans)),), jnp.float32)
    out["column_scales"] = plgpu.SMEM((max(32, *(p.n_scores for p in plans)),), jnp.float32)
    arrivals = copies * len(fields)
    if plan.positions:
        out["positions"] = plgpu.SMEM((stages, plan.block), jnp.int32)
        arrivals += 1
    out["barrier"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
    return out


def copy(plan, name, source, target, base, inside, page, per, unit, c, barrier) -> None:
    """Copy one unit of one field: `base` is the page (or the row), `inside` the slot in it."""
    if name in ("k", "v"):
        rows = unit // per
        at = pl.ds(base * (page // per) + lax.div(inside, per), rows)
        part = target if unit == plan.block else target.at[pl.ds(c * rows, rows)]
        plgpu.copy_gmem_to_smem(source.at[at], part, barrier)
    elif plan.split:
        part = target if unit == plan.block else target.at[pl.ds(c * unit, unit)]
        plgpu.copy_gmem_to_smem(source.at[pl.ds(base * page + inside, unit)], part, barrier)
    elif name in ("k_scale", "k_zero"):
        at = base * (page // plan.group) + lax.div(inside, plan.group)
        plgpu.copy_gmem_to_smem(source.at[pl.ds(at, plan.key_groups)], target, barrier)
    else:
        plgpu.copy_gmem_to_smem(source.at[base, :, pl.ds(inside, unit)], target, barrier)
