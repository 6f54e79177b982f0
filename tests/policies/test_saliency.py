"""Scorers that rank tokens for precision, against float64 attention: ZipCache, QAQ, ARKV."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies.scorers.saliency import MeanAndVariance, NormalisedAttention, PeakAttention
from tests.policies.observations import KV_HEADS, LENGTHS, Q_HEADS, attention, positions, prompt, score


def last(obs, count):
    """[batch, q_heads, count, slots]: attention of each row's last `count` tokens."""
    probs, q_pos = attention(obs), np.asarray(obs.q_pos)
    ends = [int(np.argmax(row)) + 1 for row in q_pos]
    return np.stack([probs[b, :, end - count : end] for b, end in enumerate(ends)])


def by_group(x, reduce):
    return reduce(x.reshape(x.shape[0], KV_HEADS, Q_HEADS // KV_HEADS, *x.shape[2:]), axis=2)


@pytest.mark.parametrize("probes", [5, 12])
def test_zipcache_divides_by_the_probes_that_see_a_token(probes):
    obs = prompt(1)
    rows, valid = last(obs, probes), np.asarray(obs.valid)
    sees = (rows > 0).sum(2)  # nonzero entries of a column: the count that the paper defines
    want = by_group(rows.sum(2) / np.maximum(sees, 1), np.sum)
    got = score(NormalisedAttention(probes), obs)[0]
    np.testing.assert_allclose(got[valid], want[valid], rtol=1e-4, atol=1e-6)


def test_zipcache_saliency_of_a_constant_column_is_that_constant():
    """Equal keys: every visible probe gives 1 / (tokens that it sees), so the newest token's one probe counts alone."""
    obs = prompt(2)
    obs = obs.replace(k=jnp.ones_like(obs.k))
    got = score(NormalisedAttention(4), obs)[0]
    for b, n in enumerate(LENGTHS):
        at = positions()[b]
        means = [np.mean([1 / (t + 1) for t in range(max(n - 4, p), n)]) for p in range(n)]
        want = np.asarray(means) * Q_HEADS / KV_HEADS
        for h in range(KV_HEADS):
            np.testing.assert_allclose(got[b, h][at >= 0], want, rtol=1e-5)


def test_qaq_takes_the_largest_attention_of_the_last_queries():
    obs = prompt(3)
    want, valid = by_group(last(obs, 5).max(2), np.max), np.asarray(obs.valid)
    np.testing.assert_allclose(score(PeakAttention(5), obs)[0][valid], want[valid], rtol=1e-4, atol=1e-6)


def test_arkv_adds_the_variance_over_queries():
    obs = prompt(4)
    rows, valid = last(obs, 6), np.asarray(obs.valid)
    plain = rows.mean(2) + 50.0 * rows.var(2)
    padded = np.pad(plain, ((0, 0), (0, 0), (1, 1)))
    want = by_group((padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3, np.mean)
    got = score(MeanAndVariance(6, 50.0, 3), obs)[0]
    np.testing.assert_allclose(got[valid], want[valid], rtol=2e-4, atol=1e-6)
    mean = score(MeanAndVariance(1, 50.0, 1), obs)[0]  # one query: no variance
    np.testing.assert_allclose(
        mean[valid], by_group(last(obs, 1)[:, :, 0], np.mean)[valid], rtol=1e-4, atol=1e-6
    )
