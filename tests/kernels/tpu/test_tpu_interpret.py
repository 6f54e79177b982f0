"""TPU kernels on the CPU interpreter, with NaN for uninitialised memory and race detection, against the oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache_write.reference import append_xla
from pallas_kernels.cache_write.tpu import append_tpu
from pallas_kernels.decode_attention.reference import decode_attention_xla
from pallas_kernels.decode_attention.tpu import decode_attention_tpu
from pallas_kernels.observe.reference import column_reduce_xla
from pallas_kernels.observe.tpu import column_mass_tpu
from pallas_kernels.prefill_attention import block_table
from pallas_kernels.prefill_attention import tpu as prefill_tpu
from pallas_kernels.prefill_attention.reference import prefill_attention_xla
from tests.kernels.decode import decode_oracle
from tests.kernels.prefill.attention_oracle import (
    aligned_case,
    fresh_rng,
    relative_error,
    scattered_case,
)

STRICT = pltpu.InterpretParams(
    uninitialized_memory="nan", detect_races=True, out_of_bounds_reads="raise", dma_execution_mode="on_wait"
)


@pytest.fixture(autouse=True)
def clean_interpreter():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def compare_decode(interpret, *, tokens=1, positions=False, window=None, softcap=None, blocks=None,
                   tree=False, mass=True, **problem):  # fmt: skip
    """The kernel beside the XLA path, which has its own float64 oracle."""
    rng = fresh_rng()
    p = decode_oracle.make(rng, tokens=tokens, **problem)
    valid, order, total = decode_oracle.entries(p)
    options = dict(positions=None, q_positions=None, mask=None, blocks=None)
    if positions:
        at = np.where(valid, order, -1)
        options["positions"] = jnp.asarray(np.where(rng.random(at.shape) < 0.1, -1, at), jnp.int32)
    if tokens > 1 or window:
        last = total.max(1)[:, None] - tokens
        options["q_positions"] = jnp.asarray(last + np.arange(tokens), jnp.int32)
    if tree:
        options["mask"] = jnp.asarray(rng.random((len(total), tokens, 4)) < 0.6)
    if blocks:
        slots = p.store.slots * (1 if p.table is None else p.table.shape[2])
        table = np.full((*p.lengths.shape, max(1, slots // blocks // 2)), -1, np.int32)
        for b, h in np.ndindex(*p.lengths.shape):
            n = rng.integers(0, table.shape[2] + 1)
            table[b, h, :n] = rng.permutation(slots // blocks)[:n]
        options["blocks"] = jnp.asarray(table)
    args = dict(
        lengths=jnp.asarray(p.lengths), scale=0.2, window=window, softcap=softcap, block_size=blocks,
        table=None if p.table is None else jnp.asarray(p.table), return_mass=mass, **options,
    )  # fmt: skip
    static = ("scale", "window", "softcap", "block_size", "return_mass")
    fixed = {name: args.pop(name) for name in static}
    want = jax.jit(functools.partial(decode_attention_xla, **fixed))(p.q, p.store, **args)
    kernel = functools.partial(decode_attention_tpu, **fixed, interpret=interpret)
    have = jax.jit(kernel)(p.q, p.store, **args)
    limit = 2e-5 if p.q.dtype == jnp.float32 else 1e-2
    for one, other in zip(have, want):
        if other is not None:
            assert relative_error(one, np.asarray(other, np.float64)) <= limit


DECODE = {
    "lengths_0_and_1": dict(slots=300, lengths=[[300, 1], [0, 129]]),
    "many_steps": dict(slots=2500, lengths=[[2500, 1024], [1025, 7]], dim=32),
    "window_skips": dict(slots=2500, window=700, mass=False, lengths=[[2500, 2400], [2000, 900]], dim=32),
    "four_tokens": dict(tokens=4, slots=300),
    "positions": dict(slots=300, positions=True),
    "tree": dict(slots=256, tokens=4, tree=True),
    "residual": dict(slots=256, residual=8),
    "paged_16": dict(slots=256, page=16, positions=True, window=77),
    "paged_64_softcap": dict(slots=512, page=64, softcap=3.0),
    "blocks_in_pages": dict(slots=512, page=64, blocks=32),
    "blocks_over_pages": dict(slots=512, page=32, blocks=64),
    "group_16": dict(slots=256, group=16, kv_heads=1, dim=80),
    "bf16": dict(slots=512, dtype=jnp.bfloat16),
}
for fmt in ("int8", "fp8_e4m3", "int4", "int2"):
    DECODE[fmt] = dict(slots=256, fmt=fmt, residual=8)
    DECODE[f"{fmt}_paged"] = dict(slots=256, page=128, fmt=fmt)
    DECODE[f"{fmt}_blocks"] = dict(slots=512, blocks=128, fmt=fmt, group=1)


QUICK = ("lengths_0_and_1", "many_steps", "four_tokens", "residual", "int8_paged", "int4", "int2_paged")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DECODE]
)
def test_decode(name):
    compare_decode(True, **DECODE[name])


@pytest.mark.parametrize(
    "options",
    [
        dict(slots=256, dim=32),
        pytest.param(dict(slots=256, page=128, fmt="int4", dim=32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decode_without_races_or_uninitialised_reads(options):
    compare_decode(STRICT, batch=1, kv_heads=2, group=1, **options)


def packed_case(rng):
    lengths = [100, 60, 96]
    case = aligned_case(rng, batch=1, q_heads=2, kv_heads=1, tokens=256)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    segments = np.repeat(np.arange(3, dtype=np.int32), lengths)[None]
    case.q_positions = case.k_positions = positions[None]
    case.options.update(q_segments=segments, k_segments=segments)
    return case


def sparse_case(rng):
    keep = rng.random((2, 2, 3, 3)) < 0.6
    table = block_table.from_mask(jnp.asarray(keep), block_q=128, block_k=128)
    return aligned_case(rng, q_heads=2, kv_heads=1, tokens=300, lengths=[300, 77], blocks=table)


SMALL = dict(q_heads=2, kv_heads=1)
PREFILL = {
    "aligned": lambda rng: aligned_case(rng, tokens=300, lengths=[300, 77], **SMALL),
    "left": lambda rng: aligned_case(rng, tokens=300, lengths=[0, 177], left=True, **SMALL),
    "window": lambda rng: aligned_case(rng, tokens=400, lengths=[400, 390], window=60, softcap=2.0, **SMALL),
    "scattered": lambda rng: scattered_case(rng, tokens=130, slots=300, window=90, **SMALL),
    "packed": packed_case,
    "block_sparse": sparse_case,
}


def compare_prefill(case, interpret):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v))
    options = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    options |= dict(q_positions=jnp.asarray(case.q_positions), k_positions=jnp.asarray(case.k_positions))
    want = jax.jit(lambda *x: prefill_attention_xla(*x, scale=0.3, **options))(q, k, v)
    kernel = functools.partial(prefill_tpu.prefill_attention_tpu, scale=0.3, **options, interpret=interpret)
    have = jax.jit(kernel)(q, k, v)
    for one, other in zip(have, want):
        assert relative_error(one, np.asarray(other, np.float64)) <= 2e-5
    if "blocks" in options:
        return
    reduce = functools.partial(column_reduce_xla, lambda p, _: p.sum(2), scale=0.3, **options)
    want_mass = jax.jit(reduce)(q, k)
    kernel = functools.partial(column_mass_tpu, scale=0.3, **options, interpret=interpret)
    mass = jax.jit(kernel)(q, k, lse=want[1])
    assert relative_error(mass, np.asarray(want_mass, np.float64)) <= 2e-5


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("window", "scattered") else pytest.param(name, marks=pytest.mark.slow)
        for name in PREFILL
    ],
)
def test_prefill_and_column_mass(name, monkeypatch):
    monkeypatch.setattr(prefill_tpu, "_TILE", 128)  # several tiles at test sizes
    compare_prefill(PREFILL[name](fresh_rng()), True)


@pytest.mark.slow
def test_prefill_without_races_or_uninitialised_reads(monkeypatch):
    monkeypatch.setattr(prefill_tpu, "_TILE", 128)
    case = aligned_case(fresh_rng(), batch=1, q_heads=1, kv_heads=1, tokens=200, lengths=[180])
    compare_prefill(case, STRICT)


def test_float16_scales_are_read_exactly():
    from pallas_kernels.decode_attention.tpu import _float32

    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)
    finite = np.isfinite(values)
    have = np.asarray(_float32(jnp.asarray(bits.view(np.int16))))
    np.testing.assert_array_equal(have[finite], values[finite].astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_append(dtype):
    rng = fresh_rng()
    cache = jnp.asarray(rng.integers(-100, 100, (2, 3, 64, 128)), dtype)
    new = jnp.asarray(rng.integers(-100, 100, (2, 3, 1, 128)), dtype)
    slots = jnp.asarray([[[0], [-1], [63]], [[64], [17], [40]]], jnp.int32)
    want = append_xla(cache, new, slots)
    for interpret in (True, STRICT):
        np.testing.assert_array_equal(append_tpu(cache, new, slots, interpret=interpret), want)


@pytest.mark.slow
def test_tables_too_large_for_smem_run_in_several_launches(monkeypatch):
    from pallas_kernels.decode_attention import tpu

    calls = []
    real = tpu._launch
    monkeypatch.setattr(tpu, "_SMEM_ENTRIES", 20)
    monkeypatch.setattr(tpu, "_launch", lambda *a: calls.append(1) or real(*a))
    compare_decode(True, slots=256, page=32)
    assert len(calls) == 2


@pytest.mark.slow
def test_dense_heads_keep_their_slots_across_launches(monkeypatch):
    from pallas_kernels.decode_attention import tpu

    monkeypatch.setattr(tpu, "_SMEM_ENTRIES", 4)
    compare_decode(True, slots=256, blocks=64)
