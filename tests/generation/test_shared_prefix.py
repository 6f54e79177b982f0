"""A prefix stored once for many rows gives what each row gives with the prefix in its own prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.generation.generator import Generator
from pallas_kernels.merge_partials import merge_partials
from pallas_kernels.prefill_attention import prefill_attention, shared_attention
from pallas_kernels.prefill_attention.shared import splits_of
from tests.kernels.prefill.attention_oracle import attention, fresh_rng, relative_error
from tests.toy import VOCAB, Toy

LM = Toy()
PARAMS = LM.init()


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


PREFIX, *OWN = prompts(37, 9, 1, 14)


def generator(spec="full", lm=LM, **kwargs):
    return Generator(lm, PARAMS, P.parse(spec), page_size=4, **kwargs)


def both(shared, own, new=4, lm=LM, groups=((PREFIX, 3),), **kwargs):
    """Sessions and tokens of the same prompts, with `shared` prefixes and with prefixes in the prompts."""
    a, b = generator(shared, lm, **kwargs), generator(own, lm)
    prefix = a.share(*(p for p, _ in groups))
    whole = [p + o for (p, n), part in zip(groups, _parts(groups)) for o in part]
    first = a.prefill(OWN, new, prefix)
    second = b.prefill(whole, new)
    logits = np.asarray(first.logits), np.asarray(second.logits)
    return logits, [s.decode([new] * len(OWN)) for s in (first, second)], (first, second)


def _parts(groups):
    at = 0
    for _, n in groups:
        yield OWN[at : at + n]
        at += n


def test_it_is_the_unshared_run():
    (got, want), (a, b), (first, second) = both("full", "full")
    assert relative_error(got, want) < 1e-5
    assert [o.tokens for o in a] == [o.tokens for o in b] and len(a[0].tokens) == 4
    # 37 tokens of prefix are held once, in 40 slots: keys, values, positions, and one length.
    prefix = 4 * (LM.layers * LM.kv_heads * 40 * (2 * LM.head_dim + 1) + 1)
    assert first.prefix.nbytes == prefix
    assert first.cache_bytes == first.plan.prompt_only().nbytes() + prefix
    assert second.cache_bytes == second.full_cache_bytes
    assert first.full_cache_bytes == dataclasses.replace(first.plan, prompt=64 + 37, reserve=0).nbytes()


def test_rows_of_a_group_do_not_touch_each_other():
    """Permuting the requests permutes the results, and another request's tokens change nothing of yours."""
    a = generator()
    prefix = a.share(PREFIX)
    want, order = np.asarray(a.prefill(OWN, 4, prefix).logits), [2, 0, 1]
    turned = np.asarray(a.prefill([OWN[i] for i in order], 4, prefix).logits)
    np.testing.assert_allclose(turned, want[order], rtol=1e-5, atol=1e-5)
    other = np.asarray(a.prefill([OWN[0], OWN[1], prompts(14, seed=9)[0]], 4, prefix).logits)
    np.testing.assert_array_equal(other[:2], want[:2])
    assert np.abs(other[2] - want[2]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_sliding_window_reaches_into_the_prefix(chunk):
    lm = Toy(window=12)
    (got, want), (a, b), _ = both("full", "full", lm=lm, chunk=chunk)
    assert relative_error(got, want) < 1e-5
    assert [o.tokens for o in a] == [o.tokens for o in b]


@pytest.mark.slow
def test_groups_of_rows_have_prefixes_of_their_own():
    other = prompts(22, seed=5)[0]
    a = generator()
    prefix = a.share(PREFIX, other)
    rows = [OWN[0], OWN[1], OWN[2], OWN[0]]
    got = a.prefill(rows, 4, prefix)
    want = generator().prefill([p + o for p, o in zip((PREFIX, PREFIX, other, other), rows)], 4)
    assert relative_error(got.logits, want.logits) < 1e-5
    assert [o.tokens for o in got.decode([4] * 4)] == [o.tokens for o in want.decode([4] * 4)]
    with pytest.raises(ValueError, match="3 rows cannot be divided equally among 2"):
        a.prefill(OWN, 4, prefix)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["kivi(bits=4, group=8, residual=128)", "int8", "quest(read=1.0, page_size=4)"]
)
def test_codecs_and_selectors_serve_the_own_part(spec):
    """Own entries all in a window of full precision, nearly exact codes, or all selected."""
    if spec.startswith("quest") and "page_size" not in P.describe("quest").arguments:
        spec = "quest(read=1.0)"
    (got, want), (a, b), _ = both(spec, "full")
    assert relative_error(got, want) < 1e-5  # prefill attends before it encodes
    assert all(x.tokens[0] == y.tokens[0] for x, y in zip(a, b))


