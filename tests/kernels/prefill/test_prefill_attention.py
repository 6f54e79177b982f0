"""Prefill attention against a float64 loop: every implementation that this machine can run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.prefill_attention import BlockTable, block_table, prefill_attention
from pallas_kernels.prefill_attention.reference import prefill_attention_xla
from tests.kernels.prefill.attention_oracle import (
    aligned_case,
    attention,
    fresh_rng,
    relative_error,
    scattered_case,
)

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
STATIC = ("scale", "window", "softcap", "causal_aligned", "return_lse", "implementation")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(q, k, v, **kwargs):
    return prefill_attention(q, k, v, **kwargs)


def check(case, dtype="float32", scale=0.3, implementation=None, **oracle_extra):
    q, k, v = (jnp.asarray(x, dtype) for x in (case.q, case.k, case.v))
    options = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.options.items()}
    out, lse = run(
        q, k, v, q_positions=jnp.asarray(case.q_positions), k_positions=jnp.asarray(case.k_positions),
        scale=scale, return_lse=True, implementation=implementation, **options,
    )  # fmt: skip
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    known = {n: x for n, x in case.options.items() if n not in ("causal_aligned", "blocks")}
    want, want_lse, _ = attention(
        q, k, v, case.q_positions, case.k_positions, scale=scale, **known, **oracle_extra
    )
    assert relative_error(out, want) <= TOLERANCE[dtype]
    assert relative_error(lse, want_lse) <= TOLERANCE[dtype]
    return out, lse


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 2.0}], ids=str)
def test_aligned_ragged(dtype, options):
    check(aligned_case(fresh_rng(), lengths=[40, 23], **options), dtype)


def test_left_padding_and_row_of_length_zero_and_one():
    check(aligned_case(fresh_rng(), batch=3, lengths=[17, 0, 1], left=True))


@pytest.mark.parametrize("options", [{}, {"window": 11, "softcap": 3.0}], ids=str)
def test_scattered_slots_per_head(options):
    check(scattered_case(fresh_rng(), **options))


def test_packed_prompts():
    rng = fresh_rng()
    case = aligned_case(rng, batch=1, tokens=24)
    segments = np.repeat(np.arange(3, dtype=np.int32), 8)[None]
    positions = np.tile(np.arange(8, dtype=np.int32), 3)[None]
    case.q_positions = case.k_positions = positions
    case.options.update(q_segments=segments, k_segments=segments)
    check(case)


def test_segmented_loops_and_band_agree_with_the_oracle():
    """Small blocks force the loops that long prompts take: key ranges per part, and the moving band."""
    rng = fresh_rng()
    for window in (None, 5):
        case = aligned_case(rng, batch=1, q_heads=2, kv_heads=1, tokens=67, lengths=[61])
        out, lse = jax.jit(
            lambda q, k, v, pos, w=window: prefill_attention_xla(
                q, k, v, q_positions=pos, k_positions=pos, scale=0.3, window=w, causal_aligned=True, block_q=4
            )
        )(*(jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v)), jnp.asarray(case.q_positions))
        want, want_lse, _ = attention(
            case.q, case.k, case.v, case.q_positions, case.k_positions, scale=0.3, window=window
        )
        assert relative_error(out, want) <= 2e-5
        assert relative_error(lse, want_lse) <= 2e-5


@pytest.mark.parametrize("kind", ["huge", "equal"])
def test_adversarial_logits(kind):
    case = aligned_case(fresh_rng(), tokens=20)
    if kind == "huge":
        case.k[:, :, 5] *= 1e4
    else:
        case.k[:] = 0.0
    check(case)


def test_large_positions():
    """Positions above 2**16 with a window: int32 arithmetic throughout."""
    case = aligned_case(fresh_rng(), tokens=30, window=9)
    case.q_positions = case.k_positions = case.q_positions + 70_000
    check(case)


@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 1), (6, 2), (3, 3)]),
    st.integers(1, 20),
    st.integers(1, 33),
    st.sampled_from([8, 80]),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=12, deadline=None)
def test_any_shape(batch, heads, tokens, slots, dim, window, seed):
    rng = np.random.default_rng(seed)
    check(
        scattered_case(
            rng,
            batch=batch,
            q_heads=heads[0],
            kv_heads=heads[1],
            tokens=tokens,
            slots=slots,
            dim=dim,
            window=window,
        )
    )


def table_allows(table: BlockTable):
    indices = np.asarray(table.indices)

    def allowed(b, h, t, s):
        rows = indices[min(b, indices.shape[0] - 1), min(h, indices.shape[1] - 1)]
        return s // table.block_k in rows[t // table.block_q]

    return allowed


@pytest.mark.parametrize("ragged", [False, True])
def test_block_sparse(ragged):
    rng = fresh_rng()
    tokens = 43 if ragged else 48
    keep = rng.random((2, 4, -(-tokens // 8), -(-tokens // 16))) < 0.5
    table = block_table.from_mask(jnp.asarray(keep), block_q=8, block_k=16)
    case = aligned_case(rng, tokens=tokens, lengths=[tokens, 20], blocks=table)
    check(case, allowed=table_allows(table))


@pytest.mark.parametrize("batch,heads", [(2, 4), (1, 1)])
def test_block_sparse_narrow_and_in_any_order(batch, heads):
    """A table of few columns is gathered; a wide one (above) is a mask. Both in a packed, windowed, scattered call."""
    rng = fresh_rng()
    picked = rng.permuted(np.tile(np.arange(6), (batch, heads, 6, 1)), axis=-1)[..., :2].astype(np.int32)
    picked[..., 1] = np.where(rng.random(picked.shape[:-1]) < 0.3, -1, picked[..., 1])
    table = BlockTable(jnp.asarray(picked), 8, 8)
    check(aligned_case(rng, tokens=45, lengths=[45, 20], blocks=table), allowed=table_allows(table))
    check(scattered_case(rng, tokens=45, slots=48, window=20, blocks=table), allowed=table_allows(table))


def test_patterns_cover_what_they_name():
    tokens, bq, bk = 64, 8, 8
    t, s = np.meshgrid(np.arange(tokens), np.arange(tokens), indexing="ij")

    def covered(table, b=0, h=0):
        rows = np.asarray(table.indices)[b, h]
        return np.array([[s_ // bk in rows[t_ // bq] for s_ in range(tokens)] for t_ in range(tokens)])

    table = block_table.a_shape(tokens, sink=3, window=10, block_q=bq, block_k=bk)
    pattern = ((s < 3) | (t - s < 10)) & (s <= t)
    assert (covered(table) >= pattern).all()
    assert not covered(table)[63, 16], "far from sink and window"
    assert table.indices.shape[-1] < tokens // bk

    vertical = jnp.asarray([[[0, 17, -1]]], jnp.int32)
    slash = jnp.asarray([[[0, 1, 30]]], jnp.int32)
    table = block_table.vertical_slash(vertical, slash, tokens, width=8, block_q=bq, block_k=bk)
    pattern = (np.isin(s, [0, 17]) | np.isin(t - s, [0, 1, 30])) & (s <= t)
    assert (covered(table) >= pattern).all()
    assert not covered(table)[63, 8]

    scores = jnp.asarray(fresh_rng().normal(size=(1, 1, 8, 8)), jnp.float32)
    table = block_table.top_k(scores, 3, block_q=bq, block_k=bk)
    row = np.asarray(table.indices)[0, 0, 7]
    best = 1 + int(np.argmax(np.asarray(scores)[0, 0, 7, 1:7]))
    assert set(row.tolist()) == {0, 7, best}
    assert set(np.asarray(table.indices)[0, 0, 0].tolist()) == {0, -1}


def test_gradient_of_queries():
    """Against softmax's derivative written out in float64: dS = P (dP - sum P dP), dQ = scale dS K."""
    case = aligned_case(fresh_rng(), batch=1, tokens=10)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v))
    pos, scale = jnp.asarray(case.q_positions), 0.3

    def loss(q):
        out = run(q, k, v, q_positions=pos, k_positions=pos, scale=scale, causal_aligned=True)
        return (out**2).sum()

    groups = case.q.shape[1] // case.k.shape[1]
    keys, values = (np.repeat(x, groups, axis=1) for x in (case.k, case.v))
    seen = case.q_positions[:, None, :, None] >= case.k_positions[:, None, None, :]
    logits = np.where(seen, scale * case.q @ keys.swapaxes(2, 3), -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = 2 * (p @ values) @ values.swapaxes(2, 3)
    want = scale * (p * (d_p - (p * d_p).sum(-1, keepdims=True))) @ keys
    assert relative_error(jax.grad(loss)(q), want) < 2e-5


def test_memory_stays_below_the_score_matrix():
    """A 16k prompt on 2 heads: scores alone would be 2 GiB, the compiled program needs a small part of it."""
    tokens = 16384
    x = jax.ShapeDtypeStruct((1, 2, tokens, 64), jnp.float32)
    pos = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    compiled = run.lower(x, x, x, q_positions=pos, k_positions=pos, scale=1.0, causal_aligned=True).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 << 20


BAD = {
    "heads": (dict(q=(1, 3, 4, 8)), "q_heads=3 is not a multiple of kv_heads=2"),
    "head_dim": (dict(k=(1, 2, 4, 16)), "k has shape"),
    "positions": (dict(q_positions=(1, 5)), "q_positions has shape"),
    "window": (dict(window=0), "window=0"),
    "softcap": (dict(softcap=-1.0), "softcap=-1.0"),
    "implementation": (dict(implementation="nope"), "unknown implementation 'nope'"),
    "aligned": (dict(k=(1, 2, 6, 8), causal_aligned=True), "tokens == slots"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    shapes = {"q": (1, 4, 4, 8), "k": (1, 2, 4, 8), "q_positions": (1, 4)}
    shapes.update({n: s for n, s in changes.items() if n in shapes})
    kwargs = {n: s for n, s in changes.items() if n not in shapes}
    k = jnp.zeros(shapes["k"])
    with pytest.raises(ValueError, match="prefill_attention: .*" + message.replace("[", r"\[")):
        prefill_attention(
            jnp.zeros(shapes["q"]), k, k, q_positions=jnp.zeros(shapes["q_positions"], jnp.int32),
            k_positions=jnp.zeros(k.shape[::2], jnp.int32), scale=1.0, **kwargs,
        )  # fmt: skip


def test_mixed_dtype_is_refused():
    q = jnp.zeros((1, 2, 4, 8))
    pos = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="k has dtype bfloat16, q has float32"):
        prefill_attention(q, q.astype(jnp.bfloat16), q, q_positions=pos, k_positions=pos, scale=1.0)
