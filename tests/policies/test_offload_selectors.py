"""ShadowKV, InfiniGen and LeoAM against numpy, function by function."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax import arrays
from kvjax.cache.plan import Plan
from kvjax.policies.selectors import partial
from kvjax.policies.selectors.base import NEVER, Call, Entries
from kvjax.policies.selectors.low_rank import LowRankKeys
from kvjax.policies.selectors.partial import PartialChannels
from kvjax.policies.selectors.pyramid import BoundsPyramid, bounds
from kvjax.types import ModelShape

B, H, G, D, N = 2, 2, 2, 8, 64
SHAPE = ModelShape(1, H * G, H, D, (None,))
FREQ = (100.0 ** (-np.arange(D // 2) / (D // 2))).astype(np.float32)
FILL = np.array([[64, 64], [50, 50]])


def rotate(x, pos):
    """RoPE in numpy, halves convention."""
    angle = pos[..., None] * FREQ
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def stored(seed=0, scale=1.0):
    """(entries, call, keys before RoPE [batch, kv_heads, n, d] with zeros where there is nothing)."""
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal((B, H, N, D)).astype(np.float32) * scale
    pos = np.where(np.arange(N) < FILL[..., None], np.arange(N), -1)
    plain = np.where((pos >= 0)[..., None], plain, 0)
    k, v = rotate(plain, np.maximum(pos, 0)), rng.standard_normal((B, H, N, D)).astype(np.float32)
    entries = Entries(*(jnp.asarray(x) for x in (k, np.where((pos >= 0)[..., None], v, 0), pos, pos)))
    q = jnp.asarray(rng.standard_normal((B, H * G, 5, D)), jnp.float32)
    q_pos = jnp.asarray(np.tile(np.arange(5), (B, 1)))
    call = Call(q, q_pos, jnp.asarray(FILL), lambda: entries, inv_freq=jnp.asarray(FREQ), scale=D**-0.5)
    return entries, call, plain


def built(selector, entries, call):
    return selector.build(arrays.init(selector.specs(B, N, SHAPE)), entries, call, {})


def test_shadowkv_rebuilds_the_best_low_rank_keys():
    entries, call, plain = stored()
    slots = jnp.broadcast_to(jnp.arange(N), (B, H, N))
    for rank in (3, 16):
        selector = LowRankKeys(read=16, recent=4, chunk=4, rank=rank, outliers=2)
        got = np.asarray(selector.supply(built(selector, entries, call), call, slots)["k"])
        for b in range(B):
            flat = plain[b].transpose(1, 0, 2).reshape(N, H * D).astype(np.float64)
            u, s, vt = np.linalg.svd(flat, full_matrices=False)
            best = ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(N, H, D).transpose(1, 0, 2)
            valid = np.asarray(entries.pos[b]) >= 0
            want = rotate(best, np.maximum(np.asarray(entries.pos[b]), 0))
            assert np.allclose(got[b][valid], want[valid], atol=2e-4)
            if rank == H * D:
                assert np.allclose(got[b][valid], np.asarray(entries.k)[b][valid], atol=2e-4)


def test_shadowkv_outliers_are_the_least_similar_chunks_and_stay_exact():
    entries, call, _ = stored(1)
    selector = LowRankKeys(read=16, recent=6, chunk=4, rank=4, outliers=3)
    index = built(selector, entries, call)
    k = np.asarray(entries.k, np.float64)
    scores, _ = selector.score(index, call)
    out, lse = selector.estimate(index, call, jnp.zeros((B, H, N // 4), bool))
    for b, h in np.ndindex(B, H):
        chunks = k[b, h].reshape(-1, 4, D)
        mean = chunks.mean(1, keepdims=True)
        cosine = (
            (chunks * mean).sum(-1)
            / np.linalg.norm(chunks, axis=-1).clip(1e-12)
            / np.linalg.norm(mean, axis=-1).clip(1e-12)
        )
        local = (FILL[b, h] - 6) // 4
        worst = np.argsort(cosine.min(1)[:local], kind="stable")[:3]
        assert set(np.asarray(index["outlier"])[b, h]) == set(worst)
        assert (np.asarray(scores)[b, h, worst] == NEVER).all()
        assert np.isfinite(np.asarray(scores)[b, h, [c for c in range(local) if c not in worst]]).all()
        at = (np.sort(worst)[:, None] * 4 + np.arange(4)).ravel()
        for g in range(G):
            q = np.asarray(call.q, np.float64)[b, h * G + g, -1]
            logits = k[b, h][at] @ q * D**-0.5
            weights = np.exp(logits - logits.max())
            want = weights @ np.asarray(entries.v, np.float64)[b, h][at] / weights.sum()
            assert np.allclose(out[b, h * G + g, 0], want, atol=1e-5)
            assert np.isclose(lse[b, h * G + g, 0], np.log(np.exp(logits).sum()), atol=1e-5)


def test_shadowkv_landmarks_are_chunk_means_and_grow_with_new_tokens():
    entries, call, _ = stored(2)
    selector = LowRankKeys(read=16, recent=4, chunk=4, rank=4, outliers=1)
    index = built(selector, entries, call)
    k = np.asarray(entries.k)
    assert np.allclose(index["mark"] / 4, k.reshape(B, H, -1, 4, D).mean(3), atol=1e-6)
    new = jnp.ones((B, H, 1, D))
    slots = jnp.asarray(FILL)[..., None] - 1
    after = selector.append(index, Entries(new, new, slots, slots), call)
    for b, h in np.ndindex(B, H):
        chunk = (FILL[b, h] - 1) // 4
        assert np.allclose(after["mark"][b, h, chunk], np.asarray(index["mark"])[b, h, chunk] + 1, atol=1e-6)


def test_shadowkv_refuses_a_codec():
    with pytest.raises(ValueError, match="keeps keys in a form of its own"):
        Plan(P.parse("shadowkv(read=0.5) | int8"), SHAPE, 1, 64, 8)


def test_infinigen_skew_is_orthogonal_and_gathers_energy():
    rng = np.random.default_rng(3)
    mix = rng.standard_normal((D, D)) * np.array([5, 3, 1, 0.5, 0.3, 0.2, 0.1, 0.05])
    q, k = (rng.standard_normal((H, 200, D)) @ mix.T for _ in range(2))
    a = np.asarray(partial.skew(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)), np.float64)
    assert np.allclose(a.swapaxes(1, 2) @ a, np.eye(D), atol=1e-5)
    exact = np.einsum("hnd,hmd->hnm", q, k)
    assert np.allclose(np.einsum("hnd,hmd->hnm", q @ a, k @ a), exact, rtol=1e-3, atol=1e-2)
    left = np.einsum("hnd,hmd->hnm", (q @ a)[..., :2], (k @ a)[..., :2])
    plain = np.einsum("hnd,hmd->hnm", q[..., :2], k[..., :2])
    assert np.abs(left - exact).mean() < 0.3 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_infinigen_reads_what_is_within_alpha(ratio):
    """With all channels the scores are the logits; the number read is the heads' mean of those within alpha."""
    entries, call, _ = stored(4, scale=2.0)
    selector = PartialChannels(read=48, ratio=ratio, alpha=2.0)
    index = built(selector, entries, call)
    scores = np.asarray(selector.score(index, call)[0])
    a, q = np.asarray(index["a"], np.float64), np.asarray(call.grouped, np.float64)
    k = np.asarray(entries.k, np.float64)
    part = np.einsum("bhgd,bhdc,bhec,bhne->bhgn", q, a, a, k) * D**-0.5
    if ratio == 1.0:
        assert np.allclose(part, np.einsum("bhgd,bhnd->bhgn", q, k) * D**-0.5, atol=1e-5)
    for b in range(B):
        below = np.max(part[b] - part[b, :, :, : FILL[b, 0]].max(-1, keepdims=True), axis=1)[:, : FILL[b, 0]]
        n = int(np.ceil((below > -2.0).sum(1).mean()))
        assert 1 < n < 48
        for h in range(H):
            best = set(np.argsort(-below[h])[:n])
            assert set(np.flatnonzero(scores[b, h] > NEVER)) == best


