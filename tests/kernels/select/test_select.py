"""select_top against a stable sort in NumPy; on a Hopper GPU the kernel too."""

import functools

import jax
import jax.numpy as jnp
import lockstep
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from kvjax import sharded_kernels
from pallas_kernels.platform import require_hopper
from pallas_kernels.select import gpu, ops, select_top

F32 = np.float32


def best(scores, counts, width):
    """The contract, row by row: largest first, of equals the lower number, then ascending."""
    out = np.full((*scores.shape[:2], width), -1, np.int32)
    for b, h in np.ndindex(counts.shape):
        row = scores[b, h]
        allowed = np.flatnonzero(row > -np.inf)
        order = allowed[np.argsort(-row[allowed], kind="stable")]
        chosen = np.sort(order[: min(max(counts[b, h], 0), width)])
        out[b, h, : len(chosen)] = chosen
    return out


def cases(rng, n):
    """Rows [n] that are hard in different ways."""
    normal = rng.standard_normal(n).astype(F32)
    yield normal
    yield rng.integers(0, 4, n).astype(F32)  # ties
    yield np.full(n, rng.standard_normal(), F32)
    yield np.where(rng.random(n) < 0.5, -np.inf, normal).astype(F32)
    yield np.full(n, -np.inf, F32)
    yield np.where(np.arange(n) < n // 2, normal, -np.inf).astype(F32)  # as a cache that is half full
    yield np.sort(normal)
    yield np.where(rng.random(n) < 0.3, np.inf, normal).astype(F32)
    nan = rng.choice(np.array([0x7FC00000, 0xFFC00000, 0xFF800001], np.uint32).view(F32), n)
    yield np.where(rng.random(n) < 0.3, nan, normal)
    yield rng.choice(np.array([0.0, -0.0, -1, 1], F32), n)
    yield (1 + rng.integers(0, 50, n) * F32(2**-23)).astype(F32)  # equal but for the last bits
    yield rng.choice(np.array([np.finfo(F32).min, np.finfo(F32).max, -np.inf, np.inf, 1], F32), n)


def problem(seed, n):
    """(scores [12, 3, n], counts [12, 3], width): every case, counts from below none to above the width."""
    rng = np.random.default_rng(seed)
    scores = np.stack([list(cases(rng, n)) for _ in range(3)], axis=1)
    width = int(rng.integers(1, n + 1))
    counts = rng.integers(0, width + 1, scores.shape[:2]).astype(np.int32)
    ends = rng.choice([0, 1, width, n, width + 7, -3], counts.shape)
    return scores, np.where(rng.random(counts.shape) < 0.4, ends, counts).astype(np.int32), width


@given(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([1, 2, 5, 37, 129]))
@settings(max_examples=30, deadline=None)
def test_reference(seed, n):
    scores, counts, width = problem(seed, n)
    got = select_top(jnp.asarray(scores), jnp.asarray(counts), width=width, implementation="xla")
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, best(scores, counts, width))


def test_the_set_is_that_of_top_k():
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    scores = rng.integers(0, 40, (2, 3, 500)).astype(F32)
    counts = np.full((2, 3), 77, np.int32)
    want = np.sort(jax.lax.top_k(jnp.asarray(scores), 77)[1], axis=-1)
    np.testing.assert_array_equal(select_top(jnp.asarray(scores), jnp.asarray(counts), width=77), want)


def test_bad_operands_are_named():
    scores, counts = jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="width=9 must be between 0 and the 8"):
        select_top(scores, counts, width=9)
    with pytest.raises(ValueError, match="counts has shape"):
        select_top(scores, counts[0], width=2)
    with pytest.raises(ValueError, match="scores has dtype bfloat16"):
        select_top(scores.astype(jnp.bfloat16), counts, width=2)
    with pytest.raises(ValueError, match="counts has dtype float32"):
        select_top(scores, counts.astype(jnp.float32), width=2)
    with pytest.raises(ValueError, match=r"\[batch, heads, n\]"):
        select_top(scores[0], counts[0], width=2)
    assert select_top(scores, counts, width=0).shape == (1, 2, 0)


def test_rows_on_a_mesh_are_selected_where_they_are():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    scores, counts, width = problem(np.random.SeedSequence().entropy, 48)
    scores, counts = np.tile(scores, (2, 1, 1))[:16, :2], np.tile(counts, (2, 1))[:16, :2]
    select = jax.jit(functools.partial(sharded_kernels.select_top, width=width))
    for names, sizes in ((("data", "tensor"), (4, 2)), (("data", "sequence"), (2, 4))):
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 2)
        last = "sequence" if "sequence" in names else None
        spec = jax.P("data", None if last else "tensor", last)
        with jax.set_mesh(mesh):
            args = (
                jax.device_put(scores, jax.NamedSharding(mesh, spec)),
                jax.device_put(counts, jax.NamedSharding(mesh, jax.P(*spec[:2]))),
            )
            compiled = select.lower(*args).compile()
            np.testing.assert_array_equal(compiled(*args), best(scores, counts, width))
        if last is None:
            assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()


