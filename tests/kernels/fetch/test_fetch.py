"""fetch_blocks against a loop over blocks: XLA, the Hopper kernel's own code on Python integers, and the kernel itself."""

import functools
import math

import jax
import jax.numpy as jnp
import lines
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import pinned
from pallas_kernels.fetch import fetch_blocks, gpu
from pallas_kernels.fetch.reference import fetch_blocks_xla
from pallas_kernels.platform import require_hopper


def draw(seed, rows, blocks, n, block, dtype=np.float32):
    """(far, source) as numpy arrays; NaN in blocks that nothing names."""
    rng = np.random.default_rng(seed)
    far = rng.standard_normal((*rows, blocks, *block)).astype(dtype)
    source = np.maximum(rng.integers(-blocks // 2, blocks, (*rows, n)), -1).astype(np.int32)
    for at in np.ndindex(*rows):
        far[at][np.setdiff1d(np.arange(blocks), source[at])] = np.nan
    return far, source


def check(got, far, source):
    """Every block that was asked for, in a loop."""
    assert got.shape == (*source.shape, *far.shape[source.ndim :])
    got = np.asarray(got)
    for at in np.ndindex(*source.shape):
        if source[at] >= 0:
            np.testing.assert_array_equal(got[at], far[at[:-1]][source[at]])


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 7))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.sampled_from([(4,), (2, 8), (3, 4, 4)]), st.integers(0, 99))
def test_xla_takes_what_is_named(shape, block, seed):
    batch, heads, blocks, n = shape
    far, source = draw(seed, (batch, heads), blocks, n, block)
    check(fetch_blocks(jnp.asarray(far), jnp.asarray(source), implementation="xla"), far, source)


def emulate(monkeypatch, far, source, ctas, slots):
    """What the kernel writes, thread by thread."""

    def kernel(plan, out):
        def call(far, source):
            result = np.full(out.shape, 77, out.dtype)
            rings = 4 * plan.slots * plan.piece
            for cta in range(plan.ctas):
                for thread in range(0, 128, 16):  # of each warp one that works and one that does not
                    machine = lines.Machine(thread, rings + 4 * plan.slots * 8)
                    monkeypatch.setattr(gpu, "ptx", machine)
                    monkeypatch.setattr(gpu, "ptx_copy", machine)
                    gpu._lines(plan)(None, np.array(far), np.array(source), result, 0, rings, cta)
                    assert not machine.loads and not machine.stores
                    assert bool(machine.barriers) == (thread % 32 == 0)
            return jnp.asarray(result)

        return call

    monkeypatch.setattr(gpu, "_kernel", kernel)
    return gpu.fetch_blocks_gpu(far, source, ctas=ctas, slots=slots)


@pytest.mark.parametrize(
    ("rows", "blocks", "n", "block", "ctas", "slots"),
    [
        ((2, 3), 9, 6, (8, 16), 2, 4),
        ((1, 1), 4, 1, (4,), 16, 2),  # a single copy
        ((2, 2), 7, 11, (4, 4), 1, 3),
        ((3,), 5, 7, (40, 64), 3, 5),  # 10,240 bytes: four copies a block
        ((1, 2), 50, 64, (2, 8), 1, 8),  # the ring goes around
    ],
)
def test_kernel_code_moves_what_is_named_and_nothing_else(monkeypatch, rows, blocks, n, block, ctas, slots):
    far, source = draw(3, rows, blocks, n, block)
    got = emulate(monkeypatch, jnp.asarray(far), jnp.asarray(source), ctas, slots)
    check(got, far, source)
    assert np.all(np.asarray(got).view(np.uint32)[source < 0] == 77)


def test_kernel_code_with_nothing_to_do(monkeypatch):
    far, source = draw(0, (2, 2), 6, 9, (4, 8))
    assert np.all(
        np.asarray(emulate(monkeypatch, jnp.asarray(far), jnp.full_like(source, -1), 2, 3)).view(np.uint32)
        == 77
    )


def test_copies_are_equal_parts_of_at_most_4_kb():
    assert [gpu._piece(x) for x in (16, 2048, 4096, 8192, 10240, 16384)] == [16, 2048, 4096, 4096, 2560, 4096]
    for size in range(16, 20000, 16):
        assert size % gpu._piece(size) == 0 and gpu._piece(size) <= 4096


@pytest.mark.parametrize(("far", "source"), [((3, 5, 8), (2, 6)), ((2,), (2, 6))])
def test_shapes_that_do_not_fit(far, source):
    with pytest.raises(ValueError, match="far"):
        fetch_blocks(jnp.zeros(far), jnp.zeros(source, jnp.int32))


def test_what_cannot_run():
    far, source = jnp.zeros((2, 5, 8)), jnp.zeros((2, 6), jnp.int32)
    with pytest.raises(ValueError, match="source"):
        fetch_blocks(far, source.astype(jnp.float32))
    with pytest.raises(ValueError, match="cannot run"):
        fetch_blocks(far, source, implementation="mosaic_gpu")
    assert gpu.unsupported(far, source) is None
    assert "nothing" in gpu.unsupported(far, source[:, :0])
    assert "8 bytes" in gpu.unsupported(jnp.zeros((2, 3, 4), jnp.float16), source)


def test_lowers_to_one_call_without_copies_of_what_it_reads():
    far = jax.ShapeDtypeStruct((2, 8, 4096, 8, 128), jnp.uint16)
    source = jax.ShapeDtypeStruct((2, 8, 128), jnp.int32)
    text = jax.jit(gpu.fetch_blocks_gpu).trace(far, source).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert "stablehlo.copy" not in text and "stablehlo.convert" not in text


hopper = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu" or require_hopper() is not None,
                                              reason="needs a Hopper GPU")]  # fmt: skip


@pytest.mark.parametrize("options", [{}, dict(ctas=3, slots=2), dict(ctas=132, slots=8)])
@pytest.mark.parametrize(
    ("rows", "blocks", "n", "block", "dtype"),
    [
        pytest.param(*case, marks=hopper)
        for case in (
            ((2, 3), 64, 20, (8, 128), "float16"),
            ((1, 8), 33, 7, (64, 128), "float16"),
            ((3,), 40, 1, (5, 48), "float32"),
            ((2,), 9, 70, (13, 16, 8), "float32"),
            ((8, 8), 300, 128, (16, 256), "float16"),
        )
    ],
)
def test_hopper_reads_pinned_memory_bit_for_bit(rows, blocks, n, block, dtype, options):
    far, source = draw(math.prod(block), rows, blocks, n, block, dtype)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    view = pinned.device_view(jax.device_put(far, sharding))
    for run in (jax.jit(functools.partial(gpu.fetch_blocks_gpu, **options)), jax.jit(fetch_blocks_xla)):
        check(np.asarray(run(view, jnp.asarray(source))).view(dtype), far, source)
