"""Attention mass against a float64 loop."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.observe import column_mass, column_reduce, window_mass, window_probs
from pallas_kernels.observe.reference import column_reduce_xla
from pallas_kernels.prefill_attention import prefill_attention
from tests.kernels.prefill.attention_oracle import (
    aligned_case,
    attention,
    fresh_rng,
    relative_error,
    scattered_case,
)

OPTIONS = [{}, {"window": 7}, {"softcap": 2.0}]


def jit(fn):
    """Compile `fn` with every argument static that is no array."""
    names = ("scale", "window", "softcap", "causal_aligned")
    return jax.jit(fn, static_argnames=[n for n in names if n in inspect.signature(fn).parameters])


def operands(case, dtype="float32"):
    q, k = (jnp.asarray(x, dtype) for x in (case.q, case.k))
    return q, k, dict(q_positions=jnp.asarray(case.q_positions), k_positions=jnp.asarray(case.k_positions))


def expected(case, q, k, scale):
    known = {n: x for n, x in case.options.items() if n != "causal_aligned"}
    return attention(q, k, case.v, case.q_positions, case.k_positions, scale=scale, **known)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-5), ("bfloat16", 1e-2)])
def test_window(options, dtype, tolerance):
    case = scattered_case(fresh_rng(), **options)
    q, k, positions = operands(case, dtype)
    probs = jit(window_probs)(q, k, **positions, scale=0.3, **options)
    _, _, want = expected(case, q, k, 0.3)
    assert probs.dtype == jnp.float32
    assert relative_error(probs, want) <= tolerance
    assert not np.asarray(probs)[0, :, case.q_positions[0] < 0].any(), "padded queries observe nothing"
    mass = jit(window_mass)(q, k, **positions, scale=0.3, **options)
    assert relative_error(mass, want.sum(2)) <= tolerance
    _, lse, _ = expected(case, q, k, 0.3)
    probs = jit(window_probs)(q, k, **positions, scale=0.3, lse=jnp.asarray(lse, jnp.float32), **options)
    assert relative_error(probs, want) <= tolerance


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_column_mass(options, with_lse):
    case = aligned_case(fresh_rng(), batch=3, lengths=[40, 23, 0], **options)
    q, k, positions = operands(case)
    lse = None
    if with_lse:
        v = jnp.asarray(case.v, jnp.float32)
        _, lse = prefill_attention(q, k, v, **positions, scale=0.3, return_lse=True, **case.options)
    mass = jit(column_mass)(q, k, **positions, scale=0.3, lse=lse, **case.options)
    _, _, want = expected(case, q, k, 0.3)
    assert relative_error(mass, want.sum(2)) <= 2e-5
    np.testing.assert_allclose(mass.sum(-1)[0], 40, rtol=1e-5)
    assert not np.asarray(mass)[2].any(), "a row without tokens"


@pytest.mark.parametrize("aligned", [False, True])
def test_column_reduce_over_many_blocks(aligned):
    """Squared mass and a count above a threshold, with blocks of 4 queries and a padded last block."""
    case = aligned_case(fresh_rng(), batch=2, q_heads=2, kv_heads=1, tokens=51, lengths=[51, 30])
    q, k, positions = operands(case)
    _, _, want = expected(case, q, k, 0.3)

    def both(probs, pos):
        above = jnp.where(pos[:, None, :, None] >= 0, probs > 0.05, False)
        return jnp.stack([(probs**2).sum(2), above.sum(2).astype(jnp.float32)])

    have = jax.jit(
        lambda q, k: column_reduce_xla(both, q, k, **positions, scale=0.3, causal_aligned=aligned, block_q=4)
    )(q, k)
    assert have.shape == (2, 2, 2, 51)
    assert relative_error(have[0], (want**2).sum(2)) <= 2e-5
    np.testing.assert_array_equal(have[1], (want > 0.05).sum(2))


def test_column_reduce_entry_point_sums_like_column_mass():
    case = scattered_case(fresh_rng())
    q, k, positions = operands(case)
    have = column_reduce(lambda probs, _: probs.sum(2), q, k, **positions, scale=0.3)
    np.testing.assert_allclose(have, column_mass(q, k, **positions, scale=0.3), rtol=1e-6)


def test_memory_is_linear_in_slots():
    """32k tokens: one head's [tokens, slots] matrix would be 4 GiB."""
    x = jax.ShapeDtypeStruct((1, 1, 32768, 64), jnp.float32)
    pos = jax.ShapeDtypeStruct((1, 32768), jnp.int32)
    lowered = jit(column_mass).lower(x, x, q_positions=pos, k_positions=pos, scale=1.0, causal_aligned=True)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 64 << 20


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(lse=(1, 4, 5)), "lse has shape"),
        (dict(k_positions=(1, 3, 6)), "k_positions has shape"),
        (dict(implementation="cuda"), "unknown implementation 'cuda'"),
    ],
    ids=str,
)
def test_bad_input(changes, message):
    kwargs = {n: jnp.zeros(s, jnp.float32 if n == "lse" else jnp.int32) if n != "implementation" else s
              for n, s in changes.items()}  # fmt: skip
    kwargs = {
        "q_positions": jnp.zeros((1, 4), jnp.int32),
        "k_positions": jnp.zeros((1, 6), jnp.int32),
        **kwargs,
    }
    with pytest.raises(ValueError, match="column_mass: .*" + message):
        column_mass(jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 2, 6, 8)), scale=1.0, **kwargs)