@pytest.mark.parametrize("n, threads", [(1, 128), (37, 128), (2048, 128), (3001, 256), (20001, 1024)])
def test_the_kernel_in_lockstep(monkeypatch, n, threads):
    """The kernel's own code, its instructions replaced by NumPy's: every number once, and all of the width written once."""
    scores, counts, width = problem(np.random.SeedSequence().entropy, n)
    scores = np.pad(scores, ((0, 0), (0, 0), (0, -n % 4)), constant_values=-np.inf)
    histogram, totals, found = 0, 4 * 2048 * 4, 4 * 2048 * 4 + 256
    monkeypatch.setattr(gpu, "arith", lockstep.arith)
    monkeypatch.setattr(gpu, "Reg", lockstep.Reg)
    some = [(row, width, count) for row, count in zip(scores[:, 0], counts[:, 0])]
    for row, width, count in some + [(row, n, np.int32(n)) for row in scores[:, 1]]:
        plan = gpu._Plan(scores.shape[2], width, threads, 4)
        machine = lockstep.Machine(threads, found + 48, row, width)
        monkeypatch.setattr(gpu, "ptx", machine)
        with np.errstate(over="ignore", invalid="ignore"):
            gpu._select(plan)(None, "row", "out", count, histogram, totals, found)
        np.testing.assert_array_equal(machine.out, best(row[None, None], np.array([[count]]), width)[0, 0])
        assert (machine.writes == 1).all()


@pytest.mark.parametrize("n, width", [(1, 1), (37, 37), (4097, 410), (131072, 8520), (1048576, 10485)])
def test_kernel_lowers_to_one_call(n, width):
    ask = jax.jit(lambda s, c: gpu.select_top_gpu(s, c, width))
    scores, counts = jax.ShapeDtypeStruct((2, 4, n), F32), jax.ShapeDtypeStruct((2, 4), np.int32)
    text = ask.trace(scores, counts).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert text.count("stablehlo.pad") == (1 if n % 4 else 0) and "sort" not in text


def test_what_the_kernel_is_chosen_for(monkeypatch):
    called = []
    monkeypatch.setattr(ops, "require_hopper", lambda: None)
    monkeypatch.setattr(gpu, "select_top_gpu", lambda scores, *_: called.append(scores.shape[2]))
    counts = jnp.ones((1, 1), jnp.int32)
    for n in (ops.LEAST_SIZE - 1, ops.LEAST_SIZE):
        select_top(jnp.zeros((1, 1, n)), counts, width=1)
    assert called == [ops.LEAST_SIZE]
    select_top(jnp.zeros((1, 1, 8)), counts, width=1, implementation="mosaic_gpu")
    assert called == [ops.LEAST_SIZE, 8]
    with pytest.raises(ValueError, match="nothing to select"):
        select_top(jnp.zeros((1, 1, 8)), counts, width=0, implementation="mosaic_gpu")


@pytest.fixture
def hopper():
    if reason := require_hopper():
        pytest.skip(reason)


def check_kernel(scores, counts, width, **options):
    got = jax.jit(lambda s, c: gpu.select_top_gpu(s, c, width, **options))(scores, counts)
    np.testing.assert_array_equal(got, best(scores, counts, width))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 31, 33, 127, 129, 1000, 2047, 3001, 5000])
def test_kernel(hopper, n):
    scores, counts, width = problem(np.random.SeedSequence().entropy, n)
    check_kernel(scores, counts, width)
    check_kernel(scores, np.zeros_like(counts), width)
    check_kernel(scores, np.full_like(counts, n), n)


@pytest.mark.gpu
@pytest.mark.parametrize("threads, copies", [(128, 1), (256, 2), (512, 4), (1024, 4)])
def test_kernel_of_any_width(hopper, threads, copies):
    scores, counts, width = problem(np.random.SeedSequence().entropy, 20001)
    check_kernel(scores[:, :1], counts[:, :1], width, threads=threads, copies=copies)


@pytest.mark.gpu
@pytest.mark.parametrize("n, width", [(131072, 8520), (1048576, 10485)])
def test_kernel_on_long_rows(hopper, n, width):
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    scores = np.stack([list(cases(rng, n))[:4]])
    counts = np.array([[width, width // 3, width - 1, 1]], np.int32)
    check_kernel(scores, counts, width)
