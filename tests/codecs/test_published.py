"""What the published methods promise of their codes, against numpy: error bounds, nearest codewords, limits of tiers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import levels, quantizers, vector, wrappers
from kvjax.codecs.base import Context
from kvjax.codecs.quantizers import Affine
from kvjax.policies import parse
from kvjax.types import ModelShape
from tests.codecs.harness import Layer
from tests.codecs.test_quantizers import data


def codec(spec, dim=64, heads=2, layers=1):
    """(the codec of the first layer, its constants as `Context.const`)."""
    shape = ModelShape(layers, 2 * heads, heads, dim, (None,) * layers)
    found = parse(spec).codec.for_layer(0, shape)
    return found, {n: jnp.asarray(x) for n, x in found.constants(0, shape).items()}


def test_zipcache_values_err_by_half_a_step_of_their_channel():
    """|V - V'| <= a_c s_t / 2 with a_c = sqrt(max_t |V_tc|) of the segment, s_t the step of V / a in token t."""
    x = data((1, 2, 40, 64))
    part = wrappers.ChannelScaled(Affine(3, scale="float32", zero="float32"), 20)
    got = np.asarray(part.decode(part.encode(x), 64), np.float64)
    x = np.asarray(x, np.float64)
    a = np.repeat(np.sqrt(np.abs(x).reshape(1, 2, 2, 20, 64).max(3)), 20, axis=2)
    step = np.ptp(x / a, axis=-1, keepdims=True) / 7
    assert (np.abs(got - x) <= a * step / 2 * (1 + 5e-3)).all()  # a is stored in float16
    assert np.abs(got - x).max() > 0.2 * (a * step).max()


@pytest.mark.parametrize("axis, group", [("token", 0), ("token", 16), ("channel", 8), ("static", 0)])
def test_kvquant_codes_are_the_nearest_levels(axis, group):
    """Inliers land on the nearest of level r + z; outliers come back as float16."""
    x = data((1, 2, 16, 64), 3)
    table = np.sort(np.random.default_rng(1).uniform(-1, 1, 8))
    table[[0, -1]] = -1, 1
    part = levels.Table(3, group, axis, tuple(table))
    y, const = np.asarray(x, np.float64), {}
    if axis == "static":
        centre, half = np.median(y, axis=2)[0], np.quantile(np.abs(y), 0.95, axis=2)[0]
        const = {"centre": jnp.asarray(centre, jnp.float32), "half": jnp.asarray(half, jnp.float32)}
        z, r = centre[None, :, None], half[None, :, None]
    else:
        split, at = (
            (y.reshape(1, 2, 2, 8, 64), 3) if axis == "channel" else (y.reshape(1, 2, 16, -1, group or 64), 4)
        )
        low, high = split.min(at, keepdims=True), split.max(at, keepdims=True)
        z, r = (
            np.broadcast_to(s, split.shape).reshape(y.shape) for s in ((low + high) / 2, (high - low) / 2)
        )
    every = z[..., None] + r[..., None] * table
    want = np.abs(every - y[..., None]).min(-1)

    def error(quantizer, const):
        ctx = Context(const=const)
        return np.abs(np.asarray(quantizer.decode(quantizer.encode(x, ctx), 64, ctx), np.float64) - y)

    np.testing.assert_allclose(error(part, const), want, atol=4e-3 * np.abs(y).max())
    if axis == "static":
        both = wrappers.Outliers(part, 2)
        got, order = error(both, {f"dense_{n}": c for n, c in const.items()}), np.argsort(y, axis=-1)
        out = np.zeros(y.shape, bool)
        np.put_along_axis(out, np.concatenate([order[..., :2], order[..., -2:]], axis=-1), True, axis=-1)
        assert (got[out] <= np.abs(y[out]) * 2**-11).all()
        np.testing.assert_allclose(got[~out], want[~out], atol=4e-3 * np.abs(y).max())


def test_outliers_of_equal_entries_are_different_places():
    x = jnp.zeros((1, 1, 2, 16)).at[0, 0, 0, 5].set(1.0)
    part = wrappers.Outliers(Affine(4), 3)
    store = part.encode(x)
    assert all(len(set(row)) == 6 for row in np.asarray(store["at"])[0, 0])
    np.testing.assert_allclose(part.decode(store, 16), x, atol=1e-6)


