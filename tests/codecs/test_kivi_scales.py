"""KIVI's scales: their dtype is what was asked for, and "auto" follows the platform of the plan."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvjax.cache.plan import Plan
from kvjax.policies import parse
from launch import aot
from pallas_kernels.decode_attention import decode_attention
from tests.toy import Toy

SHAPE = dataclasses.replace(Toy().shape, head_dim=64)
META = ("k_scale", "k_zero", "v_scale", "v_zero")


def stored(spec: str, platform: str) -> set[str]:
    """Dtypes of scales and zeros in every layer's pool."""
    plan = Plan(parse(spec), SHAPE, 2, 256, 8, platform=platform)
    return {pool.store[name].dtype for pool in plan.pool_specs for name in META}


def test_the_platform_decides_only_what_was_left_open():
    assert stored("kivi", "tpu") == {"bfloat16"}
    assert stored("kivi", "gpu") == stored("kivi", "cpu") == stored("kivi", "") == {"float16"}
    assert stored("kivi(scale_dtype=float16)", "tpu") == {"float16"}
    assert stored("kivi(scale_dtype=bfloat16)", "gpu") == {"bfloat16"}


def test_both_take_the_same_bytes():
    one, other = (Plan(parse("kivi"), SHAPE, 2, 256, 8, platform=p).nbytes() for p in ("tpu", "gpu"))
    assert one == other


def test_another_dtype_is_refused():
    with pytest.raises(
        ValueError, match=r"scale_dtype='float32'; choose one of \['auto', 'float16', 'bfloat16'\]"
    ):
        parse("kivi(scale_dtype=float32)")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 2])
def test_codes_are_rounded_with_the_scales_that_are_stored(dtype, bits):
    """Against float64 in numpy: keys per channel over 32 tokens, values per token over 32 channels, far from zero."""
    rng = np.random.default_rng(bits)
    k, v = (rng.normal(9.0, 1.0, (1, 2, 128, 64)).astype(np.float32) for _ in range(2))
    codec = parse(f"kivi(bits={bits}, scale_dtype={dtype})").codec
    store = codec.encode(jnp.asarray(k), jnp.asarray(v))
    assert {store[name].dtype for name in META} == {jnp.dtype(dtype)}
    have = codec.decode(store, "float32")
    short = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    want = []
    for x, shape, axis in ((k, (1, 2, 4, 32, 64), 3), (v, (1, 2, 128, 2, 32), 4)):
        x = x.astype(np.float64).reshape(shape)
        low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
        zero, scale = (a.astype(short).astype(np.float64) for a in (low, (high - low) / (2**bits - 1)))
        want.append((np.clip(np.rint((x - zero) / scale), 0, 2**bits - 1) * scale + zero).reshape(k.shape))
    for one, other in zip(have, want):
        wrong = np.abs(np.asarray(one) - other) > 1e-3  # a tie may round either way in float32
        assert wrong.mean() < 2e-3


def test_attention_reads_bfloat16_scales_as_they_are():
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(2.0, 1.0, (1, 2, 128, 64)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(1, 4, 1, 64)), jnp.float32)
    codec = parse("kivi(scale_dtype=bfloat16)").codec
    store = codec.encode(k, v)
    have = decode_attention(q, codec.kv_store(store), lengths=jnp.full((1, 2), 100, jnp.int32), scale=0.125)
    k64, v64 = (np.asarray(x, np.float64)[:, :, :100] for x in codec.decode(store, "float32"))
    logits = np.einsum("bhgd,bhsd->bhgs", np.asarray(q, np.float64).reshape(1, 2, 2, 64), k64) * 0.125
    p = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("bhgs,bhsd->bhgd", p / p.sum(-1, keepdims=True), v64).reshape(q.shape)
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.xdist_group("libtpu")
def test_a_tpu_step_holds_no_float16(monkeypatch):
    """What `launch.aot` compiles by default; with float16 scales the program names that dtype."""
    seen = {}

    def lowered(stage, topology, mesh, fn, args, **kwargs):
        dtypes = {x.dtype for x in jax.tree.leaves(args)}
        with jax.set_mesh(mesh):
            text = jax.jit(fn).lower(*args).as_text() if stage == "decode" else ""
        seen[stage] = (jnp.dtype("float16") in dtypes, "xf16>" in text)
        return {"stage": stage}

    monkeypatch.setattr(aot, "compile_stage", lowered)
    small = dict(batch=4, context=256, chunk=128)
    aot.model_rows("v5e:2x2", "kvref-22m", "kivi(bits=4)", **small)
    assert seen["decode"] == (False, False)
    aot.model_rows("v5e:2x2", "kvref-22m", "kivi(bits=4, scale_dtype='float16')", **small)
    assert seen["decode"] == (True, True)
