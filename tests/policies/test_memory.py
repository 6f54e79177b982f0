"""What a prefill holds beside the cache: never the attention of all queries on all keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies.registry import build, lookup
from tests.toy import Toy, ragged

LM = Toy(layers=3, q_heads=6, kv_heads=2, head_dim=64)
BATCH, TOKENS = 8, 2048
BLOCK = BATCH * LM.q_heads * 256 * TOKENS * 4  # f32 probabilities of 256 queries
ENTRIES = BATCH * LM.kv_heads * TOKENS * LM.head_dim * 4 * 2  # keys and values of one layer
TABLE = "((0.1, 0.2), (0.3, 0.4), (0.2, 0.1))"


@functools.cache
def peak(spec):
    """Bytes that XLA allocates for temporaries."""
    plan = Plan(P.parse(spec), LM.shape, BATCH, TOKENS, 64)
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    compiled = engine.prefill.lower(LM, plan, jax.eval_shape(LM.init), tokens, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("spec", "waiting"),
    [
        ("fastgen", 0),
        ("d2o", LM.layers),  # merging needs the entries of layers whose share is not known yet
        ("non_causal_attn", 0),
        ("taskkv", 0),
        ("block", 0),
        (f"headkv(heads={TABLE})", 0),
        (f"duoattention(heads={TABLE})", 0),
        ("pyramidkv", 0),
    ],
)
def test_peak_of_a_prefill(spec, waiting):
    assert peak(spec) <= peak("full") + BLOCK + ENTRIES + waiting * ENTRIES


@pytest.mark.parametrize(
    "name", ["headkv", "duoattention", "razorattention", "pyramidkv", "compresskv_layers"]
)
def test_layers_that_need_not_wait_keep_what_they_would_keep(name, monkeypatch):
    """Counts known ahead give the same cache, bit for bit, as counts after the last layer."""
    lm = Toy()
    plan = Plan(build(name, **lookup(name).tiny), lm.shape, 3, 40, 8, page_size=4)
    allocator = type(plan.policy.allocator)
    assert allocator.ahead
    tokens, positions = ragged((40, 29, 17), 40)
    run = lambda: engine.prefill.__wrapped__(lm, plan, lm.init(), tokens, positions)[1]  # noqa: E731
    early = jax.jit(lambda: run())()
    monkeypatch.setattr(allocator, "ahead", False)
    late = jax.jit(lambda: run())()
    assert jax.tree.structure(early) == jax.tree.structure(late)
    for x, y in zip(jax.tree.leaves(early), jax.tree.leaves(late)):
        np.testing.assert_array_equal(x, y)
