"""The Hopper kernel: lowered on any host, checked against the float64 loop where there is a Hopper GPU."""

import dataclasses
import functools
import itertools

import decode_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_attention import check, draft

from pallas_kernels import formats
from pallas_kernels.decode_attention import gpu, gpu_blocks, gpu_limits, gpu_window
from pallas_kernels.platform import require_hopper

BF16 = jnp.bfloat16
ALL = dict(positions=None, q_positions=None, mask=None, scale=0.1, window=None, softcap=None, table=None,
           blocks=None, block_size=None, return_mass=False)  # fmt: skip


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def lower(fmt, *, batch=2, kv_heads=2, group=4, slots=1024, dim=128, tokens=1, page=None, kv_group=64, residual=0,
          **options):  # fmt: skip
    """The StableHLO text of a call for a CUDA device."""
    lead = (batch, kv_heads, slots) if page is None else (batch * kv_heads * slots // page, page)
    x = jax.ShapeDtypeStruct((*lead, dim), BF16)
    store = jax.eval_shape(functools.partial(formats.encode, format=fmt, group=kv_group), x, x)
    if residual:
        window = jax.ShapeDtypeStruct((batch, kv_heads, residual, dim), BF16)
        store = dataclasses.replace(store, k_res=window, v_res=window, res_lengths=ints(batch, kv_heads))
    arrays = dict(lengths=ints(batch, kv_heads))
    if page is not None:
        arrays["table"] = ints(batch, kv_heads, slots // page)
    arrays |= {n: v for n, v in options.items() if isinstance(v, jax.ShapeDtypeStruct)}
    static = {n: v for n, v in (ALL | options).items() if n not in arrays}
    q = jax.ShapeDtypeStruct((batch, kv_heads * group, tokens, dim), BF16)

    def call(q, store, arrays):
        return gpu.decode_attention_gpu(q, store, **arrays, **static)

    return jax.jit(call).trace(q, store, arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("fmt", formats.FORMATS)
def test_lowers_to_one_kernel_that_takes_the_cache_as_stored(fmt):
    text = lower(fmt)
    assert text.count("@mosaic_gpu") == 1
    # Nothing but reshapes may touch the cache on its way to the kernel.
    for moving in ("stablehlo.transpose", "stablehlo.concatenate", "stablehlo.pad", "stablehlo.gather"):
        lines = [x for x in text.splitlines() if moving in x and ("1024" in x or "512x" in x)]
        assert not lines, lines


@pytest.mark.parametrize(
    "fmt, options",
    [
        ("dense", dict(page=16, tokens=3, q_positions=ints(2, 3), window=100, softcap=20.0)),
        ("dense", dict(tokens=4, mask=jax.ShapeDtypeStruct((2, 4, 8), jnp.bool_), return_mass=True)),
        ("int8", dict(page=64, positions=ints(2, 2, 1024), q_positions=ints(2, 1))),
        ("int4", dict(blocks=ints(2, 2, 5), block_size=64)),
        ("dense", dict(blocks=ints(2, 2, 5), block_size=16)),
        ("fp8_e4m3", dict(dim=256, group=16)),
        ("int4", dict(kv_group=32, residual=128, return_mass=True, mass_per="kv_head")),
        (
            "int2",
            dict(kv_group=32, residual=48, page=128, positions=ints(2, 2, 1072), q_positions=ints(2, 1)),
        ),
    ],
)
def test_options_lower(fmt, options):
    text = lower(fmt, **options)
    assert text.count("@mosaic_gpu") == 1
    assert (
        "stablehlo.dot_general" not in text
    )  # no part of the attention, the residual window's least, is left to XLA


def test_splits_fill_the_device_without_tiny_parts():
    for rows, slots in [
        (8, 32768),
        (8, 131072),
        (256, 8192),
        (512, 4096),
        (64, 32768),
        (1, 1 << 20),
        (8, 100),
    ]:
        splits = gpu_limits.choose_splits(rows, slots, 64, 2)
        assert splits & (splits - 1) == 0
        assert splits == 1 or slots // splits >= 4 * 64
        assert rows * splits >= 128 or slots // splits < 8 * 64 * 2


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype=jnp.float32), "q is float32"),
        (dict(dim=80), "head_dim=80"),
        (dict(fmt="int8", dim=64), "head_dim=64"),
        (dict(fmt="int4", kv_group=16), "group=16"),
        (dict(group=65), "65 queries per KV head"),
        (dict(group=17, fmt="int2"), "at most 16"),
        (dict(page=32, fmt="int8"), "page_size=32"),
        (dict(slots=100), "100 slots"),
    ],
)
def test_what_the_kernel_does_not_cover_is_named(change, reason):
    problem = oracle.make(
        np.random.default_rng(), **(dict(dim=128, dtype=BF16, kv_group=64, batch=1) | change)
    )
    layout = dict(table=problem.table, blocks=None, block_size=None)
    got = gpu_limits.unsupported(
        problem.q, problem.store, lengths=problem.lengths, positions=None, mask=None, **layout
    )
    assert got is not None and reason in got and "\n" not in got


