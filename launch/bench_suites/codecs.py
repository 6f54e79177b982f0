"""Suite `codecs`: a decode step under every codec at its published settings, in the shapes of kvref-22m.

That checkpoint's shapes, since calibrated codecs need a model they were calibrated for; weights and entries are random. The
step is the library's own greedy loop: all 12 layers and the output head. `attention` says what reads the codes: 'fused', one
`decode_attention` over what is stored (a kernel where one covers the head_dim, 64 here: on Hopper that is the full cache
alone, the others run in XLA), or 'blocked', tile by tile in XLA. gb_per_s counts cache and weights, read once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache import traffic
from launch.bench_suites import generate, timing
from launch.bench_suites.random_cache import random_cache
from models import params as model_params
from models import zoo
from models.lm import DecoderLM

Row = dict[str, Any]

BATCH, CONTEXT = 64, 16384
SPECS = [
    "full",
    "int8",
    "fp8",
    "fp8(format='e5m2')",
    "int4",
    "bfp(bits=4)",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "kivi(bits=4, group=64)",
    "kivi(bits=2, group=64)",
    "kvquant(bits=4)",
    "kvquant(bits=3)",
    "gear(bits=4)",
    "gear(bits=2)",
    "rotatekv(bits=4)",
    "rotatekv(bits=2)",
    "turboquant(bits=4)",
    "turboquant(bits=3)",
    "kvtuner",
    "zipcache",
    "mikv",
    "qaq",
    "vidkv",
    "aqua_kv(bits=3)",
    "cq(bits=4)",
    "cq(bits=2)",
    "cq(bits=1)",
    "csr",
]


def measure(lm: DecoderLM, params: Any, spec: str, batch: int, context: int) -> Row:
    """One row."""
    loop = generate.open_loop(lm, params, spec, batch, context, fill=random_cache)
    moved = traffic.read_bytes(loop.plan, loop.state.cache)
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params.embedding.nbytes
    shape = (batch, context, lm.shape.layers)
    row = timing.row("decode step", shape, lm.shape.dtype, spec, loop.seconds(), moved=moved + weights)
    codec = loop.plan.layers[-1].policy.codec
    fused = codec.kv_store(loop.state.cache.pools[-1].store) is not None
    row["attention"] = "fused" if fused else "blocked"
    row["cache_bytes"] = loop.plan.nbytes()
    return row


def model(dtype: str) -> DecoderLM:
    """The embedded checkpoint's shape."""
    return DecoderLM(dataclasses.replace(zoo.shape("kvref-22m"), dtype=dtype))


def rows() -> Iterator[Row]:
    """Rows of the suite; a CPU runs one small shape."""
    cpu = jax.default_backend() == "cpu"
    lm = model("float32" if cpu else "bfloat16")
    batch, context = (1, 512) if cpu else (BATCH, CONTEXT)
    params = model_params.init_params(lm.config, jax.random.key(0), jnp.dtype(lm.shape.dtype))
    for spec in SPECS:
        work = functools.partial(measure, lm, params, spec, batch, context)
        yield timing.attempt("decode step", (batch, context, lm.shape.layers), lm.shape.dtype, spec, work)
