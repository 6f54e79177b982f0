"""The suites `sparse_prefill` and `shared_prefix`: their data, and what their rows say on small shapes."""

import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench_suites import shared_prefix, sparse_prefill


def test_structured_logits_are_what_the_docstring_says():
    tokens, heads = 2048, (4, 2, 64)
    q, k, v = (
        np.asarray(x, np.float64) for x in sparse_prefill.structured(tokens, heads, jnp.float32, (1.0, 1.0))
    )
    assert q.shape == (1, 4, tokens, 64) and k.shape == v.shape == (1, 2, tokens, 64)
    logits = q[0, 1] @ k[0, 0].T / 64**0.5
    offsets = np.asarray([np.diagonal(logits, -d)[600:].mean() for d in (0, 300)])
    waves = 10000.0 ** (-np.arange(8) / 8)
    near = 16 * np.cos(300 * waves).mean()
    # The topic of 1024 tokens agrees at both distances for most rows, loud clusters are rare.
    assert offsets[0] == pytest.approx(23, abs=1.0) and near + 3 < offsets[1] < near + 8
    assert logits[100:, :4].mean() - logits[100:, 4:40].mean() == pytest.approx(15, abs=3.0)


def test_rows_compare_patterns_with_dense_attention(monkeypatch):
    monkeypatch.setattr(
        sparse_prefill, "SMALL", ("a_shape(sink=32, window=1024)", "a_shape(sink=32, window=32)")
    )
    monkeypatch.setattr(sparse_prefill, "GAINS", {"peaked": (0.9, 1.2)})
    dense, _, everything, _, narrow = sparse_prefill.rows()
    assert dense["name"] == "peaked: dense" and dense["tflop_per_s"] > 0
    assert everything["kept"] == 1 and everything["dense_heads"] == 4 and everything["error"] < 1e-6
    # 8 blocks of 128: the diagonal, the one before it, the first.
    assert narrow["kept"] == pytest.approx((8 + 7 + 6) / 36) and narrow["dense_heads"] == 0
    assert narrow["error"] > 0.01
    assert narrow["speedup"] == pytest.approx(dense["us"] / narrow["us"])


def test_a_shared_prefix_is_counted_once(monkeypatch):
    monkeypatch.setattr(shared_prefix, "SMALL", [((4, 2, 64), 4, 256, 64)])
    unshared, shared = shared_prefix.rows()
    token = 2 * 2 * 64 * 4  # k and v, KV heads, channels, bytes
    for row, tokens in ((unshared, 4 * (256 + 64)), (shared, 256 + 4 * 64)):
        assert row["gb_per_s"] * 1e9 * row["us"] * 1e-6 == pytest.approx(tokens * token)
    assert shared["error"] < 1e-5 and shared["from_unshared"] < 1e-5
