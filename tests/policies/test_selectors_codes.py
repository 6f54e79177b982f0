"""Properties of selectors over codes of single keys: PQCache, the two-level codes, A2ATS, MagicPIG."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.arrays import nbytes
from kvjax.codecs.packing import unpack
from kvjax.policies import calibration
from kvjax.policies.selectors import codes as codes_module
from kvjax.policies.selectors.codes import ProductCodes, WindowedCodes, query_factor
from kvjax.policies.selectors.refined import RefinedCodes
from kvjax.policies.selectors.sampling import HashSampling, sampling_odds
from tests.policies.selector_cases import (
    INV_FREQ,
    SCALE,
    SHAPE,
    B,
    D,
    G,
    H,
    attention,
    built,
    call,
    entries,
    later,
)

LENGTHS, N = (40, 27), 48


def np_rope(x, pos):
    angle = np.asarray(pos, np.float64)[..., None] * np.asarray(INV_FREQ, np.float64)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


@pytest.mark.parametrize("parts, bits, stored", [(2, 4, 1), (4, 2, 1), (2, 6, 2), (8, 1, 1), (1, 8, 1)])
def test_codes_are_the_nearest_words_and_take_the_bytes_they_claim(parts, bits, stored):
    s = ProductCodes(12, parts=parts, bits=bits, rounds=4)
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    assert index["codes"].shape == (B, H, N, stored) and index["codes"].dtype == jnp.uint8
    held, new = later(held, 3)
    index = s.append(index, new, call(held))
    codes = np.asarray(unpack(index["codes"], s._bits, parts))
    books = np.asarray(index["books"], np.float64)
    for b in range(B):
        for h in range(H):
            for j in range(LENGTHS[b] + 3):
                x = np.asarray(held.k, np.float64)[b, h, j].reshape(parts, 1, -1)
                far = ((x - books[b, h]) ** 2).sum(-1)
                got = np.take_along_axis(far, codes[b, h, j][:, None], axis=1)[:, 0]
                np.testing.assert_allclose(got, far.min(-1), rtol=1e-4, atol=1e-6)


def test_with_a_word_for_every_key_logits_are_exact_and_the_tail_completes_attention():
    s = ProductCodes(12, parts=1, bits=6, rounds=1, tail=True)
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    c = call(held)
    logits = np.asarray(s.logits(index, c))
    q = np.asarray(c.grouped, np.float64)
    for b in range(B):
        for h in range(H):
            want = q[b, h] @ np.asarray(held.k, np.float64)[b, h, : LENGTHS[b]].T * SCALE
            np.testing.assert_allclose(logits[b, h, :, : LENGTHS[b]], want, rtol=1e-4, atol=1e-4)
            assert (logits[b, h, :, LENGTHS[b] :] == -np.inf).all()
    chosen = np.zeros((B, H, N), bool)
    chosen[:, :, :5] = True
    out, lse = s.estimate(index, c, jnp.asarray(chosen))
    for b in range(B):
        for h in range(H * G):
            rest = np.exp(logits[b, h // G, h % G, 5 : LENGTHS[b]].astype(np.float64)).sum()
            np.testing.assert_allclose(lse[b, h, 0], np.log(rest), rtol=1e-4)
            mean = np.asarray(held.v, np.float64)[b, h // G, : LENGTHS[b]].mean(0)
            np.testing.assert_allclose(np.asarray(out)[b, h, 0], mean, rtol=1e-4, atol=1e-5)


def combined(logits, over):
    """f64 [slots]: one score of the logits f64 [groups, slots] of what is stored."""
    if over.startswith("softmax"):
        logits = np.exp(logits - logits.max(-1, keepdims=True))
        logits /= logits.sum(-1, keepdims=True)
    return logits.max(0) if over.endswith("max") else logits.mean(0)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("over", ["max", "mean", "softmax_max", "softmax_mean"])
@pytest.mark.parametrize("page", [4, 16])
def test_a_page_has_the_largest_score_of_its_entries(monkeypatch, page, over, kernel):
    monkeypatch.setattr(codes_module, "has_kernel", lambda *args, **kwargs: kernel)  # XLA stands for it here
    held = entries(LENGTHS, N)
    options = dict(parts=4, bits=4, rounds=2, over=over)
    index, c = built(ProductCodes(12, **options), held)
    paged, same = (
        ProductCodes(12, **options, page=page),
        built(ProductCodes(12, **options, page=page), held)[0],
    )
    assert {n: a.tolist() for n, a in same.items()} == {n: a.tolist() for n, a in index.items()}
    got = np.asarray(paged.score(same, c)[0])
    if kernel and over == "softmax_max":  # its logarithm, in the same order
        got = np.exp(got)
    assert got.shape == (B, H, N // page) and not np.isnan(got).any()
    books, codes = np.asarray(index["books"], np.float64), np.asarray(unpack(index["codes"], 4, 4))
    for b in range(B):
        for h in range(H):
            words = books[b, h][np.arange(4), codes[b, h, : LENGTHS[b]]].reshape(LENGTHS[b], -1)
            each = combined(np.asarray(c.grouped, np.float64)[b, h] @ words.T * SCALE, over)
            want = [each[i : i + page].max() for i in range(0, LENGTHS[b], page)]
            np.testing.assert_allclose(got[b, h, : len(want)], want, rtol=1e-4, atol=1e-5)


def test_the_kernel_scores_no_capped_logits_and_no_second_level(monkeypatch):
    monkeypatch.setattr(codes_module, "has_kernel", lambda *args, **kwargs: True)
    monkeypatch.setattr(codes_module, "code_scores", None)  # calling it fails
    held = entries(LENGTHS, N)
    fine = RefinedCodes(4, parts=2, bits=4, fine_parts=4, fine_bits=4, rounds=2)
    assert np.isfinite(fine.score(*built(fine, held))[0]).any()
    s = ProductCodes(12, parts=2, bits=4, rounds=2, over="max")
    index, c = built(s, held)
    capped = np.asarray(s.score(index, c.replace(softcap=0.5))[0])
    plain = np.asarray(s.logits(index, c)).max(2)
    want = np.where(np.isneginf(plain), plain, 0.5 * np.tanh(plain / 0.5))
    np.testing.assert_allclose(capped, want, rtol=1e-5)


def test_the_tail_of_pages_is_that_of_their_entries():
    held = entries(LENGTHS, N)
    options = dict(parts=2, bits=4, rounds=2, tail=True)
    index, c = built(ProductCodes(12, **options), held)
    pages = np.zeros((B, H, N // 4), bool)
    pages[:, :, [0, 3]] = True
    want = ProductCodes(12, **options).estimate(index, c, jnp.asarray(np.repeat(pages, 4, axis=2)))
    got = ProductCodes(12, **options, page=4).estimate(index, c, jnp.asarray(pages))
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)


def test_the_finer_code_ranks_the_shortlist_and_only_it():
    s = RefinedCodes(4, parts=2, bits=4, fine_parts=4, fine_bits=4, shortlist=0.25, rounds=8, over="max")
    held = entries(LENGTHS, N)
    index, c = built(s, held)
    coarse_only = ProductCodes(4, parts=2, bits=4, rounds=8, over="max")
    part = {n: index[n] for n in ("codes", "books", "end")}
    coarse = np.asarray(coarse_only.logits(part, c))
    got = np.asarray(s.logits(index, c))
    fine_codes = np.asarray(unpack(index["fine"], 4, 4))
    books = np.asarray(index["fine_books"], np.float64)
    q = np.asarray(c.grouped, np.float64)
    assert s.most(N) == 12
    better = []
    for b in range(B):
        for h in range(H):
            n = LENGTHS[b]
            listed = np.argsort(-coarse[b, h].max(0), kind="stable")[:12]
            for j in range(n):
                word = np.concatenate([books[b, h, m, fine_codes[b, h, j, m]] for m in range(4)])
                more = q[b, h] @ word * SCALE if j in listed else 0.0
                np.testing.assert_allclose(got[b, h, :, j], coarse[b, h, :, j] + more, rtol=1e-4, atol=1e-4)
            exact = q[b, h] @ np.asarray(held.k, np.float64)[b, h, listed].T * SCALE
            better.append(
                np.abs(got[b, h][:, listed] - exact).mean() / np.abs(coarse[b, h][:, listed] - exact).mean()
            )
    assert np.mean(better) < 0.7


def test_fine_codes_outside_the_shortlist_are_not_counted_as_read():
    s = RefinedCodes(0.05, parts=2, bits=4, fine_parts=4, fine_bits=4, shortlist=0.125)
    specs = s.specs(B, 64, SHAPE)
    assert specs["codes"].nbytes == B * H * 64 and specs["fine"].nbytes == B * H * 64 * 2
    want = nbytes(specs) - specs["fine"].nbytes * 7 // 8
    assert s.scanned(specs, 64, B, SHAPE) == want


def test_a_calibrated_book_serves_all_prompts(tmp_path):
    rng = np.random.default_rng(0)
    turn = rng.standard_normal((1, H, D, D)) + 3 * np.eye(D)
    books = rng.integers(-127, 128, (1, H, 2, 16, D // 2)).astype(np.int8)
    fine = rng.integers(-127, 128, (1, H, 4, 4, D // 4)).astype(np.int8)
    arrays = {
        "turn": turn.astype(np.float16),
        "mean": rng.standard_normal((1, H, D)).astype(np.float32),
        "books": books,
        "books_scale": np.full((1, H, 2, 1, 1), 0.05, np.float32),
        "fine_books": fine,
        "fine_books_scale": np.full((1, H, 4, 1, 1), 0.01, np.float32),
    }
    path = str(tmp_path / "codes.safetensors")
    calibration.save(path, arrays, calibration.fingerprint(SHAPE))
    s = RefinedCodes(4, parts=2, bits=4, fine_parts=4, fine_bits=2, shortlist=1.0, file=path)
    s.check(SHAPE)
    held = entries(LENGTHS, N)
    const = {n: jnp.asarray(x) for n, x in s.constants(0, SHAPE).items()}
    from kvjax import arrays as trees

    c = call(held).replace(const=const)
    empty = trees.init(s.specs(B, N, SHAPE))
    assert set(empty) == {"codes", "fine", "end"}
    index = s.build(empty, held, c, {})
    got = np.asarray(s.logits(index, c))
    w = [
        (books * 0.05).astype(np.float16).astype(np.float64),
        (fine * 0.01).astype(np.float16).astype(np.float64),
    ]
    turn = turn.astype(np.float16).astype(np.float64)
    for b in range(B):
        for h in range(H):
            x = (np.asarray(held.k, np.float64)[b, h, : LENGTHS[b]] - arrays["mean"][0, h]) @ turn[0, h]
            near = np.zeros_like(x)
            for level in w:
                left = (x - near).reshape(len(x), level.shape[2], 1, -1)
                at = ((left - level[0, h]) ** 2).sum(-1).argmin(-1)
                near += np.stack([level[0, h, m, at[:, m]] for m in range(at.shape[1])], 1).reshape(x.shape)
            k = arrays["mean"][0, h] + near @ np.linalg.inv(turn[0, h])
            want = np.asarray(c.grouped, np.float64)[b, h] @ k.T * SCALE
            np.testing.assert_allclose(got[b, h, :, : LENGTHS[b]], want, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="another model"):
        s.check(SHAPE.__class__(1, 4, 2, 16, (None,)))


def test_a2ats_scores_keys_as_if_all_stood_at_one_distance():
    """With a word for every key, the score is RoPE(q, distance) . k before RoPE."""
    s = WindowedCodes(12, codes=64, distance=32, rounds=1, over="max")
    held = entries(LENGTHS, N)
    index, _ = built(s, held)
    c = call(held)
    scores = np.asarray(s.score(index, c)[0])
    pos = np.asarray(c.q_pos)[:, -1]
    for b in range(B):
        for h in range(H):
            q = np_rope(np_rope(np.asarray(c.grouped, np.float64)[b, h], -pos[b]), 32)
            k = np_rope(np.asarray(held.k, np.float64)[b, h, : LENGTHS[b]], -np.arange(LENGTHS[b]))
            np.testing.assert_allclose(
                scores[b, h, : LENGTHS[b]], (q @ k.T).max(0) * SCALE, rtol=1e-3, atol=1e-3
            )


def test_a2ats_distance_is_the_querys_norm():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((200, D)) * np.geomspace(0.1, 3, D)
    moment = q.T @ q
    factor = np.asarray(query_factor(jnp.asarray(moment, jnp.float32)), np.float64)
    assert (np.triu(factor, 1) == 0).all()
    x = rng.standard_normal((5, D))
    want = ((x @ q.T) ** 2).sum(-1) * D / np.trace(moment)
    np.testing.assert_allclose(((x @ factor) ** 2).sum(-1), want, rtol=1e-3)


def test_magicpig_odds_are_those_of_the_hash():
    """Two vectors at an angle meet in at least two tables as often as the formula says."""
    s = HashSampling(0.5, bits=3, tables=6)
    rng = np.random.default_rng(1)
    for angle in (0.4, 0.9, 1.4):
        met = []
        for seed in range(40):
            hasher = HashSampling(0.5, bits=3, tables=6, seed=seed)
            basis = np.linalg.qr(rng.standard_normal((50, D, 2)))[0]
            a = basis[..., 0]
            b = np.cos(angle) * basis[..., 0] + np.sin(angle) * basis[..., 1]
            same = np.asarray(hasher.hash(jnp.asarray(a))) == np.asarray(hasher.hash(jnp.asarray(b)))
            met += (same.sum(-1) >= 2).tolist()
        want = float(sampling_odds(jnp.cos(angle), s.bits, s.tables))
        assert abs(np.mean(met) - want) < 4 * np.sqrt(want * (1 - want) / 2000) + 0.02


def test_magicpig_averages_to_attention_over_hashes():
    """Weighted by one over its odds, the sample's sum of exp(logit) v and of exp(logit) is that of all entries."""
    held = entries(LENGTHS, N)
    top, bottom = np.zeros((B, H * G, D)), np.zeros((B, H * G, 1))
    runs = 150
    for seed in range(runs):
        s = HashSampling(1.0, 2, 2, bits=2, tables=6, local=3, seed=seed)
        index, c = built(s, held, q_tokens=1)
        slots = jnp.broadcast_to(jnp.arange(N), (B, H, N))
        bias = np.asarray(s.bias(index, c, slots), np.float64)
        q, k, v = (np.asarray(x, np.float64) for x in (c.q[:, :, 0], held.k, held.v))
        for b in range(B):
            for h in range(H * G):
                n = LENGTHS[b]
                w = np.exp(q[b, h] @ k[b, h // G, :n].T * SCALE + bias[b, h, :n])
                top[b, h] += w @ v[b, h // G, :n] / runs
                bottom[b, h] += w.sum() / runs
    want = attention(c.q[:, :, 0], held.k, held.v, np.asarray([[n] * H for n in LENGTHS]))
    error = np.linalg.norm(top / bottom - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.mean() < 0.12


@pytest.mark.parametrize(
    "spec, word",
    [
        ("pqcache(bits=9)", "bits"),
        ("pqcache(page=0)", "unit"),
        ("a2ats(codes=0)", "codes"),
        ("magicpig(tables=1)", "tables"),
        ("pq_refined(shortlist=0)", "shortlist"),
        ("pq_refined(fine_parts=3, fine_bits=3)", "bytes"),
    ],
)
def test_bad_arguments(spec, word):
    with pytest.raises(ValueError, match=word):
        P.parse(spec)
