"""Decode attention against a float64 loop: formats x layouts x options, on the XLA path."""

import dataclasses
import functools

import decode_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from pallas_kernels.decode_attention import decode_attention, reference
from pallas_kernels.formats import EIGHT_BIT, FORMATS, PACKED_BITS, KVStore, encode

_TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}


@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "block_size", "implementation"))
def run(q, store, lengths, scale, **kw):
    return decode_attention(q, store, lengths=lengths, scale=scale, return_lse=True, return_mass=True, **kw)


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def check(problem, *, dtype=jnp.float32, positions=None, q_positions=None, mask=None, window=None,
          softcap=None, blocks=None, block_size=None, implementation=None):  # fmt: skip
    """Run the entry point on the problem and compare out, lse and mass with the loop."""
    tokens, dim = problem.q.shape[2:]
    scale = dim**-0.5
    valid, order, total = oracle.entries(problem)
    if blocks is not None:
        slots = problem.k.shape[2] - problem.store.residual
        kept = np.zeros(valid.shape, bool)
        kept[..., slots:] = True
        for b, h, i in np.ndindex(blocks.shape):
            if blocks[b, h, i] >= 0:
                kept[b, h, blocks[b, h, i] * block_size :][:block_size] = True
        kept[..., slots:] = True
        valid = valid & kept
    seen = oracle.visibility(total, positions, q_positions, mask, window, tokens, valid, order)
    want = oracle.attention(problem.q, problem.k, problem.v, seen, scale, softcap)
    arrays = dict(positions=positions, q_positions=q_positions, mask=mask, table=problem.table, blocks=blocks)
    arrays = {n: jnp.asarray(a) for n, a in arrays.items() if a is not None}
    got = run(problem.q, problem.store, jnp.asarray(problem.lengths), scale, window=window, softcap=softcap,
              block_size=block_size, implementation=implementation, **arrays)  # fmt: skip
    limit = _TOLERANCE[dtype]
    assert got.out.dtype == jnp.float32
    np.testing.assert_array_equal(np.isinf(got.lse), np.isinf(want[1]))
    some = np.isfinite(want[1])
    assert relative(got.out, want[0]) <= limit
    np.testing.assert_allclose(np.asarray(got.lse)[some], want[1][some], rtol=limit, atol=limit)
    assert relative(got.mass, want[2]) <= limit
    assert (np.asarray(got.mass)[want[2] == 0] == 0).all()


