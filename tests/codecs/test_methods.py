"""Every codec method end to end on one layer: exact once, equal however it was filled, attention over what it holds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codecs.harness import Layer, oracle
from tests.codecs.test_deferred import encoded_fields

# spec -> largest relative error of stored keys and values, measured on Gaussian data with outlier channels
SPECS = {
    "int4(group=16, residual=16, sink=2)": 0.13,
    "turboquant(bits=3, residual=16)": 0.22,
    "turboquant(bits=2.5, residual=8, rotation=hadamard, renormalise=True)": 0.32,
    "turboquant(bits=3, variant=prod, residual=16)": 0.5,
    "rotatekv(bits=4, sink=4, residual=16)": 0.2,
    "rotatekv(bits=4, sink=80)": 0.1,  # no window: the last sinks come while decoding, then single tokens are encoded
    "bfp(bits=4, block=16, residual=8)": 0.2,
    "gear(bits=4, group=32, residual=32)": 0.12,
    "zipcache(segment=20, residual=20, probes=8)": 0.4,
    "mikv(segment=20, residual=20, probes=8, high=16, group=16)": 0.5,
    "qaq(segment=32, residual=32)": 0.35,
    "vidkv(group=32, residual=32)": 0.75,
    "cq(bits=4, calibration=gaussian, residual=16)": 2.0,
}


@pytest.mark.parametrize("spec", SPECS)
def test_method(spec):
    tokens = 110
    layer = Layer(spec, tokens, (tokens, tokens))
    plan = layer.plan(tokens, 8)
    codec = plan.layers[0].policy.codec
    _, whole = layer.fill(plan, tokens)
    out, grown = layer.fill(plan, 72)
    first, second = encoded_fields(plan, whole), encoded_fields(plan, grown)
    assert int(whole.layers[0].fill[0, 0]) == codec.encoded(tokens) > 0
    if codec.scorer is None:  # saliency of a prompt and of decode steps is not the same
        for name, x in first.items():
            if np.issubdtype(x.dtype, np.integer):
                np.testing.assert_array_equal(x, second[name], err_msg=name)
            else:  # factors of a QR may differ in their last bits between two compilations
                np.testing.assert_allclose(np.float32(x), np.float32(second[name]), atol=2e-3, err_msg=name)
    k, v, pos = layer.stored(plan, grown)
    np.testing.assert_array_equal(np.sort(pos[pos >= 0].reshape(4, -1)), np.tile(np.arange(tokens), (4, 1)))
    want = oracle(layer.q[:, :, -1], k, v, pos, layer.dim**-0.5)
    np.testing.assert_allclose(np.asarray(out)[:, :, 0], want, atol=5e-4)
    exact_k, exact_v = np.asarray(layer.k), np.asarray(layer.v)
    for got, exact in ((k, exact_k), (v, exact_v)):
        ordered = np.stack(
            [
                [x[np.argsort(np.where(p < 0, 1 << 30, p))][:tokens] for x, p in zip(xs, ps)]
                for xs, ps in zip(got, pos)
            ]
        )
        assert np.linalg.norm(ordered - exact) / np.linalg.norm(exact) < SPECS[spec]
