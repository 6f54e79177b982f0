"""Decode steps on an offloaded cache against the same cache on the device; `docs/results_offload.md` has the results.

A Llama-3.1-8B shape with LAYERS layers, random weights, caches filled with random entries. One JSON line per case:
step time, bytes moved by the last step, and how much of their transfer time the step hides:
1 - (step - resident) / (bytes moved / link), where `resident` is the same program with the host part in device memory and
the link is timed by gathers in the same run.

    python tools/device_offload.py --out=tokens_device.npy
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.04 python tools/device_offload.py --capped --out=tokens_capped.npy
    python tools/device_offload.py --disk=DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import arrays, attend, compress
from kvjax import policies as P
from kvjax.cache import disk as files
from kvjax.cache import ops, paging, placing, traffic
from kvjax.cache.pinned import device_view
from kvjax.cache.plan import Plan
from kvjax.cache.state import View
from kvjax.generation import engine
from kvjax.generation.sampling import Sampling, batch_sampling
from kvjax.types import AttentionInputs
from models import params as model_params
from models import zoo
from models.lm import DecoderLM

CONTEXT, RESERVE, STEPS, RUNS = 32768, 256, 32, 3
START = time.time()


def model(layers: int) -> DecoderLM:
    whole = zoo.shape("llama3-8b")
    return DecoderLM(
        dataclasses.replace(whole, layers=layers, ropes=whole.ropes[:layers], windows=(None,) * layers)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def fill_layer(plan: Plan, i: int, key: jax.Array, disk):
    """(layer, pool) of layer i with random entries, stored as a prefill stores them; disk: of `KVCache`."""
    shape, batch = plan.shape, plan.batch
    size = (batch, shape.kv_heads, plan.prompt, shape.head_dim)
    k, v = (jax.random.normal(x, size, shape.dtype) for x in jax.random.split(key))
    positions = jnp.broadcast_to(jnp.arange(plan.prompt), (batch, plan.prompt))
    inv_freq = 500000.0 ** (-jnp.arange(shape.head_dim // 2) / (shape.head_dim // 2))
    q = jnp.zeros((batch, shape.q_heads, plan.prompt, shape.head_dim), shape.dtype)
    x = AttentionInputs(q, k, v, positions, inv_freq=inv_freq, layer=i, scale=shape.head_dim**-0.5)
    cache = arrays.init(plan.specs()).replace(disk=disk)
    pos = jnp.broadcast_to(positions[:, None], size[:3])
    entries = View({"k": k, "v": v}, pos, {})
    obs = attend.observation(plan, x, cache, k, v, pos, prefilling=True)
    cache = compress.store(plan, cache, obs, entries, compress=True, fresh=True)
    if placing.offloaded(plan, i):
        cache = placing.split(plan, cache, i)
    return cache.layers[i], cache.pools[i]


def fill(plan: Plan):
    """(cache without its host part, host part or None, seconds)."""
    start = time.time()
    layers, pools = [], []
    disk = jax.jit(lambda: paging.open_files(plan, arrays.init(plan.specs())).disk)()
    for i in range(plan.shape.layers):
        layer, pool = jax.block_until_ready(fill_layer(plan, i, jax.random.key(i), disk))
        host = None if pool.host is None else jax.tree.map(device_view, pool.host)
        layers.append(layer)
        pools.append(pool.replace(host=host))
    empty = jax.eval_shape(lambda: ops.empty(plan))
    rows = {n: jnp.full((plan.batch,), plan.prompt, jnp.int32) for n in ("length", "next_position")}
    rest = {n: jnp.zeros((plan.batch,), jnp.int32) for n in ("expected", "compressed")}
    cache = empty.replace(layers=tuple(layers), pools=tuple(pools), disk=disk, **rows, **rest)
    if not placing.offloads(plan):
        return cache, None, time.time() - start
    return *placing.detach(cache), time.time() - start


def link() -> float:
    """Bytes per second of gathers of 2 KB rows from pinned memory."""
    x = jax.device_put(jnp.zeros((1 << 17, 1024), jnp.bfloat16), jax.memory.Space.Host)
    view = device_view(x)
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 1 << 17, 8192))
    take = jax.jit(lambda v, n: jnp.take(v, n, axis=0, mode="clip"))
    take(view, rows).block_until_ready()
    start = time.perf_counter()
    jax.block_until_ready([take(view, rows) for _ in range(10)])
    return 10 * 8192 * 2048 / (time.perf_counter() - start)


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    """In memory of the device; XLA would hand through what nothing is done to."""
    return jax.lax.optimization_barrier(x[::-1])[::-1]


def logit_error(lm: DecoderLM, plan: Plan, params, cache, host, copies) -> float:
    """Largest difference of one step's logits between host memory and its copy on the device, the same program."""

    @jax.jit
    def step(params, cache, host):
        tokens = jnp.arange(plan.batch, dtype=jnp.int32)
        return engine.step(lm, plan, params, placing.attach(cache, host), tokens, tokens >= 0)[0]

    return float(jnp.max(jnp.abs(step(params, cache, host) - step(params, cache, copies))))