def test_eviction_keeps_to_the_own_part():
    a = generator("keydiff(budget=4)")
    prefix = a.share(PREFIX)
    session = a.prefill(OWN, 4, prefix)
    for layer in range(LM.layers):
        pos = np.asarray(session.cache.pools[layer].pos)
        for row, n in enumerate(map(len, OWN)):
            kept = pos[row][pos[row] >= 0].reshape(LM.kv_heads, -1)
            assert kept.shape[1] == min(4, n) and kept.min() >= 37 and kept.max() < 37 + n
    # One prefix serves many sessions, whatever became of them.
    session.decode([4] * 3)
    again = a.prefill(OWN, 4, prefix)
    np.testing.assert_array_equal(np.asarray(again.logits), np.asarray(a.prefill(OWN, 4, prefix).logits))


@pytest.mark.slow
def test_a_compressed_session_can_be_shared():
    small = generator("keydiff(budget=0.5)").prefill([PREFIX])
    prefix = generator().share(small)
    assert all((np.asarray(x.pos) >= 0).sum(-1).tolist() == [[18, 18]] for x in prefix.layers)
    full = generator().share(PREFIX)
    got, want = (generator().prefill(OWN, 0, p).logits for p in (prefix, full))
    assert 1e-3 < relative_error(got, want) < 2.0


@pytest.mark.slow
def test_extend_and_generate_follow_the_prefix():
    g = generator()
    prefix = g.share(PREFIX)
    session = g.prefill(OWN, 16, prefix)
    session.extend([[3, 5], [7], []])
    whole = [PREFIX + o + m for o, m in zip(OWN, ([3, 5], [7], []))]
    assert relative_error(session.logits, generator().prefill(whole).logits) < 1e-5
    outputs, _ = g.generate(OWN, 3, prefix=prefix)
    plain, _ = generator().generate([PREFIX + o for o in OWN], 3)
    assert [o.tokens for o in outputs] == [o.tokens for o in plain]


@pytest.mark.parametrize(
    "spec,why",
    [
        ("kvzip(budget=0.5)", "a probe"),
        ("h2o(budget=8, recent=2)", "eviction by the attention"),
        ("kvquant", "derives positions"),
    ],
)
def test_what_does_not_compose_says_so(spec, why):
    prefix = generator().share(PREFIX)
    with pytest.raises(ValueError, match=f"does not compose with a shared prefix: .*{why}"):
        generator(spec).prefill(OWN, 4, prefix)


def test_lengths_count_the_prefix():
    g = generator(lm=Toy(max_context=48))
    prefix = g.share(PREFIX)
    with pytest.raises(ValueError, match="context is 11 after the shared prefix of 37"):
        g.prefill(OWN, 4, prefix)
    with pytest.raises(ValueError, match="no prefix"):
        g.share()


