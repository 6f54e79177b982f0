"""`code_scores` against a float64 loop: XLA, the Hopper kernel's inline function run by numpy, and the kernel itself."""

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.code_scores import code_scores, gpu, has_kernel
from pallas_kernels.code_scores.reference import code_scores_xla
from pallas_kernels.platform import require_hopper


def draw(seed, batch, kv_heads, group, parts, words, bits, slots, lengths=None, spread=1.0):
    """(tables, codes, packed codes, lengths) as numpy arrays; what lies beyond a length are codes like the others."""
    rng = np.random.default_rng(seed)
    tables = (spread * rng.standard_normal((batch, kv_heads, group, parts, words))).astype(np.float32)
    codes = rng.integers(0, words, (batch, kv_heads, slots, parts))
    per = 8 // bits
    packed = sum(codes[..., i::per] << (bits * i) for i in range(per)).astype(np.uint8)
    if lengths is None:
        lengths = rng.integers(0, slots + 1, (batch, kv_heads))
    return tables, codes, packed, np.broadcast_to(lengths, (batch, kv_heads)).astype(np.int32)


def expected(tables, codes, lengths, block):
    """The same in float64, a loop over heads and queries."""
    batch, kv_heads, group, parts, _ = tables.shape
    slots = codes.shape[2]
    best, lse = (
        np.full((batch, kv_heads, group, slots // block), -np.inf),
        np.full((batch, kv_heads, group), -np.inf),
    )
    for b, h, g in np.ndindex(batch, kv_heads, group):
        n = lengths[b, h]
        logits = np.full(slots, -np.inf)
        logits[:n] = tables[b, h, g].astype(np.float64)[np.arange(parts), codes[b, h, :n]].sum(-1)
        best[b, h, g] = logits.reshape(-1, block).max(-1)
        if n:
            lse[b, h, g] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return best, lse


def tolerance(tables):
    """Half a level of every part: [batch, kv_heads, group, 1]; and rounding of float32."""
    span = (tables.max(-1) - tables.min(-1)).sum(-1)
    return (span / 65535 * tables.shape[3] / 2 * 1.001 + 1e-4)[..., None]


def check(got, want, tables):
    (best, lse), (want_best, want_lse), most = (
        [np.asarray(x, np.float64) for x in got],
        want,
        tolerance(tables),
    )
    for x, y, error in ((best, want_best, most), (lse, want_lse, most[..., 0])):
        assert x.shape == y.shape
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        seen = ~np.isneginf(y)
        off = np.abs(np.where(seen, x, 0) - np.where(seen, y, 0))
        assert (off <= error).all(), (off.max(), error.min())


# group, parts, words, bits, slots, block
CASES = [
    (4, 16, 16, 4, 512 + 64, 8),
    (1, 2, 16, 4, 514, 2),
    (2, 6, 9, 4, 520, 1),
    (3, 10, 16, 4, 640, 64),
    (8, 4, 256, 8, 288, 16),
    (5, 3, 64, 8, 300, 4),
    (6, 1, 256, 8, 256, 32),
    (7, 8, 16, 4, 98, 1),
]


@pytest.mark.parametrize("case", [*CASES, (4, 8, 2, 1, 40, 8), (3, 4, 4, 2, 41, 1)])
def test_xla(case):
    group, parts, words, bits, slots, block = case
    tables, codes, packed, lengths = draw(0, 2, 2, *case[:-1], lengths=[[0, 1], [slots, slots - 3]])
    got = code_scores(
        *map(jnp.asarray, (tables, packed, lengths)), bits=bits, block=block, implementation="xla"
    )
    check(got, expected(tables, codes, lengths, block), tables)


def emulate(monkeypatch, tables, packed, lengths, bits, block, splits, ahead):
    """What the kernel writes, its CTAs run one after the other by numpy, and merged as `code_scores_gpu` does."""
    batch, kv_heads, group, parts, _ = tables.shape
    rows, slots = batch * kv_heads, packed.shape[2]
    plan = gpu.Plan(bits, parts, group, slots, block, ahead)

    def kernel(given, count, steps, used):
        def call(levels, codes, step, base, lengths):
            best = np.full((rows, group, slots // block), np.nan, np.float32)
            lse = np.full((rows, group, used * 4), np.nan, np.float32)
            monkeypatch.setattr(gpu, "ptx", machine := emulator.Machine(2 * plan.table_stride + 256))
            for name in ("Reg", "f32", "i32"):
                monkeypatch.setattr(gpu, name, getattr(machine, name))
            for row in range(rows):
                for split in range(used):
                    ends = (split * steps // used, (split + 1) * steps // used)
                    gpu._scan(plan, used * 4)(None, np.array(levels[row]), np.array(codes[row]), np.array(step[row]), np.array(base[row]), best[row],
                                    lse[row], 16, int(lengths[row]), *ends, split, split % 2)  # fmt: skip
            return jnp.asarray(best), jnp.asarray(lse)

        assert (given, count) == (plan, rows)
        return call

    def loop(start, end, carry, body):
        for i in range(int(start.value[0].astype(np.int32)), int(end.value[0].astype(np.int32))):
            carry = body(emulator.const(i, "r"), carry)
        return carry

    monkeypatch.setattr(gpu, "_kernel", kernel)
    monkeypatch.setattr(gpu, "_loop", loop)
    got = gpu.code_scores_gpu(*map(jnp.asarray, (tables, packed, lengths)), bits=bits, block=block, splits=splits,
                              ahead=ahead)  # fmt: skip
    assert not any(np.isnan(x).any() for x in got)
    monkeypatch.undo()
    assert gpu.ptx is ptx
    return got


@pytest.mark.parametrize("case", CASES)
def test_the_hopper_kernel_by_numpy(monkeypatch, case):
    group, parts, words, bits, slots, block = case
    tables, codes, packed, lengths = draw(1, 1, 2, *case[:-1], lengths=[slots, slots * 2 // 3])
    got = emulate(monkeypatch, tables, packed, lengths, bits, block, splits=2, ahead=2)
    check(got, expected(tables, codes, lengths, block), tables)


@pytest.mark.parametrize(
    "length, splits, ahead, spread", [(0, 1, 1, 1.0), (1, 2, 3, 1.0), (256, 3, 1, 30.0), (257, 1, 2, 1e-3)]
)
def test_lengths_splits_and_magnitudes_by_numpy(monkeypatch, length, splits, ahead, spread):
    tables, codes, packed, lengths = draw(2, 1, 1, 4, 4, 16, 4, 520, lengths=length, spread=spread)
    got = emulate(monkeypatch, tables, packed, lengths, 4, 8, splits, ahead)
    check(got, expected(tables, codes, lengths, 8), tables)


def test_levels_never_overflow_16_bits():
    """Parts whose largest entries round up: their sum is at most 65,535."""
    for seed in range(20):
        tables, *_ = draw(seed, 1, 3, 3, 16, 16, 4, 2)
        words, step, base = gpu.fixed_point(jnp.asarray(tables), 16, 2)
        levels = np.asarray(words)
        halves = np.stack([levels & 0xFFFF, levels >> 16], -1).reshape(*levels.shape[:-1], 4)
        assert halves.max(-2).sum(-2).max() <= 65535
        assert (halves[..., 3] == 0).all()
        back = np.asarray(step, np.float64)[..., None, None] * np.moveaxis(halves, -1, 2)[:, :, :3]
        got = (back.sum(-2).max(-1), np.asarray(base))
        assert got[0].shape == (1, 3, 3) and np.isfinite(got[1]).all()
        low = tables.min(-1, keepdims=True)
        np.testing.assert_allclose(back, tables - low, atol=float(np.asarray(step).max()) * 0.51)


def test_equal_tables_and_the_empty_head():
    tables = np.zeros((1, 1, 2, 2, 16), np.float32)
    best, lse = code_scores_xla(*map(jnp.asarray, (tables, np.zeros((1, 1, 8, 1), np.uint8), np.zeros((1, 1), np.int32))),
                                bits=4, block=4)  # fmt: skip
    assert np.isneginf(best).all() and np.isneginf(lse).all()


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(bits=3), "whole bytes"),
        (dict(block=7), "divide"),
        (dict(lengths=np.zeros((1, 1), np.int64)), "int32"),
        (dict(codes=np.zeros((1, 1, 16, 3), np.uint8)), "codes"),
        (dict(implementation="mosaic_gpu"), "cannot run"),
        (dict(tables=np.zeros((1, 1, 2, 4, 17), np.float32)), "17 words"),
    ],
)
def test_bad_operands(change, word):
    args = dict(tables=np.zeros((1, 1, 2, 4, 16), np.float32), codes=np.zeros((1, 1, 16, 2), np.uint8),
                lengths=np.zeros((1, 1), np.int32), bits=4) | change  # fmt: skip
    with pytest.raises(ValueError, match=word):
        code_scores(**args)


def test_what_the_kernel_refuses():
    def reason(group=4, parts=16, bits=4, slots=128, block=8):
        tables = jax.ShapeDtypeStruct((1, 1, group, parts, 2**bits), jnp.float32)
        codes = jax.ShapeDtypeStruct((1, 1, slots, parts * bits // 8), jnp.uint8)
        return gpu.unsupported(tables, codes, bits=bits, block=block)

    assert reason() is None and reason(group=1, block=64) is None and reason(bits=8) is None
    for change, word in [(dict(group=9), "groups"), (dict(bits=2), "bits"), (dict(block=128), "block"),
                         (dict(block=24), "block"), (dict(slots=33, block=1), "even"), (dict(bits=8, parts=64), "KiB"),
                         (dict(slots=2**28), "32-bit")]:  # fmt: skip
        assert word in reason(**change)


def test_lowers_to_one_kernel_that_takes_the_codes_as_stored():
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in [((2, 2, 4, 16, 16), jnp.float32), ((2, 2, 1024, 8), jnp.uint8),
                                                      ((2, 2), jnp.int32)]]  # fmt: skip
    run = jax.jit(lambda *a: gpu.code_scores_gpu(*a, bits=4, block=8))
    text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    moving = [x for x in text.splitlines() if "1024x8xui8" in x or "8192xui8" in x]
    assert moving and all("reshape" in x or "@mosaic_gpu" in x or "func.func" in x for x in moving), moving


hopper = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu" or require_hopper() is not None,
                                              reason="needs a Hopper GPU")]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=hopper) for c in [*CASES, (4, 16, 16, 4, 70_000, 8), (4, 64, 16, 4, 512, 16)]],
)
def test_the_hopper_kernel(case):
    seed = np.random.SeedSequence().entropy
    group, parts, words, bits, slots, block = case
    for lengths in (None, [[0, 1, slots], [slots - 1, slots // 2, 3]]):
        tables, codes, packed, lengths = draw(seed, 2, 3, *case[:-1], lengths=lengths, spread=3.0)
        got = code_scores(*map(jnp.asarray, (tables, packed, lengths)), bits=bits, block=block,
                          implementation="mosaic_gpu")  # fmt: skip
        check(got, expected(tables, codes, lengths, block), tables)


@pytest.mark.parametrize("block", [pytest.param(8, marks=hopper)])
def test_the_default(block):
    tables, _, packed, lengths = draw(3, 1, 2, 4, 16, 16, 4, 256)
    text = jax.jit(lambda *a: code_scores(*a, bits=4, block=block)).lower(tables, packed, lengths).as_text()
    assert "@mosaic_gpu" in text and has_kernel(tables, packed, bits=4, block=block)


def test_without_a_gpu_there_is_no_kernel():
    tables, _, packed, _ = draw(3, 1, 2, 4, 16, 16, 4, 256)
    assert has_kernel(tables, packed, bits=4, block=8) is (require_hopper() is None)
    assert not has_kernel(tables, packed, bits=4, block=128)
