"""Suite `retrieval`: a decode step of a Llama-3.1-8B-shaped model that reads a tenth of a long cache, end to end.

The model and the columns are those of suite `generate`; the selectors' indexes are random like the entries.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from launch.bench_suites import generate, timing
from models import params as model_params

BATCH, CONTEXT = 8, 131072
SPECS = [
    "full",
    "quest(read=0.1, page=64, skip_layers=0)",
    "quest(read=0.1, page=16, skip_layers=0)",
    "quest(read=0.05, page=64, skip_layers=0)",
    "quest(read=0.1, page=64, skip_layers=0) | int8",
    "pqcache(read=0.065, parts=16, bits=4, recent=8)",
    "pqcache(read=0.08, parts=16, bits=4, recent=8, page=8)",
    "pqcache(read=0.065, parts=32, bits=4, recent=8, page=16)",
    "pqcache(read=0.035, parts=64, bits=4, recent=8, page=16)",
]


def rows() -> Iterator[generate.Row]:
    """Rows of the suite; a CPU runs one small shape."""
    cpu = jax.default_backend() == "cpu"
    lm = generate.small() if cpu else generate.model(generate.LAYERS)
    batch, context = (2, 2048) if cpu else (BATCH, CONTEXT)
    params = model_params.init_params(lm.config, jax.random.key(0), jnp.dtype(lm.shape.dtype))
    head = generate.head_seconds(lm, params, batch)
    for spec in SPECS:
        work = functools.partial(generate.measure, lm, params, spec, batch, context, head)
        yield timing.attempt("decode step", (batch, context, lm.shape.layers), lm.shape.dtype, spec, work)