@pytest.mark.parametrize("groups,window,softcap", [(1, None, None), (2, 60, 3.0)])
def test_shared_attention_is_attention_over_the_concatenation(groups, window, softcap):
    rng = fresh_rng()
    batch, q_heads, kv_heads, tokens, slots, dim = 4, 4, 2, 3, 50, 8
    q = rng.normal(size=(batch, q_heads, tokens, dim))
    k, v = rng.normal(size=(2, groups, kv_heads, slots, dim))
    pos = np.broadcast_to(np.arange(slots), (groups, kv_heads, slots)).astype(np.int32).copy()
    pos[:, 1, 7:19] = -1
    v[:, 1, 7:19] = np.nan
    q_pos = (slots + np.arange(tokens) + np.arange(batch)[:, None]).astype(np.int32)
    q_pos[3, 0] = -1
    options = dict(scale=0.3, window=window, softcap=softcap)
    out, lse = shared_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        q_positions=jnp.asarray(q_pos), k_positions=jnp.asarray(pos), **options,
    )  # fmt: skip
    per_row = [np.repeat(x, batch // groups, axis=0) for x in (k, v, pos)]
    want, want_lse, _ = attention(q, per_row[0], per_row[1], q_pos, per_row[2], **options)
    np.testing.assert_allclose(np.asarray(out), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(lse), want_lse, rtol=1e-5, atol=1e-5)


def test_bfloat16_parts_are_merged_in_float32():
    rng = fresh_rng()
    q = jnp.asarray(rng.normal(size=(6, 4, 1, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(1, 2, 256, 64)) + 0.5, jnp.bfloat16) for _ in range(2))
    own_k, own_v = (jnp.asarray(rng.normal(size=(6, 2, 16, 64)) + 0.5, jnp.bfloat16) for _ in range(2))
    at = jnp.full((6, 1), 300, jnp.int32)
    pos = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), (1, 2, 256))
    own_pos = jnp.broadcast_to(256 + jnp.arange(16, dtype=jnp.int32), (6, 2, 16))
    parts = [
        shared_attention(q, k, v, q_positions=at, k_positions=pos, scale=0.1),
        prefill_attention(
            q, own_k, own_v, q_positions=at, k_positions=own_pos, scale=0.1, return_lse=True, partial=True
        ),
    ]
    assert all(x.dtype == jnp.float32 for part in parts for x in part)
    out = merge_partials([p[0] for p in parts], [p[1] for p in parts])[0]
    every = lambda a, b: jnp.concatenate([jnp.repeat(a, 6, axis=0), b], axis=2)  # noqa: E731
    args = dict(q_positions=at, k_positions=every(pos, own_pos), scale=0.1)
    unshared = prefill_attention(q, every(k, own_k), every(v, own_v), partial=True, **args)
    assert relative_error(out, unshared) < 1e-3
    high = [x.astype(jnp.float32) for x in (q, every(k, own_k), every(v, own_v))]
    assert relative_error(out, prefill_attention(*high, **args)) < 3e-3


def test_splits_fill_the_device_and_stay_long():
    assert splits_of(16384, 16) == 8
    assert splits_of(1024, 1) == 2 and splits_of(640, 1) == 1
    assert splits_of(16384, 200) == 1


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 700])
def test_shared_attention_on_hardware(window):
    rng = fresh_rng()
    q = jnp.asarray(rng.normal(size=(40, 8, 1, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(1, 2, 2048, 128)), jnp.bfloat16) for _ in range(2))
    pos = jnp.broadcast_to(jnp.where(jnp.arange(2048) < 2000, jnp.arange(2048), -1), (1, 2, 2048)).astype(
        jnp.int32
    )
    at = jnp.asarray(rng.integers(2000, 2300, (40, 1)), jnp.int32)
    args = dict(q_positions=at, k_positions=pos, scale=0.1, window=window)
    out, lse = jax.jit(lambda q, k, v: shared_attention(q, k, v, implementation="mosaic_gpu", **args))(
        q, k, v
    )
    high = [x.astype(jnp.float32) for x in (q, k, v)]
    want, want_lse = jax.jit(lambda q, k, v: shared_attention(q, k, v, implementation="xla", **args))(*high)
    assert out.dtype == jnp.float32
    assert relative_error(out, want) <= 5e-3
    assert relative_error(lse, want_lse) <= 1e-3
