"""The suites `generate` and `policies`: what their rows say, on small shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import policies
from kvjax.cache.plan import Plan
from kvjax.types import ModelShape
from launch import bench
from launch.bench_suites import codecs, generate, retrieval, selection, timing
from launch.bench_suites import policies as suite
from models import params as model_params


@pytest.fixture(scope="module")
def small():
    lm = generate.small()
    return lm, model_params.init_params(lm.config, jax.random.key(0), jnp.float32)


def test_a_step_of_32_layers_is_the_head_once_and_the_layers_16_times(small):
    lm, params = small
    row = generate.measure(lm, params, "kivi(bits=4, group=64)", 2, 256, 1e-4)
    assert row["step_us"] == pytest.approx(100 + (row["us"] - 100) * 32 / 2)
    # 128 of 256 tokens wait in float32, the others take 4.5 bits an element; weights but the embedding.
    # The step reads one entry more than the prompt's 256 (the first token).
    elements = 2 * 2 * 2 * 2 * 128  # layers, k and v, rows, heads, channels
    cache = elements * (128 * 4.5 / 8 + 128 * 4)
    weights = sum(x.size for x in jax.tree.leaves(params)) - params.embedding.size
    assert row["gb_per_s"] * 1e9 * row["us"] * 1e-6 == pytest.approx(cache + 4 * weights, rel=0.01)
    assert row["append_us"] > 0


def test_the_loop_starts_from_full_caches_that_differ_by_row(small):
    lm, params = small
    loop = generate.open_loop(lm, params, "full", 2, 100)
    cache = loop.state.cache
    assert np.all(np.asarray(cache.length) == 100)
    for layer, pool in zip(cache.layers, cache.pools):
        assert np.all(np.asarray(layer.fill) == 100)
        k = np.asarray(pool.store["k"])[:, :, :100]
        assert 0.9 < k.std() < 1.1 and not np.array_equal(k[0], k[1])
    loop.run(3)
    assert np.all(np.asarray(loop.state.cache.length) == 103)


def test_policy_rows_time_the_cache_that_prefill_would_leave(small):
    lm, params = small
    tensors = [suite.inputs(lm, params, 128, i) for i in range(2)]
    assert not np.array_equal(tensors[0]["k"], tensors[1]["k"])
    plan = Plan(policies.parse("snapkv(budget=0.25, window=8)"), lm.shape, 1, 128, 16)
    assert suite.policy_seconds(plan, tensors) > 0
    row = suite.chunked(lm, params, "keydiff(budget=32)", 256, 64)
    capacity = 32 + suite._RESERVE
    assert row["cache_bytes"] == pytest.approx(2 * 2 * 2 * capacity * (128 * 4 + 2), rel=0.05)


def test_codec_rows_say_what_reads_the_codes(small, monkeypatch):
    monkeypatch.setattr(generate, "_STEPS", 2)
    lm, params = small
    got = {s: codecs.measure(lm, params, s, 1, 64) for s in ("full", "int8", "int4(group=16, residual=16)")}
    assert [row["attention"] for row in got.values()] == ["fused", "fused", "blocked"]
    full, eight, four = (row["cache_bytes"] for row in got.values())
    assert four < eight < 0.3 * full  # float32 here
    for spec in codecs.SPECS:
        # a plan refuses what does not fit the shape
        Plan(policies.parse(spec), codecs.model("bfloat16").shape, 1, 64, 16)


def test_a_policy_that_the_device_cannot_hold_does_not_end_the_suite(small, monkeypatch, capsys):
    lm, params = small

    def measure(lm, params, spec, batch, context):
        if spec == "int8":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore lines")
        return timing.row("decode step", (batch, context), "float32", spec, 1e-3)

    monkeypatch.setattr(codecs, "measure", measure)
    monkeypatch.setattr(codecs, "SPECS", ["full", "int8", "fp8"])
    rows = list(codecs.rows())
    assert [row["us"] for row in rows] == [pytest.approx(1000), None, pytest.approx(1000)]
    assert [row.get("error") for row in rows] == [None, "RESOURCE_EXHAUSTED: out of memory", None]
    assert "int8" in bench.table(rows)


@pytest.mark.parametrize("module", [selection, retrieval, suite, generate])
def test_every_policy_of_a_suite_fits_its_shapes(module):
    """A plan refuses what does not: calibration files of another model, groups that do not divide a head."""
    shape = ModelShape(1, *selection.HEADS, (None,), "bfloat16", 1024)
    for spec in module.SPECS:
        Plan(policies.parse(spec), shape, 1, 512, 64, page_size=64)
