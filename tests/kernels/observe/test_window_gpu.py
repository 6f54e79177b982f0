"""Window mass on a Hopper GPU against a float64 loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.observe import gpu_window, window_mass
from tests.kernels.prefill.attention_oracle import attention, fresh_rng, relative_error, scattered_case

CASES = {
    "llama": dict(q_heads=8, kv_heads=2, tokens=32, slots=1024, dim=128),
    "odd sizes": dict(batch=3, q_heads=6, kv_heads=2, tokens=7, slots=333, dim=80),
    "one query, one tile": dict(q_heads=4, kv_heads=4, tokens=1, slots=64, dim=64),
    "wide heads": dict(q_heads=2, kv_heads=1, tokens=20, slots=200, dim=256),
    "many queries": dict(q_heads=2, kv_heads=2, tokens=128, slots=520, dim=128),
    "group of 16": dict(q_heads=16, kv_heads=1, tokens=16, slots=700, dim=128),
}


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_window_mass_on_hopper(name, options, dtype):
    case = scattered_case(fresh_rng(), **CASES[name], **options)
    q, k = (jnp.asarray(x, dtype) for x in (case.q, case.k))
    exact = [np.asarray(x).astype(np.float64) for x in (q, k)]
    scale = case.q.shape[-1] ** -0.5
    _, lse, want = attention(*exact, case.v, case.q_positions, case.k_positions, scale=scale, **case.options)
    call = jax.jit(functools.partial(window_mass, scale=scale, implementation="mosaic_gpu", **options))
    got = call(
        q,
        k,
        q_positions=jnp.asarray(case.q_positions),
        k_positions=jnp.asarray(case.k_positions),
        lse=jnp.asarray(lse, jnp.float32),
    )
    assert got.shape == want.sum(2).shape and got.dtype == jnp.float32
    assert relative_error(got, want.sum(2)) <= 2e-3


def test_the_kernel_says_what_it_needs():
    q, k = jnp.zeros((1, 4, 32, 128), jnp.bfloat16), jnp.zeros((1, 2, 256, 128), jnp.bfloat16)
    positions = dict(q_positions=jnp.zeros((1, 32), jnp.int32), k_positions=jnp.zeros((1, 256), jnp.int32))
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            window_mass(q, k, **positions, scale=1.0, implementation="mosaic_gpu")
    wide = jnp.zeros((1, 64, 64, 256), jnp.bfloat16)
    assert "shared memory" in gpu_window.unsupported(wide, wide[:, :1], lse=0, scale=1.0)
    assert "needs lse" in gpu_window.unsupported(q, k, lse=None, scale=1.0)
    assert gpu_window.unsupported(q, k, lse=0, scale=1.0) is None
