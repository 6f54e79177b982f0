"""Suite `generate`: a decode step of a Llama-3.1-8B-shaped model with random weights through the library's own loop.

Caches are filled with random entries, no prompt is run. On an accelerator the model has `LAYERS` of the 32 layers: the
full bf16 cache of 32 x 32,768 tokens (137 GB) and all weights do not fit one device together. us is a step of that
model; `step_us` is what 32 layers take: the head once (`head_us`, timed by itself) and the rest times 32 / LAYERS.
`busy` lists what the device was busy with, microseconds a step by kernel. `append_us`: encoding one group of every row,
head and layer (deferred codecs), over the steps from one group to the next. gb_per_s counts cache and weights, read once.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import policies
from kvjax.cache import deferred, traffic
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache
from kvjax.generation import engine
from kvjax.generation.sampling import Sampling, SamplingArrays, batch_sampling
from launch.bench_suites import timing
from launch.bench_suites.random_cache import random_cache
from models import params as model_params
from models import zoo
from models.lm import DecoderLM

Row = dict[str, Any]
Fill = Callable[[Plan, jax.Array], KVCache]

MODEL_LAYERS = 32
LAYERS = 8
BATCH, CONTEXT = 32, 32768
MORE = [(32, 8192), (8, 32768)]  # batch, context: the full cache only
SPECS = [
    "full",
    "int8",
    "fp8",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "kivi(bits=4, group=64)",
    "kivi(bits=2, group=64)",
    "keydiff(budget=0.2)",
    "snapkv(budget=0.2)",
]
_STEPS = 64  # of one timed call
_ROOM = 2048
_FLUSHES = 8


def model(layers: int, dtype: str = "bfloat16") -> DecoderLM:
    """The first `layers` layers of a Llama-3.1-8B shape."""
    whole = zoo.shape("llama3-8b")
    cut = dict(layers=layers, ropes=whole.ropes[:layers], windows=whole.windows[:layers], dtype=dtype)
    return DecoderLM(dataclasses.replace(whole, **cut))


def small() -> DecoderLM:
    """What a CPU can run."""
    config = model(2, "float32").config
    return DecoderLM(
        dataclasses.replace(config, embed_dim=256, mlp_dim=512, vocab_size=512, q_heads=4, kv_heads=2)
    )


def filled(plan: Plan, key: jax.Array) -> KVCache:
    """A random cache; layers get copies of one layer, which must not depend on its number."""
    shape = dataclasses.replace(plan.shape, layers=1, windows=plan.shape.windows[:1])
    one = random_cache(dataclasses.replace(plan, shape=shape), key)
    count = plan.shape.layers
    copies = [jax.tree.map(jnp.copy, (one.layers[0], one.pools[0])) for _ in range(count)]
    layers, pools = zip(*copies)
    return one.replace(layers=layers, pools=pools)


@dataclasses.dataclass
class Loop:
    """The decode loop on a random cache."""

    lm: DecoderLM
    plan: Plan
    params: Any
    state: engine.DecodeState
    settings: SamplingArrays

    def run(self, steps: int) -> None:
        """`steps` steps, waited for."""
        batch = self.plan.batch
        stop, limit = jnp.full((1,), -1, jnp.int32), jnp.full((batch,), _ROOM, jnp.int32)
        self.state = engine.decode(
            self.lm, self.plan, self.params, self.state, self.settings, stop, limit, jnp.int32(steps)
        )
        jax.block_until_ready(self.state)

    def seconds(self) -> float:
        """Of one step: the median of three runs."""
        self.run(4)
        spans = []
        for _ in range(3):
            start = time.perf_counter()
            self.run(_STEPS)
            spans.append((time.perf_counter() - start) / _STEPS)
        return float(np.median(spans))


def open_loop(
    lm: DecoderLM, params: Any, spec: str, batch: int, context: int, fill: Fill | None = None
) -> Loop:
    """A loop whose rows hold `context` random tokens each; `fill` makes the cache, `filled` by default."""
    plan = Plan(
        policies.parse(spec), lm.shape, batch, context, _ROOM, page_size=64, platform=jax.default_backend()
    )
    cache = (fill or filled)(plan, jax.random.key(1))
    settings = batch_sampling([Sampling()] * batch)
    stop, limit = jnp.full((1,), -1, jnp.int32), jnp.full((batch,), _ROOM, jnp.int32)
    logits = jnp.zeros((batch, lm.config.vocab_size), jnp.float32)
    state = engine.begin(cache, logits, settings, stop, limit, None, room=_ROOM)
    return Loop(lm, plan, params, state, settings)


def measure(lm: DecoderLM, params: Any, spec: str, batch: int, context: int, head_s: float) -> Row:
    """One row."""
    loop = open_loop(lm, params, spec, batch, context)
    moved = traffic.read_bytes(loop.plan, loop.state.cache)
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params.embedding.nbytes
    seconds = loop.seconds()
    shape = (batch, context, lm.shape.layers)
    row = timing.row("decode step", shape, lm.shape.dtype, spec, seconds, moved=moved + weights)
    row["head_us"] = head_s * 1e6
    row["step_us"] = (head_s + (seconds - head_s) * MODEL_LAYERS / lm.shape.layers) * 1e6
    row["cache_bytes"] = loop.plan.nbytes()
    if jax.default_backend() == "gpu":
        steps = 16
        spans_of = timing.device_spans(lambda: loop.run(steps))
        busy = {name: sum(us) / steps for name, us in spans_of.items()}
        row["busy_us"] = sum(busy.values())
        row["busy"] = dict(sorted(busy.items(), key=lambda x: -x[1])[:16])
        row["launches"] = sum(map(len, spans_of.values())) / steps
    row["append_us"] = _append_us(loop)
    return row


def _append_us(loop: Loop) -> float | None:
    """Microseconds a step that encoding groups takes in all layers: one flush, spread over the steps between two."""
    codec = loop.plan.layers[0].policy.codec
    if not codec.deferred:
        return None
    layers = len(loop.plan.layers)

    def again(cache: KVCache) -> KVCache:
        def body(_: Any, cache: KVCache) -> KVCache:
            before = cache.layers
            for i in range(layers):
                cache = deferred.flush(loop.plan, cache, i, jnp.ones_like(before[i].fill, bool))
            # The next round does the same again: the counts go back.
            kept = [
                x.replace(
                    fill=y.fill, next_slot=y.next_slot, residual=x.residual.replace(count=y.residual.count)
                )
                for x, y in zip(cache.layers, before)
            ]
            return cache.replace(layers=tuple(kept))

        return jax.lax.fori_loop(0, _FLUSHES, body, cache)

    run = jax.jit(again, donate_argnums=0)
    cache = jax.block_until_ready(run(loop.state.cache))
    start = time.perf_counter()
    jax.block_until_ready(run(cache))
    return (time.perf_counter() - start) / _FLUSHES / codec.group * 1e6


def head_seconds(lm: DecoderLM, params: Any, batch: int) -> float:
    """Final norm, projection to the vocabulary and greedy choice of `batch` rows."""
    hidden = jax.random.normal(jax.random.key(0), (batch, lm.config.embed_dim), lm.shape.dtype)
    return timing.measure(jax.jit(lambda p, h: jnp.argmax(lm.logits(p, h), axis=-1)), params, hidden)


def rows() -> Iterator[Row]:
    """Rows of the suite; a CPU runs one small shape."""
    cpu = jax.default_backend() == "cpu"
    lm = small() if cpu else model(LAYERS)
    batch, context = (2, 512) if cpu else (BATCH, CONTEXT)
    params = model_params.init_params(lm.config, jax.random.key(0), jnp.dtype(lm.shape.dtype))
    head = head_seconds(lm, params, batch)
    todo = [(spec, batch, context) for spec in SPECS] + [("full", *shape) for shape in ([] if cpu else MORE)]
    for spec, batch, context in todo:
        shape = (batch, context, lm.shape.layers)
        work = functools.partial(measure, lm, params, spec, batch, context, head)
        yield timing.attempt("decode step", shape, lm.shape.dtype, spec, work)