@pytest.mark.parametrize("sizes", [(8,) * 4, (3, 5, 7, 17)])
def test_cq_takes_the_nearest_codeword_of_every_group(sizes):
    rng, dim = np.random.default_rng(0), sum(sizes)
    part = vector.Vector(bits=4, sizes=sizes)
    into = np.linalg.qr(rng.standard_normal((2, dim, dim)))[0]
    const = {"mean": rng.standard_normal((2, dim)), "into": into, "back": np.swapaxes(into, 1, 2)}
    const["book"] = rng.standard_normal((2, 16, dim))
    ctx = Context(const={n: jnp.asarray(x, jnp.float32) for n, x in const.items()})
    x = rng.standard_normal((1, 2, 9, dim))
    got = np.asarray(part.decode(part.encode(jnp.asarray(x, jnp.float32), ctx), dim, ctx), np.float64)
    turned = np.einsum("bhnd,hde->bhne", x - const["mean"][:, None], into)
    want = np.zeros_like(turned)
    for at, size in zip(np.cumsum((0, *sizes)), sizes):
        part_x, words = turned[..., at : at + size], const["book"][..., at : at + size]
        away = ((part_x[..., None, :] - words[None, :, None]) ** 2).sum(-1)  # [b, h, n, words]
        want[..., at : at + size] = np.take_along_axis(
            words[None, :, None], away.argmin(-1)[..., None, None], 3
        )[..., 0, :]
    want = np.einsum("bhne,hed->bhnd", want, const["back"]) + const["mean"][:, None]
    np.testing.assert_allclose(got, want, atol=1e-4)
    again = part.decode(part.encode(jnp.asarray(got, jnp.float32), ctx), dim, ctx)
    np.testing.assert_allclose(again, got, atol=1e-4)  # codewords are their own codes


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("offset", [0.0, 40.0, -40.0])
def test_an_integer_zero_keeps_half_a_step(bits, offset):
    """KVTuner's and RotateKV's zero is a multiple of the step; far from 0 the step grows until it fits a byte."""
    x = data((1, 2, 8, 64), 1) * 0.1 + offset
    part = Affine(bits, 16, scale="float32", zero="int8")
    got = np.asarray(part.decode(part.encode(x), 64))
    y = np.asarray(x).reshape(1, 2, 8, 4, 16)
    step = np.maximum(np.ptp(y, axis=-1) / (2**bits - 1), np.abs(y.min(-1)) / 112)
    assert (np.abs(got - np.asarray(x)) <= np.repeat(step, 16, -1) / 2 * (1 + 1e-4) + 1e-5).all()


def test_gear_rounds_values_over_groups_of_channels():
    """At head_dim 128 the 2-bit backbone has two groups a token: the large half does not coarsen the small one."""
    found, _ = codec("gear(rank=0, outliers=0)", dim=128)
    x = data((1, 2, 64, 128)).at[..., :64].multiply(50.0)
    store = found.encode(x, x)
    assert store["v_scale"].shape == (1, 2, 64, 2) and store["k_scale"].shape == (1, 2, 1, 128)
    v = np.asarray(found.decode(store, "float32", Context(head_dim=128))[1])
    step = np.ptp(np.asarray(x)[..., 64:], axis=-1, keepdims=True) / 3
    assert (np.abs(v - np.asarray(x))[..., 64:] <= step / 2 * 1.01 + 1e-3).all()


def test_one_tier_is_its_quantizer():
    """MiKV, ZipCache, QAQ and ARKV at a share of 0 or 1."""
    x, saliency = data((1, 2, 40, 64)), jnp.asarray(np.random.default_rng(0).random((1, 2, 40)), jnp.float32)
    ctx = Context(saliency=saliency)
    for count, rest in ((20, 0), (0, 20)):
        part = wrappers.Tiers(((count, Affine(2)), (rest, Affine(2))), 20)
        np.testing.assert_array_equal(
            part.decode(part.encode(x, ctx), 64), Affine(2).decode(Affine(2).encode(x), 64)
        )
    exact = parse("mikv(high=16, ratio=1.0, segment=20, residual=20)").codec
    k, v = (np.asarray(y) for y in exact.decode(exact.encode(x, x, ctx), "float32", Context(head_dim=64)))
    np.testing.assert_allclose(v, x, rtol=2**-8)
    np.testing.assert_allclose(k, x, rtol=2**-7)  # divided by the balancer before it is stored
    for ratio, bits in ((0.0, 2), (1.0, 8)):
        part = parse(f"mikv(ratio={ratio}, segment=20, residual=20, group=32)").codec
        v = part.decode(part.encode(x, x, ctx), "float32", Context(head_dim=64))[1]
        np.testing.assert_array_equal(v, Affine(bits, 32).decode(Affine(bits, 32).encode(x), 64))


