"""A calibration file belongs to one model: its shape and its weights. Every method that reads one says so."""

from __future__ import annotations

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.policies import calibration
from kvjax.types import ModelShape
from models import checkpoint
from models.lm import DecoderLM

SHIPPED = pathlib.Path(calibration.__file__).parents[2] / "models" / "calibration" / "kvref-22m"
SHAPE = ModelShape(12, 6, 2, 64, (None,) * 12)
SPECS = [
    "cq(bits=2)",
    "csr",
    "kvquant(calibration=shipped)",
    "kvtuner",
    "aqua_kv",
    "headkv",
    "headkv_r2",
    "duoattention",
    "razorattention",
    "duo_prefill",
    "lserve",
    "pq_refined(file='kvref-22m')",
    "pqcache | head_reads",
    "keydiff(budget=0.5) | compresskv_layers",
    f"qfilters(file='{SHIPPED}/queries.safetensors')",
    f"expected_attention(stats='{SHIPPED}/queries.safetensors')",
]


@pytest.fixture(scope="module")
def model():
    return checkpoint.load("kvref-22m", jnp.float32)


def specs(policy, shape):
    """The cache's arrays, calibration included."""
    plan = Plan(policy, shape, 1, 256, 8)
    for i, lp in enumerate(plan.layers):
        ops.context(plan, i, None, None)
        if lp.policy.scorer is not None:
            lp.policy.scorer.constants(i, shape)
    return plan.specs()


@pytest.mark.parametrize("spec", SPECS)
def test_files_of_other_weights_are_refused(spec, model):
    """The digest decides between models of one shape; a caller without a digest may use the file."""
    try:
        policy = P.parse(spec)
    except ValueError as e:
        pytest.fail(str(e))
    mine = dataclasses.replace(SHAPE, weights=model.fingerprint)
    want = specs(policy, SHAPE)
    assert specs(policy, mine) == want
    with pytest.raises(ValueError, match=r"another model|no calibration") as error:
        Plan(policy, dataclasses.replace(SHAPE, weights="0123456789ab"), 1, 256, 8)  # at once, before any use
    text = str(error.value)
    assert "\n" not in text and "0123456789ab" in text and "launch.calibrate" in text


def test_a_model_states_its_digest(model):
    """`DecoderLM` passes it on; other weights of the same architecture have another one."""
    lm = DecoderLM(model.config, "float32", model.fingerprint)
    assert calibration.fingerprint(lm.shape).endswith(f"weights={model.fingerprint}")
    assert calibration.fingerprint(DecoderLM(model.config).shape) == calibration.fingerprint(SHAPE)
    changed = dataclasses.replace(model.params, final_norm=model.params.final_norm * 2)
    other = checkpoint.fingerprint(model.config, changed)
    assert other != model.fingerprint
    file = str(SHIPPED / "heads.safetensors")
    found = calibration.load(file, calibration.fingerprint(lm.shape))
    np.testing.assert_array_equal(found["retrieval"], calibration.array(file, "retrieval"))
    with pytest.raises(ValueError, match=r"another model .*weights="):
        calibration.load(file, calibration.fingerprint(SHAPE, other))
