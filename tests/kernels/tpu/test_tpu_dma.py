"""Bytes that the TPU decode kernel moves, against the fewest possible and against what it declares."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from launch.aot_kernels import decode_call
from pallas_kernels import formats
from pallas_kernels.decode_attention import tpu
from tests.kernels.tpu import dma

BATCH, Q_HEADS, KV_HEADS, DIM, SLOTS, PAGE = 2, 8, 2, 128, 8192, 128


def store(fmt: str, paged: bool) -> formats.KVStore:
    lead = (BATCH * KV_HEADS * SLOTS // PAGE,) if paged else (BATCH, KV_HEADS)
    x = jnp.zeros((*lead, PAGE if paged else SLOTS, DIM), jnp.bfloat16)
    return formats.encode(x, x, fmt)


def shuffled_table() -> jnp.ndarray:
    pages = np.random.default_rng(0).permutation(BATCH * KV_HEADS * SLOTS // PAGE)
    return jnp.asarray(pages.reshape(BATCH, KV_HEADS, -1), jnp.int32)


def measure(fmt: str, lengths, paged: bool = False, **options) -> tuple[int, dma.Call]:
    q = jnp.zeros((BATCH, Q_HEADS, 1, DIM), jnp.bfloat16)
    table = shuffled_table() if paged else None
    lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (BATCH, KV_HEADS))
    (call,) = dma.capture(tpu, decode_call, q, store(fmt, paged), lengths, table=table, **options)
    return sum(call.traffic()), call


def minimum(fmt: str, slots: int) -> float:
    """Every stored byte of `slots` slots once, the queries in and the outputs out."""
    stored = BATCH * KV_HEADS * slots * formats.bytes_per_slot(fmt, DIM)
    return stored + BATCH * Q_HEADS * DIM * (2 + 4)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("fmt", formats.FORMATS)
def test_a_full_cache_is_read_once(fmt, paged):
    moved, call = measure(fmt, SLOTS, paged)
    assert moved >= minimum(fmt, SLOTS) - BATCH * Q_HEADS * DIM * 6
    assert moved <= 1.15 * minimum(fmt, SLOTS)
    assert abs(call.cost.bytes_accessed - moved) <= 0.02 * moved, "cost_estimate declares what the maps fetch"


def test_share_of_bf16():
    full, _ = measure("dense", SLOTS)
    for fmt, share in (("fp8_e4m3", 0.53), ("int8", 0.53), ("int4", 0.30), ("int2", 0.18)):
        moved, _ = measure(fmt, SLOTS)
        assert moved <= share * full, fmt


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_bytes_follow_the_lengths(paged):
    full, _ = measure("dense", SLOTS, paged)
    fifth, _ = measure("dense", SLOTS // 5, paged)
    assert fifth <= 0.26 * full
    uneven, _ = measure("dense", [[SLOTS, SLOTS // 8], [1, 0]], paged)
    assert uneven <= 0.35 * full


def test_a_block_table_reads_its_blocks_and_a_window_its_span():
    full, _ = measure("dense", SLOTS)
    blocks = np.full((BATCH, KV_HEADS, 8), -1, np.int32)
    blocks[..., :6] = np.sort(np.random.default_rng(1).permutation(SLOTS // PAGE)[:6])
    tenth, _ = measure("dense", SLOTS, blocks=jnp.asarray(blocks), block_size=PAGE)
    assert tenth <= 1.15 * (6 * PAGE / SLOTS) * full
    last = jnp.full((BATCH, 1), SLOTS - 1, jnp.int32)
    window, _ = measure("dense", SLOTS, q_positions=last, window=1000)
    assert window <= 2 * 1024 / SLOTS * full * 1.15


def test_returning_mass_adds_one_number_per_query_row_and_slot():
    full, _ = measure("dense", SLOTS)
    with_mass, call = measure("dense", SLOTS, return_mass=True)
    assert with_mass - full == BATCH * KV_HEADS * SLOTS * 8 * 4
    assert abs(call.cost.bytes_accessed - with_mass) <= 0.02 * with_mass
