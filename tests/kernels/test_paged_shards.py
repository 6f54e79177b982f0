"""Decode over a page pool that is spread over a mesh: the values of one device, and no page travels."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kvjax.policies as P
from kvjax import sharded_kernels
from kvjax.generation.generator import Generator
from kvjax.paged_shards import local_table, page_axes
from kvjax.sharding import make_mesh, sharding_of
from pallas_kernels import formats
from pallas_kernels.decode_attention import decode_attention, tpu
from pallas_kernels.decode_attention import ops as decode_ops
from tests.kernels.decode.decode_oracle import attention
from tests.toy import Toy

PAGE, WIDTH = 64, 3
LENGTHS = np.asarray([[130, 0], [1, 192], [64, 65], [0, 100]], np.int32)
WHOLE, SPREAD = PartitionSpec(), PartitionSpec(("data", "tensor"))


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def problem(fmt="dense", tokens=1, residual=0, seed=0):
    """(q, store, lengths, table, keys and values float64 by slot): 24 pages, handed out at random."""
    rng = np.random.default_rng(seed)
    table = np.full((4, 2, WIDTH), -1, np.int32)
    free = iter(rng.permutation(24))
    for b in range(4):
        for h in range(2):
            for n in range(-(-int(LENGTHS[b, h]) // PAGE)):
                table[b, h, n] = next(free)
    k, v = (jnp.asarray(rng.normal(size=(24, PAGE, 64)), jnp.float32) for _ in range(2))
    store = formats.encode(k, v, fmt, group=32)
    decoded = [np.asarray(x, np.float64)[np.maximum(table, 0)].reshape(4, 2, -1, 64) for x in formats.decode(store)]  # fmt: skip
    q = jnp.asarray(rng.normal(size=(4, 4, tokens, 64)), jnp.float32)
    if residual:
        late = [jnp.asarray(rng.normal(size=(4, 2, residual, 64)), jnp.float32) for _ in range(2)]
        count = jnp.asarray(rng.integers(0, residual + 1, (4, 2)), jnp.int32)
        store = formats.KVStore(
            **{n: getattr(store, n) for n in ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")},
            k_res=late[0], v_res=late[1], res_lengths=count, format=fmt, group=32,
        )  # fmt: skip
        decoded = [np.concatenate([x, np.asarray(y, np.float64)], 2) for x, y in zip(decoded, late)]
    return q, store, jnp.asarray(LENGTHS), jnp.asarray(table), decoded


def oracle(q, store, decoded, tokens_seen=None):
    slots = PAGE * WIDTH
    at = np.arange(slots + store.residual)
    seen = at < np.where(at < slots, LENGTHS[..., None], 0)
    if store.residual:
        seen = seen | ((at >= slots) & (at - slots < np.asarray(store.res_lengths)[..., None]))
    seen = np.broadcast_to(seen[:, :, None], (*seen.shape[:2], q.shape[2], seen.shape[2]))
    if tokens_seen is not None:
        seen = seen & tokens_seen
    return attention(q, *decoded, seen, 0.2)


def spread(mesh, args):
    """Pools by pages, everything else on every device; the compiled program takes them so."""

    def one(path, x):
        name = jax.tree_util.keystr(path)
        pool = re.search(r"\.(k|v)(_scale|_zero)?$", name)
        return jax.device_put(x, NamedSharding(mesh, SPREAD if pool else WHOLE))

    return jax.tree_util.tree_map_with_path(one, args)


def run(mesh, fn, args):
    args = spread(mesh, args)
    with jax.set_mesh(mesh):
        compiled = jax.jit(fn).lower(*args).compile()
        found = re.findall(r"= (\S+) (?:all-gather|all-reduce|all-to-all)\(", compiled.as_text())
        return compiled(*args), found


@pytest.mark.parametrize("fmt,residual", [("dense", 0), ("dense", 9), ("int8", 0), ("int4", 70)])
def test_values_and_mass(mesh, fmt, residual):
    q, store, lengths, table, decoded = problem(fmt, residual=residual)
    want = oracle(q, store, decoded)
    have, exchanged = run(
        mesh,
        lambda q, s, n, t: sharded_kernels.decode_attention(
            q, s, lengths=n, table=t, scale=0.2, return_lse=True, return_mass=True
        ),
        (q, store, lengths, table),
    )
    for one, other in zip(have, want):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    sizes = [
        np.prod([int(n) for n in m.split(",")]) for m in re.findall(r"\[([\d,]+)\]", " ".join(exchanged))
    ]
    assert sizes and max(sizes) <= 4 * 4 * PAGE * WIDTH, "only outputs and masses are exchanged, no pages"


def test_mass_per_kv_head_and_a_plain_output(mesh):
    q, store, lengths, table, decoded = problem(residual=5, seed=3)
    out, _, mass = oracle(q, store, decoded)
    options = dict(scale=0.2, return_mass=True, mass_per="kv_head")
    have, _ = run(
        mesh,
        lambda q, s, n, t: sharded_kernels.decode_attention(q, s, lengths=n, table=t, **options),
        (q, store, lengths, table),
    )
    assert have.lse is None
    np.testing.assert_allclose(have.mass, mass.reshape(4, 2, 2, -1).sum(2), rtol=1e-4, atol=1e-5)
    plain, _ = run(
        mesh,
        lambda q, s, n, t: sharded_kernels.decode_attention(q, s, lengths=n, table=t, scale=0.2),
        (q.astype(jnp.bfloat16), store, lengths, table),
    )
    assert plain.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(plain, np.float32), out, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("given", [True, False])
def test_several_tokens_in_causal_order(mesh, given):
    """Positions travel with their pages; without them a slot's rank is its position, windows included."""
    q, store, lengths, table, decoded = problem(tokens=3, residual=8, seed=5)
    slots = PAGE * WIDTH
    total = LENGTHS + np.asarray(store.res_lengths)
    order = np.arange(slots + 8)
    order = np.where(order < slots, order, order - slots + LENGTHS[..., None])
    rng = np.random.default_rng(1)
    pos = rng.permuted(np.broadcast_to(np.arange(slots + 8), order.shape), axis=-1) if given else order
    q_pos = np.asarray([total.max() - 3, total.max() // 2, total.max() // 4]) + np.arange(4)[:, None]
    near = pos[:, :, None] <= q_pos[:, None, :, None]
    near &= pos[:, :, None] > q_pos[:, None, :, None] - 90
    want = oracle(q, store, decoded, near)
    extra = (jnp.asarray(pos, jnp.int32),) if given else ()
    have, _ = run(
        mesh,
        lambda q, s, n, t, p, *pos: sharded_kernels.decode_attention(
            q, s, lengths=n, table=t, q_positions=p, scale=0.2, window=90, return_lse=True,
            positions=pos[0] if pos else None,
        ),
        (q, store, lengths, table, jnp.asarray(q_pos, jnp.int32), *extra),
    )  # fmt: skip
    np.testing.assert_allclose(have.out, want[0], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(have.lse, want[1], rtol=2e-4, atol=2e-5)


def test_the_kernel_runs_on_its_own_pages(mesh, monkeypatch):
    """The Mosaic TPU kernel, interpreted, inside the mapped function."""
    q, store, lengths, table, decoded = problem("int8", seed=7)
    calls = []

    def kernel(q, kv, **options):
        calls.append(kv.k.shape)
        asked = {n: options.pop(n) for n in ("return_lse", "return_mass")}
        rest = dict(positions=None, q_positions=None, mask=None, window=None, softcap=None, blocks=None, block_size=None)  # fmt: skip
        assert asked["return_lse"]
        rest |= options
        return decode_ops.DecodeOut(
            *tpu.decode_attention_tpu(q, kv, interpret=True, return_mass=asked["return_mass"], **rest)
        )

    monkeypatch.setattr("kvjax.paged_shards.decode_op.decode_attention", kernel)
    have, _ = run(
        mesh,
        lambda q, s, n, t: sharded_kernels.decode_attention(
            q, s, lengths=n, table=t, scale=0.2, return_lse=True, return_mass=True
        ),
        (q, store, lengths, table),
    )
    assert calls == [(3, PAGE, 64)], "24 pages over 8 devices"
    for one, other in zip(have, oracle(q, store, decoded)):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_local_tables_keep_order_and_count_slots():
    table = jnp.asarray([[[7, 2, 3, -1]]], jnp.int32)
    order, local, lengths = local_table(table, jnp.int32(2), 2, jnp.asarray([[2 * 8 + 5]], jnp.int32), 8)
    assert order.shape == (1, 1, 2) and order.tolist() == [[[1, 2]]]
    assert local.tolist() == [[[0, 1]]] and lengths.tolist() == [[8 + 5]]
    _, _, far = local_table(table, jnp.int32(4), 2, jnp.asarray([[21]], jnp.int32), 8)
    assert far.tolist() == [[0]]


def test_uneven_pools_and_other_requests_are_left_to_the_compiler(mesh):
    assert page_axes(24) is None, "no mesh"
    q, store, lengths, table, decoded = problem(tokens=2, seed=9)
    mask = jnp.ones((4, 2, 2), bool)
    want = decode_attention(q, store, lengths=lengths, table=table, mask=mask, scale=0.2, return_lse=True)
    with jax.set_mesh(mesh):
        assert page_axes(24) == ("data", "tensor") and page_axes(20) is None
        have = jax.jit(functools.partial(sharded_kernels.decode_attention, scale=0.2, return_lse=True))(
            q, store, lengths=lengths, table=table, mask=mask
        )
    np.testing.assert_allclose(have.out, want.out, rtol=1e-5, atol=1e-6)


SPECS = (
    "keydiff(budget=0.5, recent=4) | adakv",
    "h2o(budget=12, recent=4) | adakv",
    "keydiff(budget=0.6, recent=4) | adakv | kivi(group=8, residual=64)",
)


@pytest.mark.parametrize("spec", SPECS)
def test_generation_equals_one_device(mesh, spec, monkeypatch):
    """Ragged caches end to end: the same tokens, pools that divide, and the mapped path in every decode step."""
    used = []
    original = sharded_kernels.decode_paged
    monkeypatch.setattr(
        sharded_kernels, "decode_paged", lambda *a, **k: used.append(k["axes"]) or original(*a, **k)
    )
    lm, rng = Toy(), np.random.default_rng(0)
    prompts = [rng.integers(0, 60, n).tolist() for n in (37, 20, 29, 33)]
    params = lm.init()
    grid = make_mesh({"data": 2, "tensor": 2}, jax.devices())
    one = Generator(lm, params, P.parse(spec), page_size=4)
    many = Generator(lm, params, P.parse(spec), page_size=4, mesh=grid)
    want, _ = one.generate(prompts, 6)
    have, session = many.generate(prompts, 6)
    assert [o.tokens for o in have] == [o.tokens for o in want]
    assert used and set(used) == {("data", "tensor")}
    for pool in session.plan.pool_specs:
        if pool is not None:
            k = pool.store["k"]
            assert k.shape[0] % 4 == 0
            assert sharding_of(k.shape, k.axes, grid).spec[0] == ("data", "tensor")
