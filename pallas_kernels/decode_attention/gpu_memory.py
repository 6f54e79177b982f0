"""Memory of the Hopper decode kernel: how stored fields are viewed, what lies in shared memory, and the copies."""

from __future__ import annotations

import math

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
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


def scratch(plan, window, store, fields) -> dict:
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
    if plan.positions:
        out["positions"] = plgpu.SMEM((stages, plan.block), jnp.int32)
    out["barrier"] = plgpu.SMEM((2 * stages,), jnp.int32)  # 8 bytes a stage
    return out


def start_barriers(plan):
    """Inline function (barriers): every stage's barrier awaits one arrival, that of the thread which starts its copies."""

    def body(ctx, barriers):
        address = ptx.smem_address(barriers)

        def start():
            for stage in range(plan.stages):
                ptx.asm(f"mbarrier.init.shared::cta.b64 [$0], 1; // {stage}", "", [address + 8 * stage])
            ptx.asm("fence.mbarrier_init.release.cluster;", "")
            return []

        ptx.if_(ptx.thread_index().equals(0), start)
        ptx.fence_async()
        ptx.barrier()

    return body


def await_stage(plan):
    """Inline function (barriers, stage, parity): wait for the copies of a stage; parity counts its rounds modulo 2."""

    def body(ctx, barriers, stage, parity):
        _barrier(barriers, stage).wait_parity(arith.trunci(ir.IntegerType.get_signless(1), _value(parity)))

    return body


def start_copies(plan, unit: int):
    """Inline function (stage, places, sources, targets, barriers) of one warp: the copies of a step into a stage.

    One thread announces the bytes of all of them: an arrival a copy and lane, as `copy_gmem_to_smem` makes, keeps the
    warp busy for longer than the addresses do.

    stage: scalar. places: per part of the step and field (and "positions"), what `place` returns. sources,
    targets: refs by name, targets as they lie in memory, with all stages.
    """

    def body(ctx, stage, places, sources, targets, barriers):
        one = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARP)
        barrier, stage = _barrier(barriers, stage), _index(stage)
        into = {name: mgpu.memref_slice(target, stage) for name, target in targets.items()}
        total = sum(math.prod(ir.MemRefType(x.type).shape) * mgpu.bitwidth(ir.MemRefType(x.type).element_type) // 8
                    for x in into.values())  # fmt: skip
        barrier.arrive_expect_tx(total, predicate=one)
        for c, part in enumerate(places):
            for name, at in part.items():
                target, extra = into[name], {}
                if name in ("k", "v"):
                    per = plan.block // plan.k_rows
                    rows = unit // per
                    tile = ir.MemRefType(target.type).shape[-1]
                    extra = dict(gmem_transform=(mgpu.TileTransform((8, tile)),), swizzle=128)
                    window = (mgpu.ds(_index(at[0]), rows), slice(None))
                    inside = slice(c * rows // 8, (c + 1) * rows // 8)
                elif name in ("k_scale", "k_zero") and plan.packed:
                    window, inside = (mgpu.ds(_index(at[0]), plan.key_groups), slice(None)), slice(None)
                elif name in ("v_scale", "v_zero") and plan.packed:
                    window = (_index(at[0]), slice(None), mgpu.ds(_index(at[1]), unit))
                    inside = slice(None)
                elif name == "positions":
                    window, inside = (_index(at[0]), mgpu.ds(_index(at[1]), plan.block)), slice(None)
                else:
                    window, inside = (mgpu.ds(_index(at[0]), unit),), slice(c * unit, (c + 1) * unit)
                if inside != slice(None):
                    target = mgpu.memref_slice(target, inside)
                ctx.async_copy(src_ref=sources[name], dst_ref=target, gmem_slice=window, barrier=barrier, arrive=False,
                               predicate=one, **extra)  # fmt: skip

    return body


def place(plan, name: str, base, inside, page: int, per: int) -> tuple:
    """Where a field's unit starts in its flat array: `base` is the page (or the row), `inside` the slot in it."""
    if name in ("k", "v"):
        return (base * (page // per) + lax.div(inside, per),)
    if plan.split:
        return (base * page + inside,)
    if name in ("k_scale", "k_zero"):
        return (base * (page // plan.group) + lax.div(inside, plan.group),)
    return (base, inside)


def _value(x) -> ir.Value:
    return ptx.scalar(x).value


def _index(x) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), _value(x))


def _barrier(barriers: ir.Value, stage) -> mgpu.utils.BarrierRef:
    return mgpu.utils.BarrierRef(mgpu.utils.memref_ptr(barriers), _value(stage), None, 1)
