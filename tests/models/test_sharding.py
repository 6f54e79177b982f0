"""The logical axes partition every matrix: sharded logits equal the recorded ones; no weight is gathered."""

from __future__ import annotations

import collections
import re

import jax
import jax.numpy as jnp
import pytest
import recorded
from jax.sharding import NamedSharding, PartitionSpec

from models import decoder
from models.params import init_params, param_axes

RULES = {"vocab": "tensor", "q_heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def _sharding(mesh):
    return lambda axes, shape: NamedSharding(mesh, PartitionSpec(*(RULES.get(a) for a in axes)))


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=auto, devices=jax.devices()[:4])


@pytest.mark.parametrize("name", ["llama2", "gemma3", "mixtral"])
def test_tensor_parallel_equals_transformers(name, mesh):
    config, params, ids, logits = recorded.load(name)
    where = _sharding(mesh)
    params = jax.tree.map(lambda p, axes: jax.device_put(p, where(axes, p.shape)), params, param_axes(config))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tokens = jax.device_put(jnp.stack([jnp.asarray(ids)] * 2), rows)
    positions = jax.device_put(jnp.stack([jnp.arange(len(ids), dtype=jnp.int32)] * 2), rows)
    run = jax.jit(decoder.forward, static_argnums=(1, 5)).lower(
        params, config, tokens, positions, None, decoder.causal_attend
    )
    compiled = run.compile()
    found, _ = compiled(params, tokens, positions, None)
    for row in found:
        assert recorded.relative_error(row, logits) < 1e-4

    moved = re.findall(r"= (\w+)\[[\d,]*\]\S* (all-gather|all-reduce|all-to-all)\(", compiled.as_text())
    counts = collections.Counter(kind for _, kind in moved)
    if name != "mixtral":  # one sum for the embedding, one after attention and one after the MLP
        assert counts == {"all-reduce": 1 + 2 * config.layers}
    sizes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    weights = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(params)}
    assert not weights & set(sizes)


def test_random_weights_are_made_where_they_live(mesh):
    config = recorded.config_of("llama2")
    where = _sharding(mesh)
    params = init_params(config, jax.random.key(0), "float32", where)
    plain = init_params(config, jax.random.key(0), "float32")

    def check(found, expected, axes):
        assert found.sharding.is_equivalent_to(where(axes, found.shape), found.ndim)
        assert jnp.array_equal(jax.device_get(found), jax.device_get(expected))

    jax.tree.map(check, params, plain, param_axes(config))