def test_infinigen_foresees_with_the_next_layers_queries():
    policy = P.parse("infinigen")
    assert policy.looks_ahead and "ahead" in policy.needs and policy.placement is not None
    assert not P.parse("infinigen(ahead=False)").looks_ahead
    with pytest.raises(ValueError, match="ratio"):
        Plan(P.parse("infinigen(ratio=0.0)"), SHAPE, 1, 64, 8)


def test_leoam_bounds_hold_and_tighten():
    entries, call, _ = stored(5)
    selector = BoundsPyramid(read=16, chunk=16, rounds=2)
    index = built(selector, entries, call)
    q, k = np.asarray(call.grouped, np.float64), np.asarray(entries.k, np.float64)
    logits = np.einsum("bhgd,bhnd->bhgn", q, k)
    logits = np.where(np.arange(N) < FILL[:, :, None, None], logits, np.nan)
    widths = []
    for r, size in enumerate((16, 8, 4)):
        lower, upper = (np.asarray(x) for x in bounds(call.grouped, index[f"low{r}"], index[f"high{r}"]))
        inside = logits.reshape(B, H, G, -1, size)
        used = np.isfinite(inside).any(-1)
        assert (upper[used] + 1e-4 >= np.nanmax(inside[used], -1)).all()
        assert (lower[used] - 1e-4 <= np.nanmin(inside[used], -1)).all()
        assert (upper[~used] == NEVER).all()
        widths.append((upper, lower))
    for (upper, lower), (finer_upper, finer_lower) in itertools.pairwise(widths):
        assert (finer_upper <= np.repeat(upper, 2, axis=3) + 1e-4).all()
        used = finer_lower > NEVER
        assert (finer_lower[used] >= np.repeat(lower, 2, axis=3)[used] - 1e-4).all()


