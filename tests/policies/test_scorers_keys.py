"""Scorers of keys and values: their own properties, against float64 loops where there is a formula."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np

from kvjax.policies import calibration
from kvjax.policies.scorers import compactor, future, lag
from kvjax.types import ModelShape
from tests.policies.observations import (
    BATCH,
    DIM,
    KV_HEADS,
    LENGTHS,
    OBS,
    POS,
    Q_HEADS,
    VALID,
    close,
    prompt,
    score,
)

SHAPE = ModelShape(2, Q_HEADS, KV_HEADS, DIM, (None, None))


def test_lagkv_ignores_channel_shift_and_scale():
    scorer = lag.LagRelative(sink=2, lag=5)
    base = score(scorer, OBS)[0]
    moved = OBS.replace(k=OBS.k * 3.0 + jnp.arange(DIM), v=OBS.v * 0.5 - 2.0)
    close(score(scorer, moved)[0], base, tol=1e-4)
    assert len(np.unique(np.round(base[0, 0][VALID[0, 0]], 3))) > 4


def test_cap_scores_are_leverages():
    got = score(future.InformationCapacity(sink=2, future=16), OBS)[0]
    used = VALID & (POS >= 2)
    assert (got[used] > 0).all() and (got[used] < 1).all()
    assert (np.where(used, got, 0).sum(-1) < DIM).all()


def test_expected_attention_without_variance_is_the_mean_query():
    same = OBS.replace(q=jnp.broadcast_to(OBS.q[:, :, :1], OBS.q.shape), inv_freq=OBS.inv_freq * 0.0)
    got = score(future.ExpectedAttention(future=4, sink=0, value_norm=False), same)[0]
    logits = np.einsum(
        "bhsd,bhgd->bhgs", same.k, np.asarray(same.q)[:, :, 0].reshape(BATCH, KV_HEADS, 2, DIM)
    )
    e = np.where(VALID[:, :, None], np.exp(logits * OBS.scale), 0.0)
    close(got, (e / e.sum(-1, keepdims=True)).mean(2))


def test_expected_attention_statistics_from_a_file(tmp_path: pathlib.Path):
    """The prompt's own statistics in a file reproduce the online scores of that row."""
    obs = prompt(3, lengths=(32,))
    q = np.asarray(obs.unrotated_queries(), np.float64)[0, :, 4:]
    mean = q.mean(1)
    cov = np.einsum("hti,htj->hij", q - mean[:, None], q - mean[:, None]) / q.shape[1]
    path = str(tmp_path / "s.safetensors")
    arrays = {"query_mean": np.stack([mean] * 2), "query_cov": np.stack([cov] * 2)}
    arrays = {n: a.astype(np.float32) for n, a in arrays.items()}
    calibration.save(path, arrays, calibration.fingerprint(SHAPE))
    scorer = future.ExpectedAttention(future=8, stats=path)
    const = {n: jnp.asarray(x) for n, x in scorer.constants(0, SHAPE).items()}
    got = score(scorer, obs.replace(const=const))[0]
    want = score(future.ExpectedAttention(future=8), obs)[0]
    np.testing.assert_allclose(got[..., 4:], want[..., 4:], rtol=1e-4, atol=1e-6)


def test_non_causal_mass_adds_up_per_chunk():
    q, k = OBS.q, jnp.repeat(OBS.k, 2, axis=1)
    mask = OBS.q_pos >= 0
    mass = np.asarray(compactor.non_causal_mass(q, k, mask, 8, False))
    for b, n in enumerate(LENGTHS):
        row = mass[b][:, np.asarray(mask)[b]]
        for start in range(0, n, 8):
            part = row[:, start : start + 8]
            np.testing.assert_allclose(part.sum(-1), part.shape[-1], rtol=1e-5)


def test_leverage_is_exact_with_a_square_sketch():
    sketch = jnp.broadcast_to(jnp.eye(DIM), (KV_HEADS, DIM, DIM))
    got = np.asarray(compactor.leverage(OBS.k, OBS.valid, sketch, jitter=1e-6))
    for b, h in np.ndindex(BATCH, KV_HEADS):
        x = np.asarray(OBS.k, np.float64)[b, h][VALID[b, h]]
        x = x - x.mean(0)
        want = np.einsum("sd,de,se->s", x, np.linalg.inv(x.T @ x), x)
        np.testing.assert_allclose(got[b, h][VALID[b, h]], want, atol=1e-4)
        assert want.sum() <= DIM + 1e-6


def test_cur_ignores_the_scale_of_a_block():
    scorer = compactor.ValueGuided(block=8)
    factor = jnp.where((OBS.pos >= 8) & (OBS.pos < 16), 5.0, 1.0)[..., None]
    close(score(scorer, OBS.replace(k=OBS.k * factor, v=OBS.v * factor))[0], score(scorer, OBS)[0])
