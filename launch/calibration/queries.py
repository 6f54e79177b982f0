"""Statistics of queries on plain text: Q-Filters' directions and Expected Attention's moments."""

from __future__ import annotations

import numpy as np

from kvjax.types import Array, AttentionInputs
from launch.calibration import samples
from launch.calibration.heads import Progress, collect, observe
from launch.session import Session

SINK = 4  # first tokens, left out of Expected Attention's statistics


def _rotated(x: AttentionInputs) -> Array:
    return x.q[0]


def _plain(x: AttentionInputs) -> Array:
    return observe(x).unrotated_queries()[0]


def filters(session: Session, count: int, length: int, step: Progress) -> dict[str, np.ndarray]:
    """filters f32 [layers, kv_heads, head_dim] = -v, the paper's sign.

    v: first right-singular vector of the uncentred post-RoPE queries of a query head, on the side of most of them,
    mean over the query heads of a KV head.
    """
    shape = session.lm.shape
    gram = np.zeros((shape.layers, shape.q_heads, shape.head_dim, shape.head_dim))
    queries = []
    for index in range(count):
        tokens = samples.plain(session, length, index)
        rows = collect(session.lm, session.model.params, *samples.padded(tokens, length), _rotated)
        q = np.stack([np.asarray(r, np.float64) for r in rows])
        gram += np.einsum("lhtd,lhte->lhde", q, q)
        queries.append(q.astype(np.float32))
        step(1)
    v = np.linalg.eigh(gram)[1][..., -1]
    side = sum((np.einsum("lhtd,lhd->lht", q, v) > 0).sum(-1) for q in queries)
    v = np.where((side * 2 >= count * length)[..., None], v, -v)
    v = v.reshape(shape.layers, shape.kv_heads, -1, shape.head_dim).mean(axis=2)
    return {"filters": -v.astype(np.float32)}


def moments(session: Session, count: int, length: int, step: Progress) -> dict[str, np.ndarray]:
    """query_mean f32 [layers, q_heads, dim], query_cov f32 [layers, q_heads, dim, dim] of queries before RoPE.

    The first 4 tokens of every text are left out; the covariance divides by N - 1.
    """
    shape, n = session.lm.shape, 0
    first = np.zeros((shape.layers, shape.q_heads, shape.head_dim))
    second = np.zeros((*first.shape, shape.head_dim))
    for index in range(count):
        tokens = samples.plain(session, length, index)
        rows = collect(session.lm, session.model.params, *samples.padded(tokens, length), _plain)
        q = np.stack([np.asarray(r, np.float64) for r in rows])[:, :, SINK:]
        first, second = first + q.sum(2), second + np.einsum("lhtd,lhte->lhde", q, q)
        n += q.shape[2]
        step(1)
    mean = first / n
    cov = (second - n * np.einsum("lhd,lhe->lhde", mean, mean)) / (n - 1)
    return {"query_mean": mean.astype(np.float32), "query_cov": cov.astype(np.float32)}
