"""The Mosaic GPU kernels of prefill and column mass: run on a Hopper GPU, and lowered everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.observe import column_mass
from pallas_kernels.observe.gpu import column_mass_gpu
from pallas_kernels.prefill_attention import aligned, block_table, prefill_attention
from pallas_kernels.prefill_attention.gpu import prefill_attention_gpu
from tests.kernels.prefill.attention_oracle import (
    aligned_case,
    fresh_rng,
    relative_error,
    scattered_case,
)

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")

# head_dim, tokens, lengths, left padding, options
CASES = {
    "plain": (128, 384, None, False, {}),
    "ragged": (128, 500, [500, 77], False, {}),
    "left": (128, 500, [500, 77], True, {}),
    "empty_row": (128, 256, [256, 0], False, {}),
    "one_token": (128, 256, [1, 129], False, {}),
    "window": (128, 700, [700, 650], False, {"window": 130}),
    "softcap": (128, 300, None, False, {"softcap": 3.0}),
    "d64": (64, 700, [700, 300], False, {}),
    "d80": (80, 300, None, False, {}),
    "d96": (96, 300, None, False, {"window": 33}),
    "d192": (192, 300, None, False, {}),
    "d256": (256, 300, [300, 290], False, {}),
    "group1": (128, 256, None, False, {}),
}


def make(name, q_heads=4):
    dim, tokens, lengths, left, options = CASES[name]
    kv_heads = q_heads if name == "group1" else 1
    return aligned_case(
        fresh_rng(), q_heads=q_heads, kv_heads=kv_heads, tokens=tokens, dim=dim, lengths=lengths, left=left,
        **options,
    )  # fmt: skip


def both(case, dtype=jnp.bfloat16, scale=0.1):
    """The kernel on 16-bit operands, and the XLA path on the same values in float32."""
    low = [jnp.asarray(x, dtype) for x in (case.q, case.k, case.v)]
    high = [x.astype(jnp.float32) for x in low]
    pos, k_pos = jnp.asarray(case.q_positions), jnp.asarray(case.k_positions)
    have, want = (
        jax.jit(
            lambda q, k, v, impl=impl: prefill_attention(
                q,
                k,
                v,
                q_positions=pos,
                k_positions=k_pos,
                scale=scale,
                return_lse=True,
                implementation=impl,
                **case.options,
            )
        )(*operands)
        for impl, operands in (("mosaic_gpu", low), ("xla", high))
    )
    return low, high, pos, have, want


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_hardware(name):
    case = make(name)
    low, high, pos, (out, lse), (want, want_lse) = both(case)
    assert relative_error(out, want) <= 1e-2
    assert relative_error(lse, want_lse) <= 1e-3
    shared = dict(q_positions=pos, k_positions=pos, scale=0.1, **case.options)
    mass = jax.jit(lambda q, k, lse: column_mass(q, k, lse=lse, implementation="mosaic_gpu", **shared))(
        low[0], low[1], lse
    )
    want_mass = jax.jit(lambda q, k: column_mass(q, k, implementation="xla", **shared))(*high[:2])
    assert relative_error(mass, want_mass) <= 1e-2


@pytest.mark.gpu
@needs_gpu
def test_adversarial_on_hardware():
    for kind in ("huge", "equal"):
        case = make("ragged")
        if kind == "huge":
            case.k[:, :, 5] *= 1e4
        else:
            case.k[:] = 0.0
        _, _, _, (out, lse), (want, want_lse) = both(case, jnp.float16)
        assert relative_error(out, want) <= 1e-2
        assert relative_error(lse, want_lse) <= 1e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_block_sparse_on_hardware(shape):
    rng = fresh_rng()
    keep = rng.random((*shape, 8, 4)) < 0.6
    table = block_table.from_mask(jnp.asarray(keep), block_q=128, block_k=256)
    case = aligned_case(rng, q_heads=4, kv_heads=2, tokens=1000, dim=128, lengths=[1000, 300], blocks=table)
    _, _, _, (out, lse), (want, want_lse) = both(case)
    assert relative_error(out, want) <= 1e-2
    assert relative_error(lse, want_lse) <= 1e-3


@pytest.mark.gpu
@needs_gpu
def test_packed_prompts_on_hardware():
    case = make("plain")
    lengths = [100, 156, 128]
    segments = np.repeat(np.arange(3, dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    case.q_positions = case.k_positions = np.stack([positions, positions])
    stacked = jnp.asarray(np.stack([segments, segments]))
    case.options.update(q_segments=stacked, k_segments=stacked)
    _, _, _, (out, _), (want, _) = both(case)
    assert relative_error(out, want) <= 1e-2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 90])
def test_a_chunk_on_a_cache_on_hardware(window):
    """Slots in any order and different per head; then an ordered cache, whose leading blocks need no mask."""
    case = scattered_case(fresh_rng(), tokens=200, slots=700, dim=128, window=window)
    _, _, _, (out, lse), (want, want_lse) = both(case)
    assert relative_error(out, want) <= 1e-2
    assert relative_error(lse, want_lse) <= 1e-3
    case.k_positions = np.broadcast_to(np.arange(700, dtype=np.int32), case.k_positions.shape).copy()
    case.k_positions[..., 690:] = -1
    case.k, case.v = np.nan_to_num(case.k), np.nan_to_num(case.v)
    case.q_positions = np.stack([np.arange(490, 690), np.arange(300, 500)]).astype(np.int32)
    _, _, _, (out, lse), (want, want_lse) = both(case)
    assert relative_error(out, want) <= 1e-2
    assert relative_error(lse, want_lse) <= 1e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("ordered", [False, True])
def test_a_chunk_by_block_table_on_hardware(ordered):
    keep = jnp.asarray(fresh_rng().random((2, 4, 2, 6)) < 0.6)
    table = block_table.from_mask(keep, block_q=128, block_k=128, ordered=ordered)
    case = scattered_case(fresh_rng(), tokens=200, slots=700, dim=128, blocks=table)
    _, _, _, (out, lse), (want, want_lse) = both(case)
    assert relative_error(out, want) <= 1e-2
    assert relative_error(lse, want_lse) <= 1e-3


def masked_blocks(low, plan, tile_q, tile_k):
    """What a plan makes a kernel compute: pairs covered, and pairs covered without a mask."""
    batch, tokens = low.shape
    covered = np.zeros((batch, tokens, tokens), bool)
    unmasked = np.zeros_like(covered)
    steps = np.asarray(plan.steps)[:, 0]
    for b in range(batch):
        for tile in range(tokens // tile_q):
            rows = slice(tile * tile_q, (tile + 1) * tile_q)
            head, body, count = steps[b, tile]
            assert 0 <= head <= body <= count
            for i in range(count):
                at = int(plan.first[b, tile]) + i if plan.table is None else int(plan.table[0, 0, tile, i])
                cols = slice(at * tile_k, (at + 1) * tile_k)
                assert not covered[b, rows, cols].any(), "a block is read once"
                covered[b, rows, cols] = True
                unmasked[b, rows, cols] = head <= i < body
    return covered, unmasked


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("lengths", [[64, 64], [64, 17], [1, 0]])
@pytest.mark.parametrize("left", [False, True])
def test_plans_cover_every_visible_pair_and_mask_where_needed(window, lengths, left):
    case = aligned_case(fresh_rng(), tokens=64, dim=8, lengths=lengths, left=left)
    low = aligned.lower_bounds(jnp.asarray(case.q_positions), window, None)
    t, s = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    pos = case.q_positions
    visible = (pos[:, None, :] >= 0) & (pos[:, None, :] <= pos[:, :, None])
    if window is not None:
        visible &= pos[:, None, :] > pos[:, :, None] - window
    bounds = np.asarray(low)[:, :, None]
    np.testing.assert_array_equal((s >= bounds) & (s <= t), visible)
    for tile_q, tile_k in ((16, 8), (8, 16), (16, 16)):
        covered, unmasked = masked_blocks(low, aligned.dense_plan(low, tile_q, tile_k), tile_q, tile_k)
        assert (covered >= visible).all() and (visible >= unmasked).all()
        table = block_table.from_mask(jnp.ones((1, 1, 4, 4), bool), block_q=16, block_k=16)
        plan = aligned.sparse_plan(low, table, tile_q, tile_k)
        covered, unmasked = masked_blocks(low, plan, tile_q, tile_k)
        assert (covered >= visible).all() and (visible >= unmasked).all()
    if window is None and not left and lengths == [64, 64]:
        assert unmasked.sum() > 0.3 * visible.sum(), "most of a plain prompt needs no mask"


def test_plans_of_ordered_tables_are_those_of_shuffled_ones():
    rng = fresh_rng()
    keep = rng.random((2, 3, 4, 4)) < 0.7
    keep &= np.tril(np.ones((4, 4), bool))
    rising = block_table.from_mask(jnp.asarray(keep), block_q=16, block_k=16, ordered=True)
    shuffled = rng.permuted(np.asarray(rising.indices), axis=-1)
    other = block_table.BlockTable(jnp.asarray(shuffled), 16, 16)
    case = aligned_case(rng, tokens=64, dim=8, lengths=[64, 21])
    low = aligned.lower_bounds(jnp.asarray(case.q_positions), None, None)
    plans = [aligned.sparse_plan(low, t, 8, 8) for t in (rising, other)]
    plans += [aligned.sparse_positions_plan(t, 64, 64, 2, 8, 8) for t in (rising, other)]
    for a, b in (plans[:2], plans[2:]):
        np.testing.assert_array_equal(np.asarray(a.steps), np.asarray(b.steps))
        used = np.arange(a.table.shape[-1]) < np.asarray(a.steps)[..., 2:]
        np.testing.assert_array_equal(np.asarray(a.table)[used], np.asarray(b.table)[used])
    chunk = np.asarray(plans[2].steps)
    assert (chunk == 2 * np.repeat(keep.sum(-1), 2, axis=-1)[..., None]).all(), (
        "two tiles a block, all masked"
    )
    np.testing.assert_array_equal(np.asarray(block_table.to_mask(other, 4)), keep)


@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("ordered", [False, True])
def test_plans_of_scattered_slots(window, ordered):
    case = scattered_case(fresh_rng(), tokens=32, slots=48, fill=0.6)
    if ordered:
        case.k_positions[:] = np.where(np.arange(48) < 44, np.arange(48), -1)
        case.q_positions = np.stack([np.arange(12, 44), np.arange(10, 42)]).astype(np.int32)
    keys, queries = case.k_positions[:, :, None, :], case.q_positions[:, None, :, None]
    visible = (keys >= 0) & (keys <= queries)
    if window is not None:
        visible &= keys > queries - window
    plan = aligned.positions_plan(jnp.asarray(case.q_positions), jnp.asarray(case.k_positions), window, 8, 8)
    for b, tile in np.ndindex(2, 4):
        head, body, count = np.asarray(plan.steps)[b, 0, tile]
        rows = visible[b, :, tile * 8 : tile * 8 + 8]
        assert head == 0 and body <= count
        assert rows[..., : body * 8].all() and not rows[..., count * 8 :].any()
    if ordered and window is None:
        assert np.asarray(plan.steps)[0, 0, 3, 1] == 4, "36 // 8 blocks lie wholly before the last tile"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_kernels_lower_without_a_gpu(head_dim):
    """Mosaic GPU accepts shapes, layouts and shared memory; the CUDA compiler is not reached."""
    q = jax.ShapeDtypeStruct((1, 4, 512, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 1, 512, head_dim), jnp.bfloat16)
    pos = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    lse = jax.ShapeDtypeStruct((1, 4, 512), jnp.float32)

    def prefill(q, k, v, pos):
        return prefill_attention_gpu(
            q, k, v, q_positions=pos, k_positions=pos, scale=0.1, window=100, softcap=2.0, causal_aligned=True
        )

    def chunk(q, k, v, pos):
        return prefill_attention_gpu(q, k, v, q_positions=pos, k_positions=pos, scale=0.1, window=100)

    def sparse_chunk(q, k, v, pos):
        table = block_table.from_mask(jnp.ones((1, 4, 4, 4), bool), block_q=128, block_k=128, ordered=True)
        return prefill_attention_gpu(
            q, k, v, q_positions=pos, k_positions=pos, scale=0.1, blocks=table, partial=True
        )

    def column(q, k, pos, lse):
        return column_mass_gpu(q, k, q_positions=pos, lse=lse, scale=0.1)

    prompt = (q, k, k, pos)
    for fn, args in ((prefill, prompt), (chunk, prompt), (sparse_chunk, prompt), (column, (q, k, pos, lse))):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


def test_refusals_name_the_reason():
    q = jnp.zeros((1, 2, 128, 64), jnp.bfloat16)
    pos = jnp.zeros((1, 128), jnp.int32)
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run: it needs"):
        prefill_attention(
            q.astype(jnp.float32), q.astype(jnp.float32), q.astype(jnp.float32), q_positions=pos,
            k_positions=pos, scale=1.0, implementation="mosaic_gpu",
        )  # fmt: skip