def test_leoam_refines_only_the_best_chunks():
    entries, call, _ = stored(6)
    flat = BoundsPyramid(read=64, chunk=16, rounds=2, widen=4.0)
    index = built(flat, entries, call)
    exact = np.asarray(jnp.max(bounds(call.grouped, index["low2"], index["high2"])[1], axis=2))
    assert np.allclose(flat.score(index, call)[0], exact, rtol=1e-5)  # wide enough: nothing is dropped
    narrow = BoundsPyramid(read=8, chunk=16, rounds=2, widen=1.0)
    got = np.asarray(narrow.score(index, call)[0])
    coarse = np.asarray(jnp.max(bounds(call.grouped, index["low0"], index["high0"])[1], axis=2))
    for b, h in np.ndindex(B, H):
        kept = np.argsort(-coarse[b, h], kind="stable")[:2]  # ceil(8 / 16) + 1 chunks of 16
        middle = np.asarray(jnp.max(bounds(call.grouped, index["low1"], index["high1"])[1], axis=2))[b, h]
        halves = [c for p in kept for c in (2 * p, 2 * p + 1)]
        best = sorted(halves, key=lambda c: -middle[c])[:2]
        leaves = {2 * c + i for c in best for i in (0, 1)}
        assert set(np.flatnonzero(got[b, h] > NEVER)) <= leaves
        inside = [c for c in leaves if exact[b, h, c] > NEVER]
        assert np.allclose(got[b, h, inside], exact[b, h, inside], rtol=1e-5)
    with pytest.raises(ValueError, match="halved"):
        Plan(P.parse("leoam(chunk=24, rounds=4)"), SHAPE, 1, 64, 8)


def test_indices_grow_like_they_are_built():
    """Appending the last entries one by one gives the bounds and partial keys of building with all of them."""
    entries, call, _ = stored(7)
    for selector in (BoundsPyramid(read=16, chunk=16, rounds=2), PartialChannels(read=16, ratio=0.5)):
        whole = built(selector, entries, call)
        early = Entries(
            *(jax.tree.map(lambda x: x[:, :, :40], (entries.k, entries.v, entries.pos, entries.slots)))
        )
        index = arrays.init(selector.specs(B, N, SHAPE))
        if "a" in whole:
            index["a"] = whole["a"]
        index = selector.append(index, early, call)
        for t in range(40, N):
            one = Entries(*(x[:, :, t : t + 1] for x in (entries.k, entries.v, entries.pos, entries.slots)))
            index = selector.append(index, one, call)
        for name, x in whole.items():
            assert np.allclose(index[name], x, atol=1e-6), name
