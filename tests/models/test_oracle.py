"""Fresh random models of every family against transformers, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded

from models import checkpoint, decoder

pytestmark = pytest.mark.oracle
TOOL = Path(__file__).parents[2] / "tools" / "record_model_fixtures.py"


@pytest.fixture(scope="module")
def tool():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("record_model_fixtures", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", recorded.FAMILIES)
def test_a_fresh_model_equals_transformers(tool, tmp_path, name):
    tool.record_family(name, tmp_path, seed=1000)
    expected = np.load(tmp_path / name / "expected.npz")
    config = recorded.config_of(name)
    params = checkpoint.read_hf_params(tmp_path / name, config, jnp.dtype("float32"))
    ids = jnp.asarray(expected["ids"])[None]
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    run = jax.jit(decoder.forward, static_argnums=(1, 5))
    found, _ = run(params, config, ids, positions, None, decoder.causal_attend)
    assert recorded.relative_error(found[0], expected["logits"]) < 1e-4