def draft(rng, tokens):
    """A random draft tree: every token sees itself and one earlier token's ancestors."""
    mask = np.eye(tokens, dtype=bool)
    for t in range(1, tokens):
        mask[t] |= mask[rng.integers(0, t)]
    return mask


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("page", [None, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_formats_and_layouts(fmt, page, dtype):
    rng = np.random.default_rng()
    lengths = [[256, 130], [0, 1]]
    problem = oracle.make(rng, fmt=fmt, page=page, dtype=dtype, lengths=lengths, meta=None)
    check(problem, dtype=dtype)


@pytest.mark.parametrize("fmt", FORMATS)
def test_residual_window_joins_the_same_softmax(fmt):
    rng = np.random.default_rng()
    problem = oracle.make(rng, fmt=fmt, residual=16, lengths=[[0, 128], [256, 0]], tokens=2)
    _, _, total = oracle.entries(problem)
    q_positions = np.stack([total.max(1) - 1, total.max(1)], 1).astype(np.int32)
    check(problem, q_positions=q_positions)


@pytest.mark.parametrize("fmt", ["dense", "int8", "int4"])
@pytest.mark.parametrize("page, block_size", [(None, 64), (64, 128), (128, 64)])
def test_block_table_reads_only_its_blocks(fmt, page, block_size):
    rng = np.random.default_rng()
    problem = oracle.make(rng, fmt=fmt, page=page, slots=512, lengths=[[512, 300], [77, 0]])
    blocks = np.full((2, 2, 4), -1, np.int32)
    for b, h in np.ndindex(2, 2):
        n = rng.integers(0, 5)
        blocks[b, h, :n] = rng.permutation(512 // block_size)[:n]
    check(problem, blocks=blocks, block_size=block_size)


@pytest.mark.parametrize("page", [16, 32, 256])
def test_page_sizes(page):
    rng = np.random.default_rng()
    check(oracle.make(rng, page=page, slots=512, fmt="int8" if page == 32 else "dense"))


@pytest.mark.parametrize(
    "group, dim, tokens", [(1, 80, 1), (16, 64, 1), (3, 96, 5), (4, 192, 16), (2, 256, 2)]
)
def test_shapes(group, dim, tokens):
    rng = np.random.default_rng()
    problem = oracle.make(rng, group=group, dim=dim, tokens=tokens, slots=96, lengths=[[96, 40], [17, 50]])
    last = problem.lengths.min(1)[:, None] - tokens
    check(problem, q_positions=(last + np.arange(tokens)).astype(np.int32))


@pytest.mark.parametrize("page", [None, 16])
def test_positions_window_softcap_and_tree(page):
    rng = np.random.default_rng()
    problem = oracle.make(rng, tokens=4, page=page, slots=64, lengths=[[64, 30], [9, 4]])
    positions = np.full((2, 2, 64), -1, np.int32)
    for b, h in np.ndindex(2, 2):
        n = problem.lengths[b, h]
        positions[b, h, :n] = np.sort(rng.choice(60_000, n, replace=False))
        positions[b, h, rng.integers(0, n)] = -1  # an evicted slot
    q_positions = (positions.max((1, 2))[:, None] + np.array([-2, 0, 1, 2])).astype(np.int32)
    q_positions[1, 3] = -1
    check(problem, positions=positions, q_positions=q_positions)
    check(problem, positions=positions, q_positions=q_positions, window=20_000, softcap=3.0)
    mask = np.stack([draft(rng, 4), draft(rng, 4)])
    check(problem, positions=positions, q_positions=q_positions, mask=mask)
    check(problem, mask=mask)
    check(problem, q_positions=np.minimum(q_positions, 40), window=7)


@pytest.mark.parametrize("fmt", ["dense", "fp8_e4m3", "int8", "int2"])
def test_adversarial_logits(fmt):
    rng = np.random.default_rng()

    def one_huge(q, slots):
        k, v = rng.standard_normal((2, 2, 2, slots, q.shape[-1])).astype(np.float32)
        k[:, :, 137] = 40 * q[:, ::2, 0]
        return k, v

    def all_equal(q, slots):
        k, v = np.ones((2, 2, 2, slots, q.shape[-1]), np.float32)
        return k, v

    def tiny_values(q, slots):
        k, v = rng.standard_normal((2, 2, 2, slots, q.shape[-1])).astype(np.float32)
        v *= 10.0 ** rng.uniform(-6, 3, (2, 2, slots, 1)).astype(np.float32)
        return k, v

    for kv in (one_huge, all_equal, tiny_values):
        check(oracle.make(rng, fmt=fmt, make_kv=kv, lengths=[[256, 140], [1, 0]]))


_SHAPES = dict(batch=2, kv_heads=2, group=2, dim=64, slots=128)


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    fmt=st.sampled_from(["dense", "int8"]),
    page=st.sampled_from([None, 64]),
    seed=st.integers(0, 2**31),
)
def test_ragged_lengths(data, fmt, page, seed):
    lengths = data.draw(st.lists(st.integers(0, 128), min_size=4, max_size=4))
    problem = oracle.make(np.random.default_rng(seed), fmt=fmt, page=page,
                          lengths=np.reshape(lengths, (2, 2)), **_SHAPES)  # fmt: skip
    check(problem)


def test_returns_what_was_asked_for():
    problem = oracle.make(np.random.default_rng(), dtype=jnp.bfloat16, lengths=100)
    plain = decode_attention(problem.q, problem.store, lengths=jnp.asarray(problem.lengths), scale=0.1)
    assert plain.dtype == jnp.bfloat16
    both = decode_attention(problem.q, problem.store, lengths=jnp.asarray(problem.lengths), scale=0.1,
                            return_mass=True)  # fmt: skip
    assert both.lse is None and both.out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(both.out, plain)
    np.testing.assert_allclose(both.mass.sum(-1), 1.0, rtol=1e-2)


@pytest.mark.parametrize("fmt", ["dense", "int2"])
def test_mass_per_kv_head_is_the_sum_over_its_group(fmt):
    problem = oracle.make(np.random.default_rng(), fmt=fmt, group=3, residual=8)
    valid, _, _ = oracle.entries(problem)
    want = oracle.attention(problem.q, problem.k, problem.v, valid[:, :, None], 0.1)[2]
    call = jax.jit(functools.partial(decode_attention, scale=0.1, return_mass=True, mass_per="kv_head"))
    got = call(problem.q, problem.store, lengths=jnp.asarray(problem.lengths))
    assert relative(got.mass, want.reshape(2, 2, 3, -1).sum(2)) <= 2e-5


@pytest.mark.parametrize("fmt", ["dense", "int8", "int4"])
def test_step_never_copies_the_cache(fmt):
    """One token on CPU: temporaries stay far below the keys in float32, whatever the format."""
    k = jnp.zeros((1, 4, 8192, 64), jnp.float32)
    store = jax.eval_shape(lambda: encode(k, k, fmt))
    step = jax.jit(lambda q, s, n: decode_attention(q, s, lengths=n, scale=1.0))
    shapes = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.float32), store, jax.ShapeDtypeStruct((1, 4), jnp.int32)
    memory = step.lower(*shapes).compile().memory_analysis()
    # Dense: the branch that blanks NaN in unused slots holds one copy of V, and runs only then.
    assert memory.temp_size_in_bytes < (1.3 if fmt == "dense" else 0.6) * k.nbytes


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(), None),
        (dict(table=99), "pages outside the pool's 19"),
        (dict(lengths=300), "lengths outside 0 to 256 slots"),
        (dict(blocks=4), "blocks outside the 4 of a row"),
        (dict(blocks=3), None),
        (dict(blocks=3, ascend=True), "blocks do not ascend"),
        (dict(ascend=True), None),
    ],
)
def test_values_out_of_range_are_caught_in_debug_mode(change, message):
    problem = oracle.make(np.random.default_rng(), page=64, lengths=100)
    table, lengths = jnp.asarray(problem.table), jnp.asarray(problem.lengths)
    table = table.at[1, 0, 1].set(change.get("table", table[1, 0, 1]))
    lengths = lengths.at[0, 1].set(change.get("lengths", 100))
    blocks = jnp.full((2, 2, 3), -1, jnp.int32).at[0, 0, :2].set(jnp.array([change.get("blocks", 1), 2]))

    def call():
        return decode_attention(problem.q, problem.store, lengths=lengths, scale=0.1, table=table, blocks=blocks,
                                block_size=64, blocks_ascend=change.get("ascend", False))  # fmt: skip

    error, _ = jax.jit(checkify.checkify(call))()
    assert (error.get() is None) if message is None else (message in error.get())


