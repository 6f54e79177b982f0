"""One rules table from logical axes to mesh axes: specs, shardings and the mesh parser."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

import kvjax.policies as P
from kvjax import sharding
from kvjax.arrays import ArraySpec, abstract, init, nbytes
from kvjax.cache.plan import Plan
from tests.toy import Toy


def mesh(**sizes):
    return sharding.make_mesh(sizes, jax.devices())


def test_cache_shardings_follow_the_logical_axes():
    plan = Plan(P.parse("full"), Toy().shape, 4, 56, 8)
    got = sharding.shardings(plan.specs(), mesh(data=2, sequence=2, tensor=2))
    pool = got.pools[0]
    assert pool.store["k"].spec == Spec("data", "tensor", "sequence", None)
    assert pool.pos.spec == Spec("data", "tensor", "sequence")
    assert got.layers[0].fill.spec == Spec("data", "tensor")
    assert got.length.spec == Spec("data")
    cache = jax.tree.map(jax.device_put, init(plan.specs()), got)
    assert cache.pools[0].store["k"].addressable_shards[0].data.shape == (2, 1, 32, 8)


def test_pages_spread_over_every_axis_and_odd_sizes_are_replicated():
    specs = {"pool": ArraySpec((16, 4, 8), "float32", ("pages", "page_slots", "head_dim"))}
    spec = sharding.shardings(specs, mesh(data=2, tensor=4))["pool"].spec
    assert spec == Spec(("data", "tensor"), None, None)
    odd = {"k": ArraySpec((3, 2, 8), "float32", ("batch", "kv_heads", "slots"))}
    assert sharding.shardings(odd, mesh(data=2, tensor=4))["k"].spec == Spec(None, None, None)


def test_a_mesh_axis_is_used_once_per_array():
    assert sharding.DEFAULT_RULES.spec(("kv_heads", "mlp"), ("tensor",)) == Spec("tensor", None)


def test_specs_give_abstract_values_bytes_and_arrays():
    specs = {"a": ArraySpec((3, 5), "int4", (None, None)), "b": ArraySpec((2,), "int32", (None,), fill=-1)}
    assert nbytes(specs) == 8 + 8  # 15 nibbles, two words
    assert abstract(specs)["b"].shape == (2,) and np.asarray(init(specs)["b"]).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("tenser=2", "'tenser' is unknown"), ("tensor=0", "AXIS=SIZE"), ("tensor=2,tensor=2", "AXIS=SIZE")],
)
def test_bad_mesh_flags(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.parse_mesh(text)


def test_a_mesh_needs_its_devices():
    with pytest.raises(ValueError, match="needs 16 devices, 8 are present"):
        mesh(data=16)
