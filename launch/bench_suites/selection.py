"""Suite `selection`: one layer's decode step (append, index update, selection, attention), selectors beside the full cache.

Every row is a dependent loop of steps under one jit, per step, everything included. gb_per_s counts the bytes of keys,
values and index that the step must read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import policies
from kvjax.attend import decode
from kvjax.cache import traffic
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache
from kvjax.policies.base import Policy
from kvjax.types import AttentionInputs, ModelShape
from launch.bench_suites import timing
from launch.bench_suites.random_cache import random_cache

Row = dict[str, Any]

HEADS = (32, 8, 128)  # query heads, KV heads, head_dim
SHAPES = [(8, 32768), (8, 131072)]  # batch, slots
SPECS = [
    "full",
    "quest(read=0.1, page=64, skip_layers=0)",
    "quest(read=0.1, page=128, skip_layers=0)",
    "quest(read=0.1, page=16, skip_layers=0)",
    "quest(read=0.05, page=64, skip_layers=0)",
    "pqcache(read=0.08, parts=16, bits=4, recent=8, page=8)",
    "lserve(read=0.1, skip_layers=0, heads=None)",  # all heads retrieve: nothing is calibrated for these shapes
]
_STEPS = 64


def loop(plan: Plan) -> Any:
    """A jitted function (cache, q, k, v) -> (sum of outputs, cache) of `_STEPS` decode steps of the one layer."""
    attend = decode(plan)

    def run(cache: KVCache, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache]:
        def step(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            total, cache = carry
            x = AttentionInputs(
                q=q + (total * 0).astype(q.dtype),
                k=k,
                v=v,
                positions=cache.next_position[:, None],
                scale=q.shape[-1] ** -0.5,
            )
            out, cache = attend(x, cache)
            cache = cache.replace(length=cache.length + 1, next_position=cache.next_position + 1)
            return total + out.astype(jnp.float32), cache

        return jax.lax.fori_loop(0, _STEPS, step, (jnp.zeros(q.shape, jnp.float32), cache))

    return jax.jit(run, donate_argnums=0)


def dtype_here() -> str:
    """bfloat16, float32 on a CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def step_seconds(policy: Policy, batch: int, slots: int) -> tuple[float, float]:
    """(seconds per step, bytes that a step must read)."""
    q_heads, kv_heads, dim = HEADS
    dtype = dtype_here()
    shape = ModelShape(1, q_heads, kv_heads, dim, (None,), dtype, slots + 1024)
    plan = Plan(policy, shape, batch, slots, 1024, page_size=64)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (batch, q_heads, 1, dim), dtype)
    k, v = (jax.random.normal(key, (batch, kv_heads, 1, dim), dtype) for key in keys[1:3])
    run, cache = loop(plan), random_cache(plan, keys[3])
    moved = traffic.read_bytes(plan, cache)
    total, cache = run(cache, q, k, v)
    spans = []
    for _ in range(5):
        jax.block_until_ready(total)
        start = time.perf_counter()
        total, cache = run(cache, q, k, v)
        jax.block_until_ready(total)
        spans.append(time.perf_counter() - start)
    return sorted(spans)[len(spans) // 2] / _STEPS, moved


def rows() -> Iterator[Row]:
    """Rows of the suite; a CPU runs one small size."""
    shapes = SHAPES if jax.default_backend() != "cpu" else [(1, 2048)]
    for batch, slots in shapes:
        for spec in SPECS:
            if spec.split("(")[0] not in policies.names():
                continue
            seconds, moved = step_seconds(policies.parse(spec), batch, slots)
            yield timing.row("selection", (batch, slots), dtype_here(), spec, seconds, moved=moved)
