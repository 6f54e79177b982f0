"""Compile for a TPU slice without the hardware: memory, work and the compiler's estimate of the time.

The stages `prefill` and `decode` are a model under a policy, sharded over the slice; `--kernels` adds every
TPU kernel on one chip. Needs libtpu (`pip install .[aot]`) and no TPU; weights are never made.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from kvjax.arrays import abstract
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies import registry
from kvjax.sharding import make_mesh, parse_mesh, sharding_of, shardings
from launch import aot_kernels, cli
from models import params as model_params
from models import zoo
from models.lm import DecoderLM

Row = dict[str, Any]

# Dense bfloat16 FLOP/s and HBM bytes/s of one device, by the vendor's data sheets; a tpu7x device is half a
# chip.
PEAKS = {
    "v4": (275e12, 1.228e12),
    "v5e": (197e12, 0.819e12),
    "v5p": (459e12, 2.765e12),
    "v6e": (918e12, 1.640e12),
    "tpu7x": (1153e12, 3.690e12),
}
CALL_TOKENS = 16384  # tokens of one prefill call over all rows: more only costs memory

_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def devices_of(topology: str) -> list[Any]:
    """The described devices of a TPU slice such as "v5e:2x4" or "v5p:2x2x1".

    Raises:
      ValueError: libtpu is missing, or it does not know the topology.
    """
    # One process holds libtpu at a time unless told otherwise; describing a topology shares nothing.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError("libtpu is not installed: `pip install libtpu` (Linux x86-64)") from None
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"--topology={topology!r}: {reason}; examples: v5e:2x4, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1"
        ) from None


def compile_stage(
    stage: str, topology: str, mesh: Mesh, fn: Callable[..., Any], args: Any, kwargs: Any = None, donate=()
) -> Row:
    """Compile `fn` for the devices of `mesh`; arguments without a sharding are replicated.

    `fn` may be jitted already. Returns the row of `stage`. `optimal_seconds` is the compiler's estimate; where
    its cost model does not know some operation it is the roofline of the flops and bytes (`seconds_from` says
    which). `vmem_bytes` is the most that one kernel holds in VMEM, None where it is not known.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x):
        where = getattr(x, "sharding", None) or everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    args = jax.tree.map(place, args)
    with jax.set_mesh(mesh):
        lower = fn.lower if hasattr(fn, "lower") else jax.jit(fn, donate_argnums=donate).lower
        compiled = lower(*args, **(kwargs or {})).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None, "the TPU compiler always reports memory"
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    flops, moved = float(cost.get("flops", 0.0)), float(cost.get("bytes accessed", 0.0))
    seconds, source = float(cost.get("optimal_seconds", -1.0)), "compiler"
    if seconds <= 0:  # every operation of unknown cost counts as -1
        peak, bandwidth = PEAKS.get(topology.split(":")[0], (math.inf, math.inf))
        seconds, source = max(flops / peak, moved / bandwidth), "roofline"
    return {
        "stage": stage,
        "topology": topology,
        "devices": mesh.size,
        "hbm_bytes_per_device": int(held - memory.alias_size_in_bytes),
        "flops": flops,
        "bytes_accessed": moved,
        "optimal_seconds": seconds,
        "seconds_from": source,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "vmem_bytes": _vmem_bytes(compiled),
    }


