"""Attention on a mesh: every device works on its own rows and heads, and nothing is exchanged."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kvjax import sharded_kernels
from pallas_kernels import formats
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention

DATA, BOTH = PartitionSpec("data"), PartitionSpec("data", "tensor")


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=kinds, devices=jax.devices()[:4])


def normal(*shape):
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def on_mesh(mesh, fn, args, specs):
    """Run jitted `fn` with `args` placed by `specs`; the result and the exchanges in the compiled program."""
    args = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), part),
        specs, args, is_leaf=lambda x: isinstance(x, PartitionSpec),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        compiled = jax.jit(fn).lower(*args).compile()
        exchanges = re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text())
        return compiled(*args), exchanges


@pytest.mark.parametrize("fmt", ["dense", "int8", "int4"])
def test_decode(mesh, fmt):
    q, (k, v) = normal(4, 4, 1, 64), (normal(4, 2, 128, 64) for _ in range(2))
    store = formats.encode(k, v, fmt, group=32)
    lengths = jnp.asarray([[128, 64], [0, 1], [77, 128], [5, 99]], jnp.int32)
    options = dict(scale=0.2, return_lse=True, return_mass=True)
    want = jax.jit(functools.partial(decode_attention, **options))(q, store, lengths=lengths)
    have, exchanges = on_mesh(
        mesh,
        lambda q, s, n: sharded_kernels.decode_attention(q, s, lengths=n, **options),
        (q, store, lengths),
        (BOTH, BOTH, BOTH),
    )
    assert exchanges == []
    assert have.out.sharding.spec == BOTH
    for one, other in zip(have, want):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_decode_returns_what_is_asked_for(mesh):
    q, k = normal(4, 4, 2, 64), normal(4, 2, 128, 64)
    store = formats.KVStore(k, k)
    lengths = jnp.full((4, 2), 100, jnp.int32)
    at = jnp.broadcast_to(jnp.asarray([98, 99], jnp.int32), (4, 2))
    want = decode_attention(q, store, lengths=lengths, q_positions=at, scale=0.2, return_mass=True)
    run = lambda q, s, n, p, **kw: sharded_kernels.decode_attention(  # noqa: E731
        q, s, lengths=n, q_positions=p, scale=0.2, **kw
    )
    specs = (BOTH, BOTH, BOTH, DATA)
    plain, _ = on_mesh(mesh, run, (q, store, lengths, at), specs)
    np.testing.assert_allclose(plain, want.out, rtol=1e-5, atol=1e-6)
    with_mass, _ = on_mesh(mesh, functools.partial(run, return_mass=True), (q, store, lengths, at), specs)
    assert with_mass.lse is None
    np.testing.assert_allclose(with_mass.mass, want.mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_prefill(mesh, packed):
    q, (k, v) = normal(2, 4, 24, 32), (normal(2, 2, 24, 32) for _ in range(2))
    pos = jnp.broadcast_to(jnp.tile(jnp.arange(12, dtype=jnp.int32), 2), (2, 24))
    segments = jnp.broadcast_to(jnp.repeat(jnp.arange(2, dtype=jnp.int32), 12), (2, 24))
    if not packed:
        pos = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), (2, 24))
    extra = dict(q_segments=segments, k_segments=segments) if packed else {}
    options = dict(scale=0.3, causal_aligned=True, return_lse=True)
    want = prefill_attention(q, k, v, q_positions=pos, k_positions=pos, **options, **extra)
    have, exchanges = on_mesh(
        mesh,
        lambda q, k, v, p, e: sharded_kernels.prefill_attention(
            q, k, v, q_positions=p, k_positions=p, **options, **e
        ),
        (q, k, v, pos, extra),
        (BOTH, BOTH, BOTH, DATA, DATA),
    )
    assert exchanges == []
    for one, other in zip(have, want):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_split_is_left_to_the_compiler(mesh):
    assert sharded_kernels.partition(4, 2) is None, "no mesh"
    with jax.set_mesh(mesh):
        assert sharded_kernels.partition(4, 2) == BOTH
        assert sharded_kernels.partition(3, 2) is None
        assert sharded_kernels.partition(4, 3) is None
    kinds = (AxisType.Auto,) * 2
    sequence = jax.make_mesh((2, 2), ("sequence", "tensor"), axis_types=kinds, devices=jax.devices()[:4])
    with jax.set_mesh(sequence):
        assert sharded_kernels.partition(4, 2) is None, "slots are sharded"