@pytest.mark.parametrize("tokens, per_kv_head", [(1, True), (2, False)])
def test_mass_from_what_the_kernel_writes(tokens, per_kv_head):
    """Blocks as the swizzled P tile lies in shared memory, then a window with its columns minor; garbage elsewhere."""
    rng = np.random.default_rng()
    rows, group, slots, residual = 4, 3, 100, 40
    columns = group * tokens
    layout = gpu_window.WeightLayout(slots, 64, residual, 32, columns, columns + columns % 2, 8, True)
    logits = rng.standard_normal((rows, columns, slots + residual)) * 3
    lse = np.log(np.exp(logits).sum(-1))
    shapes = layout.shapes(rows)
    weights, references = (np.full(s.shape, np.nan, np.float32) for s in shapes)
    steps = [range(0, 64), range(64, 100), range(100, 132), range(132, 140)]
    for row, (n, step), column in itertools.product(range(rows), enumerate(steps), range(columns)):
        references[row, n, column] = rng.standard_normal()
        for i, slot in enumerate(step):
            p = 2.0 ** (logits[row, column, slot] / np.log(2) - references[row, n, column])
            if n < 2:
                chunk = (i // 8) ^ (column % 8)
                weights[row, 64 * n : 64 * n + 64].reshape(-1)[64 * column + 8 * chunk + i % 8] = p
            else:
                weights[row, 128 + 32 * (n - 2) + i, column] = p
    got = gpu_window.mass_of_slots(
        layout, jnp.asarray(weights, BF16), jnp.asarray(references), jnp.asarray(lse, jnp.float32).reshape(2, 2, -1),
        jnp.ones((2, 2, slots + residual), bool), tokens, per_kv_head,
    )  # fmt: skip
    want = np.exp(logits - lse[..., None]).reshape(2, 2, group, tokens, -1).sum(3)
    want = want.sum(2) if per_kv_head else want.reshape(2, 2 * group, -1)
    np.testing.assert_allclose(got, want, rtol=1e-2)


hopper = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu" or require_hopper() is not None,
                                              reason="needs a Hopper GPU")]  # fmt: skip


@pytest.mark.parametrize("fmt", [pytest.param(f, marks=hopper) for f in formats.FORMATS])
@pytest.mark.parametrize("page", [None, 128])
def test_device_formats_and_layouts(fmt, page):
    rng = np.random.default_rng()
    run = functools.partial(check, dtype=BF16, implementation="mosaic_gpu")
    base = dict(fmt=fmt, page=page, dtype=BF16, dim=128, group=4, kv_group=64, slots=512)
    run(oracle.make(rng, **base, lengths=[[512, 130], [0, 1]]))
    run(oracle.make(rng, **base))
    mask = np.stack([draft(rng, 4)] * 2)
    run(oracle.make(rng, **base, tokens=4, lengths=[[512, 300], [64, 65]]), mask=mask)
    blocks = np.array([[[2, 0], [1, -1]], [[3, 1], [0, 2]]], np.int32)
    run(oracle.make(rng, **base), blocks=blocks, block_size=128)
    if fmt == "dense" and page is None:
        few = oracle.make(rng, **base, lengths=[[512, 387], [500, 512]])
        for size in (8, 16, 32):
            small = np.stack([[rng.permutation(387 // size + 1)[:9] for _ in range(2)] for _ in range(2)])
            run(few, blocks=small.astype(np.int32), block_size=size)
    residual = base | dict(kv_group=32, residual=72)
    run(oracle.make(rng, **residual))
    run(
        oracle.make(rng, **residual, tokens=2),
        q_positions=np.array([[300, 301], [40, 41]], np.int32),
        window=100,
    )
    run(oracle.make(rng, **residual, tokens=4, lengths=[[512, 300], [64, 65]]), mask=mask)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_small_blocks_become_pages_of_the_same_slots(data):
    """The newest block may be chosen or not, ends early or not; blocks past the end and -1 hold nothing."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    block = data.draw(st.sampled_from([8, 16, 32]))
    rng = np.random.default_rng(seed)
    batch, kv_heads, per_row, n, dim = 2, 2, 6, 5, 16
    k, v = (rng.standard_normal((batch, kv_heads, per_row * block, dim)).astype(np.float32) for _ in range(2))
    lengths = rng.integers(0, per_row * block + 1, (batch, kv_heads)).astype(np.int32)
    blocks = np.stack([[rng.permutation(per_row)[:n] for _ in range(kv_heads)] for _ in range(batch)])
    blocks = np.where(np.arange(n) < rng.integers(0, n + 1, (batch, kv_heads, 1)), blocks, -1).astype(
        np.int32
    )
    ascend = data.draw(st.booleans())
    if ascend:
        blocks = np.sort(np.where(blocks < 0, per_row, blocks), axis=-1)
        blocks = np.where(blocks == per_row, -1, blocks)
    store, kept, table = gpu_blocks.as_pages(formats.KVStore(k, v), lengths, blocks, block, ascend)
    assert store.k.shape == (batch * kv_heads * per_row, block, dim)
    for b, h in np.ndindex(batch, kv_heads):
        want = {
            slot
            for first in blocks[b, h][blocks[b, h] >= 0] * block
            for slot in range(first, min(first + block, lengths[b, h]))
        }
        pages = np.asarray(table[b, h])[: -(-int(kept[b, h]) // block)]
        got_k, got_v = (np.asarray(x)[pages].reshape(-1, dim)[: kept[b, h]] for x in (store.k, store.v))
        assert len(got_k) == len(want)
        order = sorted(want)
        for got, source in ((got_k, k), (got_v, v)):
            np.testing.assert_array_equal(
                got[np.lexsort(got.T)], source[b, h, order][np.lexsort(source[b, h, order].T)]
            )


def test_small_blocks_are_read_where_their_order_does_not_matter():
    problem = oracle.make(np.random.default_rng(), dim=128, dtype=BF16, batch=1, slots=512)
    blocks = np.zeros((*problem.lengths.shape, 2), np.int32)
    ask = functools.partial(
        gpu_limits.unsupported, problem.q, problem.store, lengths=problem.lengths, table=None, blocks=blocks
    )
    free = dict(positions=None, mask=None)
    assert ask(block_size=16, **free) is None and ask(block_size=128, order=True, **free) is None
    assert "the mass" in ask(block_size=16, order=True, **free)
    assert all("multiples of 64" in ask(block_size=n, **free) for n in (4, 48))