def test_qaq_errors_fall_with_saliency_and_outliers_are_exact():
    x, ctx = data((1, 1, 64, 64)), Context(saliency=jnp.arange(64.0)[None, None], head_dim=64)
    found = parse("qaq(segment=64)").codec
    v = np.asarray(found.decode(found.encode(x, x, ctx), "float32", ctx)[1])
    error, y = np.abs(v - np.asarray(x))[0, 0], np.asarray(x)[0, 0]
    tiers = [error[slice(*at)].mean() for at in ((48, 64), (32, 48), (0, 32))]  # 4, 3 and 2 bits
    assert 1.7 < tiers[1] / tiers[0] < 3 and 1.7 < tiers[2] / tiers[1] < 3
    for at in (y.argmin(-1), y.argmax(-1)):
        assert (error[np.arange(64), at] <= np.abs(y[np.arange(64), at]) * 2**-11).all()


def test_bfp_of_one_block_does_not_depend_on_the_order_of_channels():
    x, order = data((1, 2, 8, 64)), np.random.default_rng(0).permutation(64)
    part = levels.BlockFloat(4, 64)
    straight, mixed = part.decode(part.encode(x), 64), part.decode(part.encode(x[..., order]), 64)
    np.testing.assert_array_equal(mixed, straight[..., order])
    split = levels.BlockFloat(4, 16)
    assert jnp.any(
        split.decode(split.encode(x[..., order]), 64) != split.decode(split.encode(x), 64)[..., order]
    )


@pytest.mark.parametrize("bits, error", [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_turboquant_reaches_the_published_error(bits, error):
    found, const = codec(f"turboquant(bits={bits})", dim=128)
    x = data((1, 2, 256, 128))
    got = found.decode(
        found.encode(x, x, Context(const=const)), "float32", Context(const=const, head_dim=128)
    )
    for y in got:
        lost = jnp.sum((y - x) ** 2, -1) / jnp.sum(x**2, -1)
        assert float(jnp.mean(lost)) == pytest.approx(error, rel=0.05)


def test_quantized_pruning_that_keeps_all_is_the_quantizer():
    layer = Layer("quantized_pruning(budget=1.0)", 40, (40, 40))
    k, v, pos = layer.stored(layer.plan(40, 8), layer.fill(layer.plan(40, 8), 40)[1])
    part = Affine(4, 64)
    for got, exact in ((k, layer.k), (v, layer.v)):
        want = np.asarray(part.decode(part.encode(exact), 64))
        for b, h in np.ndindex(2, 2):
            np.testing.assert_array_equal(got[b, h][pos[b, h] >= 0], want[b, h][pos[b, h][pos[b, h] >= 0]])


def test_arkv_holds_every_kept_token_in_one_state_and_the_window_exactly():
    layer = Layer("arkv(budget=40, window=8, segment=16, origin=0.25)", 60, (60, 60), dtype="bfloat16")
    plan = layer.plan(60, 8)
    k, _, pos = layer.stored(plan, layer.fill(plan, 60)[1])
    exact = np.asarray(layer.k, np.float64)
    for b, h in np.ndindex(2, 2):
        kept = pos[b, h][pos[b, h] >= 0]
        assert len(kept) == len(set(kept)) == 40 and set(range(52, 60)) <= set(kept)
        got, want = k[b, h][pos[b, h] >= 0], exact[b, h][kept]
        same = (got == want).all(-1)
        limit = np.maximum(np.abs(want) * 2**-4, np.abs(want).max(-1, keepdims=True) * 2**-15)
        assert (np.abs(got - want) <= limit * 1.02).all()
        assert same[kept >= 52].all()
        encoded = plan.layers[0].policy.codec.encoded(40)
        assert encoded > 0 and (~same).sum() == encoded * 3 // 4


def test_casts_keep_their_relative_error_and_scale():
    """fp8: 2^-4 and 2^-3 in the normal range; a power of two in front changes nothing but the scale."""
    x = data((1, 2, 32, 64))
    for spec, limit in (("fp8", 2**-4), ("fp8(format='e5m2')", 2**-3)):
        found = parse(spec).codec
        got = np.asarray(found.decode(found.encode(x, x), "float32")[0])
        y = np.asarray(x)
        normal = np.abs(y) > np.abs(y).max(-1, keepdims=True) * 2.0**-13
        assert (np.abs(got - y) <= np.abs(y) * limit * 1.001)[normal].all()
        large = np.asarray(found.decode(found.encode(x * 8, x), "float32")[0])
        np.testing.assert_array_equal(large, got * 8)
    scaled = quantizers.Scaled()
    assert (
        np.abs(np.asarray(scaled.decode(scaled.encode(x), 64)) - np.asarray(x)) <= np.abs(x) * 2**-4 + 1e-2
    ).all()
