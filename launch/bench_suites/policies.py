"""Suite `policies`: what scoring, allocating and compacting cost beside the prefill they follow, at 32k tokens.

Llama-3.1-8B layers with random weights, batch 1. Row `prefill` is a layer's share of a whole prefill into the full cache;
a policy's row is `store` and `finish` of one layer, from queries, keys, values and hidden states that exist already, and
`share` is its time over that of `prefill`. Row `chunked prefill`: a prompt of 131,072 tokens in chunks, `peak_bytes` what the
device held at most beyond the weights, `cache_bytes` the cache, `temp_bytes` the compiler's own figure for a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import policies
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache, View
from kvjax.compress import finish, store
from kvjax.generation import engine
from kvjax.policies.observation import Observation
from launch.bench_suites import timing
from launch.bench_suites.generate import model, small
from models import params as model_params
from models.lm import DecoderLM

Row = dict[str, Any]

LAYERS = 2
CONTEXT = 32768
LONG, CHUNK = 131072, 4096
SPECS = [
    "snapkv(budget=0.2)",
    "keydiff(budget=0.2)",
    "streaming_llm(budget=0.2, evict_decode=False)",
    "tova(budget=0.2)",
    "keydiff(budget=0.2) | adakv",
    "expected_attention(budget=0.2)",
    "pyramidkv(budget=0.2)",
]
CHUNKED = ["keydiff(budget=8192)", "full"]
_RESERVE = 128


def inputs(lm: DecoderLM, params: Any, context: int, seed: int) -> dict[str, jax.Array]:
    """One layer's tensors for `context` tokens of one row, random."""
    c, dtype = lm.config, lm.shape.dtype
    keys = jax.random.split(jax.random.key(seed), 5)
    make = jax.jit(lambda key, *shape: jax.random.normal(key, shape, dtype), static_argnums=(1, 2, 3, 4))
    q, k, v = (
        make(key, 1, heads, context, c.head_dim)
        for key, heads in zip(keys, (c.q_heads, c.kv_heads, c.kv_heads))
    )
    lse = jax.random.normal(keys[3], q.shape[:3]) + np.log(context)
    hidden = jax.random.normal(keys[4], (1, context, c.embed_dim), dtype)
    freq = jnp.asarray(5e5 ** (-np.arange(c.head_dim // 2) * 2 / c.head_dim), jnp.float32)
    return dict(q=q, k=k, v=v, lse=lse, hidden=hidden, wo=params.layers[0].wo, inv_freq=freq)


def policy_seconds(plan: Plan, tensors: list[dict[str, jax.Array]]) -> float:
    """Seconds per layer from every layer's tensors to its compressed cache."""
    context, layers = plan.prompt, plan.shape.layers
    positions = jnp.arange(context, dtype=jnp.int32)[None]

    @jax.jit
    def run(tensors: list[dict[str, jax.Array]], positions: jax.Array) -> KVCache:
        cache = ops.empty(plan)
        pos = jnp.broadcast_to(positions[:, None], (1, plan.shape.kv_heads, context))
        for i, (lp, x) in enumerate(zip(plan.layers, tensors)):
            scorer, codec = lp.policy.scorer, lp.policy.codec
            state = {} if scorer is None else scorer.slot_state()
            kv = {"k": x["k"], "v": x["v"]}
            entries = View(
                kv if codec.deferred else codec.encode(x["k"], x["v"], ops.context(plan, i, pos, None)),
                pos,
                {n: jnp.zeros((*pos.shape, *suffix), dtype) for n, (suffix, dtype) in state.items()},
            )
            obs = Observation(
                q_pos=positions,
                pos=pos,
                length=jnp.full((1,), context, jnp.int32),
                const=cache.layers[i].const,
                layer=i,
                layers=layers,
                scale=plan.shape.head_dim**-0.5,
                **x,
            )
            cache = store(plan, cache, obs, entries, compress=True, fresh=True)
        return finish(plan, cache, positions)

    return timing.measure(run, tensors, positions) / layers


def prefill_seconds(lm: DecoderLM, params: Any, context: int) -> float:
    """Seconds per layer of a whole prefill into the full cache."""
    plan = Plan(policies.parse("full"), lm.shape, 1, context, _RESERVE, page_size=64)
    tokens = jax.random.randint(jax.random.key(1), (1, context), 0, lm.config.vocab_size)
    positions = jnp.arange(context, dtype=jnp.int32)[None]
    return timing.measure(lambda t: engine.prefill(lm, plan, params, t, positions), tokens) / lm.shape.layers


def chunked(lm: DecoderLM, params: Any, spec: str, context: int, chunk: int) -> Row:
    """The row of a chunked prefill. The device's peak counts from the start of the process: order matters.

    Weights of zero serve: initialising random ones takes more memory than what is measured here. So do the buffers in
    which XLA tries matrix products: `peak_bytes` means something with XLA_FLAGS=--xla_gpu_autotune_level=0 only.
    """
    plan = Plan(policies.parse(spec), lm.shape, 1, context, _RESERVE, page_size=64)
    device = next(iter(params.embedding.devices()))
    tokens = jax.random.randint(jax.random.key(1), (1, chunk), 0, lm.config.vocab_size)
    positions = jnp.arange(chunk, dtype=jnp.int32)[None]
    cache = jax.jit(ops.empty, static_argnums=0)(plan)
    cache = cache.replace(expected=jnp.full((1,), context, jnp.int32))
    lowered = engine.extend.lower(lm, plan, params, cache, tokens, positions, compress=True)
    memory = lowered.compile().memory_analysis()
    start = time.perf_counter()
    for at in range(0, context, chunk):
        logits, cache = engine.extend(lm, plan, params, cache, tokens, positions + at, compress=True)
    jax.block_until_ready(logits)
    row = timing.row("chunked prefill", (1, context, lm.shape.layers), lm.shape.dtype, spec,
                     time.perf_counter() - start)  # fmt: skip
    stats = device.memory_stats() or {}
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    row["cache_bytes"] = plan.nbytes()
    row["temp_bytes"] = None if memory is None else memory.temp_size_in_bytes
    row["peak_bytes"] = stats["peak_bytes_in_use"] - weights if "peak_bytes_in_use" in stats else None
    return row


def rows() -> Iterator[Row]:
    """Rows of the suite; a CPU runs one small shape."""
    cpu = jax.default_backend() == "cpu"
    lm = small() if cpu else model(LAYERS)
    context, long, chunk = (512, 1024, 128) if cpu else (CONTEXT, LONG, CHUNK)
    dtype = jnp.dtype(lm.shape.dtype)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model_params.param_specs(lm.config, dtype))
    for spec in CHUNKED:
        yield chunked(lm, params, spec.replace("8192", "256") if cpu else spec, long, chunk)
    params = model_params.init_params(lm.config, jax.random.key(0), dtype)
    base = prefill_seconds(lm, params, context)
    yield timing.row("prefill", (1, context), lm.shape.dtype, "full", base)
    tensors = [inputs(lm, params, context, i) for i in range(lm.shape.layers)]
    for spec in ["full", *SPECS]:
        plan = Plan(policies.parse(spec), lm.shape, 1, context, _RESERVE, page_size=64)
        seconds = policy_seconds(plan, tensors)
        row = timing.row("policy", (1, context), lm.shape.dtype, spec, seconds)
        row["share"] = seconds / base
        yield row