def run(
    lm: DecoderLM, params, spec, batch: int, rate: float, context: int = CONTEXT, capped=False, trace=None
):
    """A row of results and the tokens int32 [batch, STEPS]; trace: a directory for a profile of one more call."""
    policy = spec if not isinstance(spec, str) else P.parse(spec)
    plan = Plan(policy, lm.shape, batch, context, RESERVE)
    cache, host, filled = fill(plan)
    settings = batch_sampling([Sampling(temperature=0.0)] * batch)
    stops, limits = np.full((8,), -1, np.int32), np.full((batch,), RESERVE, np.int32)
    logits = jnp.zeros((batch, lm.config.vocab_size)).at[:, 7].set(1.0)
    state = engine.begin(cache, logits, settings, stops, limits, None, room=RESERVE)
    times: dict[str, list[float]] = {"offloaded": [], "resident": [], "traced": []}

    def steps(state, host, name):
        start = time.perf_counter()
        state = engine.decoder(plan)(
            lm, plan, params, state, settings, stops, limits, np.int32(STEPS), host=host
        )
        state.tokens.block_until_ready()
        times[name].append((time.perf_counter() - start) / STEPS)
        return state

    for _ in range(RUNS):  # the first compiles, and a graph is set up anew for other buffers
        state = steps(state, host, "offloaded")
    if trace and host is not None:
        with jax.profiler.trace(f"{trace}/batch{batch}"):
            state = steps(state, host, "traced")
    if host is not None and not capped and not plan.on_disk:
        copies = jax.block_until_ready(jax.tree.map(_copy, host))
        row_error = logit_error(lm, plan, params, state.cache, host, copies)
        for _ in range(RUNS):
            state = steps(state, copies, "resident")
        del copies
    step = min(times["offloaded"][1:])
    moved = traffic.moved_bytes(plan, state.cache)
    stats = jax.devices()[0].memory_stats() or {}
    row = {
        "policy": policy.name, "batch": batch, "context": context, "layers": lm.shape.layers,
        "step_us": round(step * 1e6, 1), "tokens_per_s": round(batch / step, 1),
        "device_cache": plan.device_nbytes(), "host_cache": plan.host_nbytes(), "moved_bytes": moved,
        "disk_cache": plan.disk_nbytes(), "disk_bytes": traffic.disk_bytes(plan, state.cache),
        "transfer_us": round(moved / rate * 1e6, 1), "read_fraction": round(traffic.read_fraction(plan, state.cache), 4),
        "peak_bytes": stats.get("peak_bytes_in_use"), "limit_bytes": stats.get("bytes_limit"),
        "fill_s": round(filled, 1), "first_call_s": round(times["offloaded"][0] * STEPS, 1), "at": round(time.time() - START, 1),
    }  # fmt: skip
    if times["resident"]:
        row["max_logit_error"] = row_error
        resident = min(times["resident"][1:])
        row["resident_us"] = round(resident * 1e6, 1)
        row["hidden"] = round(1 - (step - resident) * rate / moved, 3) if moved else None
    if plan.on_disk:
        row["errors"] = files.store(state.cache.disk.handle).failed
        files.close(state.cache.disk.handle)
    return row, np.asarray(state.tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument(
        "--capped", action="store_true", help="only the case that is to fit the capped memory"
    )
    parser.add_argument("--only", default="", help="only cases whose policy contains this")
    parser.add_argument("--trace", help="a directory: also profile one call of every offloaded case")
    parser.add_argument("--out")
    parser.add_argument(
        "--disk", help="a directory: also time pages on disk, with and without pages in host memory"
    )
    args = parser.parse_args()
    lm = model(args.layers)
    params = model_params.init_params(lm.config, jax.random.key(100), "bfloat16")
    rate = link()
    print(
        json.dumps(
            {
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
                "link_gb_s": round(rate / 1e9, 1),
            }
        )
    )
    quest = "quest(read=1024, page=16, skip_layers=0)"
    first = [f"{quest} | offload"] if args.capped else [quest, f"{quest} | offload"]
    cases = [(spec, args.batch) for spec in first]
    if not args.capped:
        foreseen = "shadowkv(read=1024, ahead=True)"
        cases += [("shadowkv(read=1024)", args.batch), ("shadowkv(read=1024)", 1)]
        cases += [(foreseen, 1), (foreseen, 2), (foreseen, args.batch), (f"{quest} | offload(ahead=True)", 1)]
    if args.disk:
        pathlib.Path(args.disk).mkdir(parents=True, exist_ok=True)
        near = ("memory=0", f"memory={1 << 36}")
        cases += [(f"{quest} | offload(disk={args.disk!r}, {memory})", args.batch) for memory in near]
    for spec, batch in (case for case in cases if args.only in case[0]):
        try:
            row, tokens = run(lm, params, spec, batch, rate, args.context, args.capped, args.trace)
        except jax.errors.JaxRuntimeError as error:
            row, tokens = {"policy": str(spec)[:80], "error": str(error).splitlines()[0][:200]}, None
        print(json.dumps(row), flush=True)
        if args.out and tokens is not None and "offload" in row["policy"] and batch == args.batch:
            np.save(args.out, tokens)


if __name__ == "__main__":
    main()
