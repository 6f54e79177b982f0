"""Layers predicted from the layer before: the decoder sees what the encoder saw, and prediction pays."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import deferred, ops
from kvjax.cache.plan import Plan
from kvjax.codecs.base import Context
from kvjax.codecs.predict import Predicted, predictors
from kvjax.generation import engine
from kvjax.policies import calibration, parse
from tests.toy import Toy, ragged, steps


def test_decode_built_equals_prefill_built_with_predictors(tmp_path):
    lm = Toy(layers=2)
    rng = np.random.default_rng(0)
    file = str(tmp_path / "p.safetensors")
    arrays = {
        "k.1.predict": rng.standard_normal((17, 16)) * 0.3,
        "v.1.predict": rng.standard_normal((33, 16)) * 0.3,
    }
    mark = calibration.fingerprint(lm.shape)
    calibration.save(file, {n: x.astype(np.float32) for n, x in arrays.items()}, mark)
    policy = parse(f"aqua_kv(calibration={file!r}, residual=8, sink=2, bits=4)")
    plan = Plan(policy, lm.shape, 2, 40, 8)
    params = lm.init()
    tokens, positions = ragged((40, 40), 40)
    _, whole = engine.prefill(lm, plan, params, tokens, positions)
    _, part = engine.prefill(lm, plan, params, tokens, np.where(positions < 30, positions, -1))
    inv = 10000.0 ** (-jnp.arange(4) / 4)
    # What prefill stored of the first tokens does not depend on how many followed.
    for layer in range(2):
        k, v, pos = deferred.decoded(plan, whole, layer, inv)
        k2, v2, pos2 = deferred.decoded(plan, part, layer, inv)
        first = np.asarray(pos[0, 0] < 20) & np.asarray(pos[0, 0] >= 2)
        assert first.sum() == 18
        np.testing.assert_array_equal(
            np.asarray(pos)[0, 0][first], np.asarray(pos2)[0, 0][: pos.shape[2]][first]
        )
        np.testing.assert_allclose(np.asarray(k)[:, :, first], np.asarray(k2)[:, :, first], atol=1e-5)
        np.testing.assert_allclose(np.asarray(v)[:, :, first], np.asarray(v2)[:, :, first], atol=1e-5)
    # Token by token, layer 1 encodes against the slots that layer 0 has just encoded.
    logits, grown = steps(lm, plan, params, part, np.asarray(tokens)[:, 30:])
    assert int(grown.layers[1].fill[0, 0]) == int(whole.layers[1].fill[0, 0]) == 30
    for layer in range(2):
        k, _, pos = deferred.decoded(plan, grown, layer, inv)
        k2, _, _ = deferred.decoded(plan, whole, layer, inv)
        late = np.asarray(pos[0, 0] >= 30)
        # The windows hold model dtype; hidden states differ by what decoding attended to.
        assert np.isfinite(np.asarray(k)).all() and late.sum() == 10
        assert np.linalg.norm(k[:, :, late] - k2[:, :, late]) < 0.5 * np.linalg.norm(k2[:, :, late])
    assert np.isfinite(np.asarray(logits)).all()


def test_zero_predictors_leave_the_plain_codec():
    rng = np.random.default_rng(0)
    k, v, pk, pv = (jnp.asarray(rng.standard_normal((1, 2, 16, 64)), jnp.float32) for _ in range(4))
    pos = jnp.broadcast_to(jnp.arange(16), (1, 2, 16))
    plain, odd = Predicted(3, 3), Predicted(3, 3, odd=True)
    const = {"k": jnp.zeros((129, 128)), "v": jnp.zeros((257, 128))}
    ctx = Context(pos=pos, head_dim=64, const=const, previous=(pk, pv))
    a, b = plain.encode(k, v, ctx), odd.encode(k, v, ctx)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    for x, y in zip(plain.decode(a, "float32", ctx), odd.decode(b, "float32", ctx)):
        np.testing.assert_array_equal(x, y)


def test_fitted_predictors_shrink_the_error_at_equal_bits():
    rng = np.random.default_rng(1)
    base = rng.standard_normal((1, 2, 500, 16))
    mix = rng.standard_normal((32, 32)) / 6
    flat = np.moveaxis(base, 1, 2).reshape(1, 500, 32) @ mix
    follow = np.moveaxis(flat.reshape(1, 500, 2, 16), 2, 1) + 0.1 * rng.standard_normal((1, 2, 500, 16))
    samples = {s: np.concatenate([base, follow]) for s in "kv"}
    found = predictors(samples, anchor_bits=4, bits=2)
    pos = jnp.broadcast_to(jnp.arange(500), (1, 2, 500))
    k, v = (jnp.asarray(samples[s][1][None], jnp.float32) for s in "kv")
    anchor = Predicted(2, 4)
    ctx = Context(pos=pos, head_dim=16)
    before = anchor.decode(
        anchor.encode(*(jnp.asarray(samples[s][0][None], jnp.float32) for s in "kv"), ctx), "float32", ctx
    )
    odd = Predicted(2, 4, odd=True)
    const = {s: jnp.asarray(found[f"{s}.1.predict"], jnp.float32) for s in "kv"}
    ctx = ctx.replace(previous=before, const=const)
    got = odd.decode(odd.encode(k, v, ctx), "float32", ctx)
    plain = Predicted(2, 2)
    other = plain.decode(plain.encode(k, v, ctx), "float32", ctx)
    for x, y, want in zip(got, other, (k, v)):
        assert jnp.linalg.norm(x - want) < 0.6 * jnp.linalg.norm(y - want)


def test_eviction_and_sliding_layers_are_refused():
    with pytest.raises(ValueError, match="does not compose with methods that evict"):
        Plan(parse("snapkv(budget=0.5) | aqua_kv(calibration=zero)"), Toy().shape, 1, 64, 8)
    with pytest.raises(ValueError, match="sliding windows"):
        Plan(parse("aqua_kv(calibration=zero)"), Toy(window=16).shape, 1, 64, 8)


def test_positions_of_the_view_are_not_needed():
    plan = Plan(parse("aqua_kv(calibration=zero, residual=8)"), Toy().shape, 1, 64, 8)
    assert ops.empty(plan).pools[0].pos is None
