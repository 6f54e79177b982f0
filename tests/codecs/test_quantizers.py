"""Properties of the building blocks, against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import dictionary, levels, mixed, packing, quantizers, transforms, wrappers
from kvjax.codecs.base import Context
from kvjax.codecs.calibrate_levels import weighted_levels
from kvjax.codecs.calibrate_precision import search
from kvjax.codecs.calibrate_vector import allocate, gaussian_cost, importance_basis, partitions
from kvjax.codecs.quantizers import Affine
from kvjax.policies import describe, parse


def data(shape=(2, 2, 64, 64), seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1])), jnp.float32)


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_exact_and_takes_its_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 40))
    packed = packing.pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, 5, 40 * bits // 8)
    np.testing.assert_array_equal(packing.unpack(packed, bits, 40), codes)


def test_codes_that_do_not_fill_bytes_are_refused():
    with pytest.raises(ValueError, match="12 codes of 3 bits do not fill whole bytes"):
        packing.pack(jnp.zeros((12,), jnp.int32), 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis, group", [("token", 16), ("token", 0), ("channel", 32)])
def test_affine_error_is_half_a_step(bits, axis, group):
    x = data()
    part = Affine(bits, group, axis, scale="float32", zero="float32")
    got = np.asarray(part.decode(part.encode(x), 64))
    y = np.asarray(x)
    if axis == "token":
        y = y.reshape(2, 2, 64, -1, group or 64)
        span = y.max(-1) - y.min(-1)
        step = np.repeat(span, group or 64, -1).reshape(x.shape) / (2**bits - 1)
    else:
        y = y.reshape(2, 2, -1, group, 64)
        step = np.repeat(y.max(3) - y.min(3), group, 2) / (2**bits - 1)
    assert np.all(np.abs(got - np.asarray(x)) <= step / 2 * (1 + 1e-4) + 1e-6)


@pytest.mark.parametrize(
    "part",
    [
        Affine(2), Affine(4, 16, "channel"), Affine(4, symmetric=True), Affine(2, scale="float8_e4m3fn", zero="int8"),
        levels.Gaussian(3), levels.Table(3), levels.BlockFloat(), levels.Sign(), levels.Sign(True), quantizers.Scaled(),
        wrappers.Outliers(Affine(2), 1), wrappers.LowRank(Affine(2), 2, 32), wrappers.ChannelScaled(Affine(2), 32),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_groups_do_not_divide_by_zero(part, value):
    x = jnp.full((1, 2, 64, 64), value)
    got = part.decode(part.encode(x), 64)
    assert np.all(np.isfinite(got))
    # One level is the mean of |x|, and Gaussian levels need two different coordinates to be exact.
    exact = not isinstance(part, levels.Gaussian | levels.BlockFloat) or value == 0
    if exact:
        np.testing.assert_allclose(got, x, atol=0.5 / 15 if value else 1e-6)


@pytest.mark.parametrize("dim", [64, 128])
def test_rotations_keep_dot_products_and_invert(dim):
    q, k = data((1, 4, 7, dim), 1), data((1, 4, 9, dim), 2)
    want = np.einsum("bhqd,bhkd->bhqk", np.asarray(q, np.float64), np.asarray(k, np.float64))
    for matrix in (transforms.hadamard_matrix(dim), transforms.haar_matrix(dim)):
        a, b = transforms.turn(q, matrix), transforms.turn(k, matrix)
        np.testing.assert_allclose(np.einsum("bhqd,bhkd->bhqk", a, b), want, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(transforms.turn(a, matrix, inverse=True), q, atol=1e-4)
    with pytest.raises(ValueError, match="power of two"):
        transforms.hadamard_matrix(96)


def test_rope_inverts_at_positions_to_128k():
    x = data((1, 2, 5, 64))
    pos = jnp.asarray([0, 1, 32768, 65537, 131071])[None, None]
    inv = jnp.asarray(1e4 ** (-np.arange(32) / 32), jnp.float32)
    turned = transforms.rope(x, pos, inv)
    np.testing.assert_allclose(transforms.rope(turned, pos, inv, inverse=True), x, atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_real_fft_is_orthonormal():
    x = data((2, 3, 4, 64))
    y = mixed.real_fft(x)
    spectrum = np.fft.rfft(np.asarray(x, np.float64), axis=-1, norm="ortho")
    pairs = 2**0.5 * np.stack([spectrum.real, spectrum.imag], axis=-1)[..., 1:-1, :]
    np.testing.assert_allclose(y[..., 2:], pairs.reshape(*x.shape[:-1], -1), atol=1e-4)
    np.testing.assert_allclose(y[..., :2], spectrum.real[..., [0, -1]], atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(mixed.inverse_real_fft(y), x, atol=1e-4)


@pytest.mark.parametrize("bits, error", [(1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_lloyd_max_reaches_the_published_error(bits, error):
    x = np.random.default_rng(0).standard_normal(200_000)
    table = np.asarray(levels.lloyd_max(bits))
    owner = np.asarray(levels.nearest(jnp.asarray(x, jnp.float32), jnp.asarray(table, jnp.float32)))
    assert np.mean((x - table[owner]) ** 2) == pytest.approx(error, rel=0.02)


def test_sign_residual_is_unbiased():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((1, 1, 1, 64)), jnp.float32) for _ in range(2))
    found = []
    for seed in range(300):
        part = wrappers.SignResidual(wrappers.Rotated(levels.Gaussian(1, False), "haar", seed), seed)
        found.append(float(jnp.sum(y * part.decode(part.encode(x), 64))))
    want = float(jnp.sum(x * y))
    assert abs(np.mean(found) - want) < 4 * np.std(found) / np.sqrt(len(found))


def test_outliers_are_exact_and_leave_the_range():
    x = data().at[..., 5].set(100.0).at[..., 9].set(-80.0)
    part = wrappers.Outliers(Affine(4), 1)
    got = part.decode(part.encode(x), 64)
    np.testing.assert_array_equal(got[..., 5], x[..., 5])
    np.testing.assert_array_equal(got[..., 9], x[..., 9])
    plain = Affine(4)
    assert jnp.linalg.norm(got - x) < 0.5 * jnp.linalg.norm(plain.decode(plain.encode(x), 64) - x)


def test_low_rank_reduces_the_error_and_full_rank_removes_it():
    x = data((1, 2, 64, 16))
    inner = Affine(2)
    before = jnp.linalg.norm(inner.decode(inner.encode(x), 16) - x)
    errors = []
    for rank in (1, 4, 16):
        part = wrappers.LowRank(inner, rank, 32)
        errors.append(float(jnp.linalg.norm(part.decode(part.encode(x), 16) - x)))
    assert before > errors[0] > errors[1] > errors[2]
    assert errors[2] < 5e-3 * float(jnp.linalg.norm(x))


def test_tiers_give_salient_tokens_the_first_quantizer():
    x = data((1, 2, 40, 64))
    saliency = jnp.asarray(np.random.default_rng(3).random((1, 2, 40)), jnp.float32)
    part = wrappers.Tiers(((6, quantizers.Cast("float32")), (14, Affine(2))), 20)
    got = np.asarray(part.decode(part.encode(x, Context(saliency=saliency)), 64))
    for h in range(2):
        for s in range(0, 40, 20):
            top = s + np.argsort(-np.asarray(saliency)[0, h, s : s + 20])[:6]
            exact = np.all(got[0, h, s : s + 20] == np.asarray(x)[0, h, s : s + 20], axis=-1)
            assert set(s + np.flatnonzero(exact)) == set(top)


def test_ternary_of_ternary_data_is_exact():
    x = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (1, 1, 32, 64)) * 0.75, jnp.float32)
    part = levels.Sign(True, 32)
    np.testing.assert_allclose(part.decode(part.encode(x), 64), x, atol=1e-3)


def test_block_float_error_is_half_a_step():
    x = data()
    y = np.asarray(x).reshape(2, 2, 64, -1, 32)
    step = 2.0 ** (np.floor(np.log2(np.abs(y).max(-1, keepdims=True))) - 2)
    part = levels.BlockFloat()
    error = np.abs(np.asarray(part.decode(part.encode(x), 64)).reshape(y.shape) - y)
    assert np.all((error <= step / 2 + 1e-6) | (np.abs(y) > 7.5 * step))


def test_split_channels_is_a_partition_by_range():
    x = data((1, 1, 32, 64))
    part = mixed.SplitChannels(Affine(2, 32, "channel"), levels.Sign(False, 32), 0.5, 32)
    store = part.encode(x)
    order = np.asarray(store["order"])[0, 0, 0]
    assert sorted(order) == list(range(64))
    span = np.ptp(np.asarray(x)[0, 0], axis=0)
    assert span[order[:32]].min() >= span[order[32:]].max()


def test_matching_pursuit_loses_exactly_the_coefficients_energy():
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((2, 50, 16))
    atoms = jnp.asarray(atoms / np.linalg.norm(atoms, axis=-1, keepdims=True), jnp.float32)
    x = data((1, 2, 9, 16))
    _, value, rest = dictionary.pursue(x, atoms, 5)
    np.testing.assert_allclose(
        jnp.sum(x * x, -1) - jnp.sum(value * value, -1), jnp.sum(rest * rest, -1), rtol=1e-3, atol=1e-4
    )
    index, value, rest = dictionary.pursue(atoms[None, :, 7:8], atoms, 1)
    assert np.all(np.asarray(index) == 7) and np.allclose(value, 1) and np.allclose(rest, 0, atol=1e-6)


def test_importance_basis_turns_the_cost_into_a_squared_error():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((12, 12))
    x, g = rng.standard_normal((4000, 12)) @ mix, rng.standard_normal((4000, 12)) @ mix.T
    mean, into, back, spectrum = importance_basis(x, g, ridge=0.0)
    y = (x - mean) @ into
    np.testing.assert_allclose(y @ back + mean, x, atol=1e-6)
    np.testing.assert_allclose(y.T @ y / len(y), np.diag(spectrum), atol=1e-6 * spectrum[0])
    e = rng.standard_normal((5, 12))
    want = np.mean((e @ g.T) ** 2, axis=1)
    np.testing.assert_allclose(np.sum((e @ into) ** 2, axis=1), want, rtol=1e-6)


def test_codes_go_where_they_save_most():
    assert gaussian_cost(np.array([4.0, 4.0]), 2) == pytest.approx(2 * 4.0 / 4)
    assert gaussian_cost(np.array([100.0, 1e-6]), 1) == pytest.approx(25.0, rel=1e-3)
    cost, sizes = partitions(np.array([16.0, 4.0, 1.0, 0.25]), 2, 4)
    assert np.all(np.diff(cost) < 0) and all(sum(s) == 4 for s in sizes)
    counts = allocate([np.array([9.0, 4, 2, 1]), np.array([90.0, 40, 20, 10])], 4)
    assert counts == [1, 3]


def test_precision_search_respects_the_cap():
    costs = np.zeros((2, 2, 3))
    costs[..., 0], costs[..., 1] = 1.0, 0.1
    costs[1, 0] = [100.0, 50.0, 0.0]
    bits = search(costs, 4.5)
    assert bits.mean() <= 4.5 and bits[1, 0] == 8
    with pytest.raises(ValueError, match="below the least choice"):
        search(costs, 1.5)


def test_weighted_levels_find_clusters():
    x = np.concatenate([np.full(50, -1.0), np.full(5, 0.2), np.full(50, 2.0)])
    np.testing.assert_allclose(weighted_levels(x, np.ones_like(x), 3), [-1, 0.2, 2], atol=1e-9)


def test_described_bits_include_metadata():
    assert describe("kivi").bits_per_element == 4 + 32 / 32
    assert describe("int4").bits_per_element == 4 + 32 / 32
    assert describe("turboquant").bits_per_element == 3 + 16 / 128
    assert describe("rotatekv").bits_per_element == 2 + 16 / 128
    assert describe("bfp").bits_per_element == 4 + 8 / 32
    assert parse("csr(terms=8)").codec.bits_per_element(128, "bfloat16") == 2.0


@pytest.mark.parametrize(
    "spec, match",
    [
        ("turboquant(variant=other)", "mse or prod"),
        ("gear(group=64, residual=32)", "larger than the residual window"),
        ("bfp(block=48)", "not whole blocks"),
        ("vidkv(k_bits=3)", r"\[1, 2\]"),
        ("kvquant(bits=5)", "2, 3 or 4"),
        ("csr(terms=3)", "even"),
        ("cq(bits=1)", "no calibration 'cq' for this model"),
        ("kvtuner(pairs=((3, 4),))", "of 2, 4 or 8"),
        ("qaq(shares=(0.5, 0.1, 0.1))", "add up to 1"),
    ],
)
def test_bad_input_is_named(spec, match):
    from tests.codecs.harness import Layer

    with pytest.raises(ValueError, match=match):
        _ = Layer(spec, 8, (8,)).plan(8, 8).layers
