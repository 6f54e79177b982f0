"""Saved caches come back bit for bit; those of another codec, model or a damaged file are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import checkpoint
from tests.codecs.harness import Layer


def saved(tmp_path, spec="int4(group=16, residual=4)"):
    layer = Layer(spec, 24, (24, 20))
    plan = layer.plan(24, 8)
    _, cache = layer.fill(plan, 24)
    checkpoint.save(tmp_path / "c", plan, cache, model="abc")
    return layer, plan, cache


@pytest.mark.parametrize("spec", ["int4(group=16, residual=4)", "fp8", "full"])
def test_round_trip_is_exact(tmp_path, spec):
    _, plan, cache = saved(tmp_path, spec)
    back = checkpoint.restore(tmp_path / "c", plan, model="abc")
    assert jax.tree.structure(back) == jax.tree.structure(cache)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(back)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_another_codec_model_or_layout_is_refused(tmp_path):
    layer, plan, cache = saved(tmp_path)
    with pytest.raises(ValueError, match="another model \\('abc'; this one is 'xyz'\\)"):
        checkpoint.restore(tmp_path / "c", plan, model="xyz")
    other = Layer("int4(group=32, residual=4)", 24, (24, 20)).plan(24, 8)
    with pytest.raises(ValueError, match="stored by another codec"):
        checkpoint.restore(tmp_path / "c", other, model="abc")
    with pytest.raises(ValueError, match="another layout"):
        checkpoint.restore(tmp_path / "c", layer.plan(24, 16), model="abc")
    with pytest.raises(ValueError, match="never overwritten"):
        checkpoint.save(tmp_path / "c", plan, cache, model="abc")
    with pytest.raises(ValueError, match="holds no saved cache"):
        checkpoint.restore(tmp_path / "nothing", plan)


def test_a_wrong_checksum_is_refused(tmp_path):
    _, plan, _ = saved(tmp_path)
    header = tmp_path / "c" / "kvjax_cache.json"
    header.write_text(header.read_text().replace('"checksum": "', '"checksum": "0'))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.restore(tmp_path / "c", plan, model="abc")


def test_values_that_are_not_finite_are_named():
    layer = Layer("int4(group=16, residual=4)", 24, (24, 24))
    plan = layer.plan(24, 8)
    layer.v = layer.v.at[0, 1, 3, 5].set(jnp.nan)
    _, cache = layer.fill(plan, 24)
    with pytest.raises(ValueError, match="layer 0, head 1: the stored v_"):
        checkpoint.check_finite(plan, cache)
    layer.v = layer.v.at[0, 1, 3, 5].set(0.0)
    checkpoint.check_finite(plan, layer.fill(plan, 24)[1])