@pytest.mark.parametrize("fmt", [*EIGHT_BIT, *PACKED_BITS])
@pytest.mark.parametrize("page", [None, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_sixteen_bits_in_xla(monkeypatch, fmt, page, dtype):
    """What a GPU without a kernel for the shape runs: codes enter the products as they are; NaN past the lengths."""
    monkeypatch.setattr(reference, "target_platform", lambda: "gpu")
    rng = np.random.default_rng()
    problem = oracle.make(rng, fmt=fmt, dtype=jnp.dtype(dtype), page=page, group=3, slots=512, residual=16,
                          lengths=[[512, 77], [0, 1]])  # fmt: skip
    valid, order, total = oracle.entries(problem)
    seen = oracle.visibility(total, None, None, None, None, 1, valid, order)
    want = oracle.attention(problem.q, problem.k, problem.v, seen, 0.125, None)
    table = None if problem.table is None else jnp.asarray(problem.table)
    got = decode_attention(problem.q, problem.store, lengths=jnp.asarray(problem.lengths), scale=0.125, table=table,
                           return_lse=True, return_mass=True, implementation="xla")  # fmt: skip
    for have, exact in ((got.out, want[0]), (got.mass, want[2])):
        have = np.asarray(have, np.float64)
        assert np.linalg.norm(have - exact) <= 5e-3 * np.linalg.norm(exact)
    some = np.isfinite(want[1])
    assert np.allclose(np.asarray(got.lse)[some], want[1][some], atol=2e-2)
    assert (np.asarray(got.lse)[~some] == -np.inf).all()


def _bad(**change):
    problem = oracle.make(np.random.default_rng(), lengths=100)
    args = dict(q=problem.q, kv=problem.store, lengths=jnp.asarray(problem.lengths), scale=0.1) | change
    return lambda: decode_attention(args.pop("q"), args.pop("kv"), **args)


def _zeros(*shape, dtype=jnp.int32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=_zeros(2, 4, 17, 64, dtype=jnp.float32)), "17 query tokens"),
        (dict(q=_zeros(2, 3, 1, 64, dtype=jnp.float32)), "not a multiple of 2 KV heads"),
        (dict(q=_zeros(2, 4, 1, 64, dtype=jnp.int8)), "q has dtype int8"),
        (dict(q=_zeros(2, 4, 2, 64, dtype=jnp.float32)), "need q_positions"),
        (dict(window=4), "needs q_positions"),
        (dict(blocks=_zeros(2, 2, 1)), "go together"),
        (dict(blocks=_zeros(2, 2, 1), block_size=48), "block_size=48 must divide"),
        (dict(mass_per="group"), "mass_per='group'"),
        (dict(softcap=0.0), "softcap=0.0 must be positive, or None"),
        (dict(softcap=-1.0), "softcap=-1.0 must be positive, or None"),
        (dict(scale=None), "scale=None must be a finite number"),
        (dict(scale=float("nan")), "scale=nan must be a finite number"),
        (dict(implementation="cuda"), "unknown implementation 'cuda'"),
        (dict(positions=_zeros(2, 2, 5)), "positions has shape"),
        (dict(table=_zeros(2, 2, 5)), "kv.k has shape"),
        (dict(kv=KVStore(_zeros(2, 2, 8, 64), _zeros(2, 2, 8, 64))), "dtype int32"),
        (dict(kv=KVStore(*[_zeros(2, 2, 8, 64, dtype=jnp.int8)] * 2, format="int8")), "needs k_scale"),
        (dict(kv=KVStore(*[_zeros(2, 2, 8, 64)] * 2, format="int3")), "unknown format 'int3'"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        _bad(**change)()
    assert "\n" not in str(error.value)


def test_formats_are_named_once():
    assert set(FORMATS) == {"dense", *EIGHT_BIT, *PACKED_BITS}
    assert dataclasses.fields(KVStore)[0].name == "k"