def _vmem_bytes(compiled: Any) -> int | None:
    """The most VMEM that one kernel of the program holds; 0 without kernels, None where XLA cannot tell."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # some programs with asynchronous calls have no text form in libtpu
        return None
    return max((int(n) for n in _VMEM.findall(text)), default=0)


def kernel_rows(topology: str, sizes: aot_kernels.Sizes, progress: bool = False) -> list[Row]:
    """One row per TPU kernel, each compiled for one chip of the slice."""
    mesh = Mesh(np.array(devices_of(topology)[:1]), ("tensor",))
    cases = list(aot_kernels.cases(sizes))
    return [
        compile_stage(case.name, topology, mesh, case.fn, case.args, donate=case.donate)
        for case in tqdm(cases, desc=f"kernels {topology}", disable=not progress)
    ]


def default_mesh(devices: int, kv_heads: int, batch: int) -> dict[str, int]:
    """Mesh sizes for a slice: KV heads over as many devices as divide them, rows over what is left.

    Raises:
      ValueError: neither covers the slice; give --mesh.
    """
    tensor = math.gcd(devices, kv_heads)
    data = devices // tensor
    if batch % data:
        raise ValueError(
            f"{devices} devices are not filled by {kv_heads} KV heads and --batch={batch}; give --mesh"
        )
    return {"data": data, "tensor": tensor}


def model_rows(
    topology: str,
    model: str,
    policy: str,
    *,
    batch: int,
    context: int,
    new_tokens: int = 128,
    chunk: int = 0,
    mesh: str = "",
    progress: bool = False,
) -> list[Row]:
    """Rows `prefill` and `decode` (one step on the full cache).

    `prefill` is one call: the whole prompt, or the last of the chunks of `chunk` tokens a row in which it
    enters the cache (0: as many as `CALL_TOKENS` allows). `calls` says how many calls a prompt takes.
    """
    config = zoo.shape(model)
    devices = devices_of(topology)
    sizes = parse_mesh(mesh) or default_mesh(len(devices), config.kv_heads, batch)
    grid = make_mesh(sizes, devices)
    if grid.size < len(devices):
        raise ValueError(
            f"--mesh={mesh} takes {grid.size} of the {len(devices)} devices of {topology}; name them all"
        )
    lm = DecoderLM(config)
    if context > lm.shape.max_context:
        raise ValueError(f"--context={context} exceeds the model's context of {lm.shape.max_context}")
    plan = Plan(
        policy=registry.parse(policy), shape=lm.shape, batch=batch, prompt=context, reserve=new_tokens,
        platform="tpu", devices=grid.size,
    )  # fmt: skip
    specs = model_params.param_specs(config, jnp.dtype(lm.shape.dtype))
    weights = jax.tree.map(
        lambda spec, axes: jax.ShapeDtypeStruct(
            spec.shape, spec.dtype, sharding=sharding_of(spec.shape, axes, grid)
        ),
        specs,
        model_params.param_axes(config),
    )
    cache_specs = plan.specs()
    cache = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        abstract(cache_specs),
        shardings(cache_specs, grid),
    )

    def ints(*shape):
        where = sharding_of(shape, ("batch", None)[: len(shape)], grid)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)

    def decode(params, cache, tokens, active):
        return engine.step(lm, plan, params, cache, tokens, active != 0)

    def prefill(params, tokens, positions):
        return engine.prefill(lm, plan, params, tokens, positions)

    def extend(params, cache, tokens, positions):
        return engine.extend(lm, plan, params, cache, tokens, positions, compress=True)

    chunk = min(context, chunk or max(128, CALL_TOKENS // batch))
    new = (ints(batch, chunk), ints(batch, chunk))
    whole = ("prefill", prefill, (weights, *new), ())
    stages = [
        whole if chunk == context else ("prefill", extend, (weights, cache, *new), (1,)),
        ("decode", decode, (weights, cache, ints(batch), ints(batch)), (1,)),
    ]
    rows = [
        compile_stage(name, topology, grid, fn, args, donate=donate)
        for name, fn, args, donate in tqdm(stages, desc=f"{model} {topology}", disable=not progress)
    ]
    return [
        row | {"calls": -(-context // chunk) if row["stage"] == "prefill" else 1, "tokens_per_call": tokens}
        for row, tokens in zip(rows, (batch * chunk, batch))
    ]


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("topology", "v5e:2x4", "TPU slice, e.g. v5e:2x4, v5p:2x2x1", flag_values=f)
    flags.DEFINE_string("model", "", f"shape of the model: {', '.join(zoo.SHAPES)}", flag_values=f)
    flags.DEFINE_string("policy", "full", "policy spec", flag_values=f)
    flags.DEFINE_integer("batch", 1, "rows", lower_bound=1, flag_values=f)
    flags.DEFINE_integer("context", 8192, "prompt tokens per row", lower_bound=1, flag_values=f)
    flags.DEFINE_integer("max_new_tokens", 128, "tokens to reserve", lower_bound=0, flag_values=f)
    flags.DEFINE_integer(
        "chunk", 0, "prompt tokens per row and call (0: automatic)", lower_bound=0, flag_values=f
    )
    flags.DEFINE_string("mesh", "", "e.g. data=2,tensor=4; default: KV heads first, then rows", flag_values=f)
    flags.DEFINE_bool("kernels", False, "also compile every TPU kernel for one chip", flag_values=f)
    flags.DEFINE_string("out", "", "JSON file for the rows", flag_values=f)


def main(f: flags.FlagValues) -> None:
    """Compile what is asked for, print a table, write the rows."""
    jax.config.update("jax_platforms", "cpu")  # before any backend starts: no TPU is wanted here
    if not f.model and not f.kernels:
        raise ValueError("nothing to compile: give --model, or --kernels, or both")
    rows: list[Row] = []

    def write() -> None:
        if f.out:  # after each part, so that an interrupted run leaves what it has
            os.makedirs(os.path.dirname(f.out) or ".", exist_ok=True)
            with open(f.out, "w") as file:
                json.dump(rows, file, indent=1)

    if f.model:
        rows += model_rows(
            f.topology, f.model, f.policy, batch=f.batch, context=f.context, new_tokens=f.max_new_tokens,
            chunk=f.chunk, mesh=f.mesh, progress=True,
        )  # fmt: skip
        write()
    if f.kernels:
        rows += kernel_rows(f.topology, aot_kernels.Sizes(), progress=True)
        write()
    for row in rows:
        vmem = "?" if row["vmem_bytes"] is None else f"{row['vmem_bytes'] / 2**20:.1f}"
        time = f"{row['optimal_seconds'] * 1e3:.3f} ms ({row['seconds_from']})"
        print(
            f"{row['stage']:<34} {row['topology']} x{row['devices']}: "
            f"HBM {row['hbm_bytes_per_device'] / 2**30:.3f} GiB a device, "
            f"VMEM {vmem} MiB, {row['flops']:.3e} flops, "
            f"{row['bytes_accessed']:.3e} bytes, {time}"
        )


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
