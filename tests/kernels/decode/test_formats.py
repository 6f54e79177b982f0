"""Storage formats: codes, bytes and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats
from pallas_kernels.merge_partials import merge_partials


@pytest.mark.parametrize("bits", [2, 4])
def test_pack_layout_and_inverse(bits):
    per, rng = 8 // bits, np.random.default_rng()
    codes = rng.integers(0, 2**bits, (3, 2 * 32 * per, 8)).astype(np.uint8)
    packed = np.asarray(formats.pack(jnp.asarray(codes), bits))
    assert packed.shape == (3, 64, 8)
    for block, row, field in np.ndindex(2, 32, per):
        slot = block * 32 * per + row + 32 * field
        want = packed[:, block * 32 + row] >> (bits * field) & (2**bits - 1)
        np.testing.assert_array_equal(want, codes[:, slot])
    np.testing.assert_array_equal(formats.unpack(jnp.asarray(packed), bits), codes)


@pytest.mark.parametrize("fmt", list(formats.PACKED_BITS))
@pytest.mark.parametrize("group", [32, 64])
def test_kivi_error_is_half_a_step(fmt, group):
    rng, levels = np.random.default_rng(), 2 ** formats.PACKED_BITS[fmt] - 1
    k, v = rng.standard_normal((2, 2, 3, 256, 64)).astype(np.float32) * 3
    k[:, :, :group, 5] = 1.25  # a constant group
    store = formats.encode(jnp.asarray(k), jnp.asarray(v), fmt, group=group, meta_dtype=jnp.float32)
    k_hat, v_hat = (np.asarray(x) for x in formats.decode(store))
    step_k = np.ptp(k.reshape(2, 3, -1, group, 64), axis=3) / levels
    step_v = np.ptp(v.reshape(2, 3, 256, -1, group), axis=4) / levels
    assert (np.abs(k - k_hat) <= np.repeat(step_k, group, 2) * 0.5001 + 1e-6).all()
    assert (np.abs(v - v_hat) <= np.repeat(step_v, group, 3) * 0.5001 + 1e-6).all()
    np.testing.assert_array_equal(k_hat[:, :, :group, 5], 1.25)


@pytest.mark.parametrize("fmt, limit", [("int8", 1e-2), ("fp8_e4m3", 4e-2), ("fp8_e5m2", 8e-2)])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_eight_bit_codes(fmt, limit, scale_dtype):
    x = np.random.default_rng().standard_normal((4, 100, 64)).astype(np.float32)
    x[0, 3] = 0
    codes, scale = formats.quantize_tokens(jnp.asarray(x), fmt, scale_dtype)
    assert codes.dtype.itemsize == 1 and scale.dtype == scale_dtype
    got = np.asarray(codes, np.float32) * np.asarray(scale, np.float32)[..., None]
    assert np.linalg.norm(got - x) / np.linalg.norm(x) < limit
    assert (got[0, 3] == 0).all()


@pytest.mark.parametrize("fmt", formats.FORMATS)
def test_bytes_equal_the_formula(fmt):
    k = jnp.zeros((2, 3, 256, 128), jnp.bfloat16)
    store = formats.encode(k, k, fmt, group=64)
    held = sum(x.nbytes for x in jax.tree.leaves(store))
    assert held == 2 * 3 * 256 * formats.bytes_per_slot(fmt, 128, group=64)
    bits = {"dense": 16, "int8": 8.25, "fp8_e4m3": 8.25, "fp8_e5m2": 8.25, "int4": 4.5, "int2": 2.5}[fmt]
    assert held == 2 * k.size * bits / 8


def test_encode_names_what_does_not_fit():
    k = jnp.zeros((1, 1, 96, 64))
    with pytest.raises(ValueError, match="unknown format 'int3'"):
        formats.encode(k, k, "int3")
    with pytest.raises(ValueError, match="96 slots"):
        formats.encode(k, k, "int4", group=32)
    with pytest.raises(ValueError, match="head_dim=64"):
        formats.encode(jnp.zeros((1, 1, 128, 64)), jnp.zeros((1, 1, 128, 64)), "int4", group=128)
    for group in (0, -32):
        with pytest.raises(ValueError, match=f"not whole groups of {group}"):
            formats.encode(jnp.zeros((1, 1, 128, 64)), jnp.zeros((1, 1, 128, 64)), "int4", group=group)


def test_merge_equals_attention_over_the_union():
    rng = np.random.default_rng()
    s, v = rng.standard_normal((3, 5, 40)) * 9, rng.standard_normal((40, 8))
    parts = [(0, 1), (1, 1), (1, 23), (23, 40)]
    outs, lses = [], []
    for lo, hi in parts:
        w = np.exp(s[..., lo:hi])
        outs.append(w @ v[lo:hi] / w.sum(-1, keepdims=True) if hi > lo else np.full((3, 5, 8), np.nan))
        lses.append(np.log(w.sum(-1)) if hi > lo else np.full((3, 5), -np.inf))
    outs, lses = [np.float32(x) for x in outs], [np.float32(x) for x in lses]
    want = np.exp(s) @ v / np.exp(s).sum(-1, keepdims=True)
    for args in ((outs, lses), (jnp.stack(outs), jnp.stack(lses))):
        out, lse = merge_partials(*args)
        np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(lse, np.log(np.exp(s).sum(-1)), rtol=2e-5, atol=2e-5)
    out, lse = merge_partials(
        [np.full((2, 8), np.nan, np.float32)] * 2, [np.full(2, -np.inf, np.float32)] * 2
    )
    assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()
    with pytest.raises(ValueError, match="2 outputs and 1 log-sum-exps"):
        merge_partials(outs[:2], lses[:1])
    with pytest.raises(ValueError, match="do not fit"):
        merge_partials(jnp.zeros((2, 3, 8)), jnp.zeros((2, 4)))
