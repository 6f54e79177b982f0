"""Float64 numpy loops: attention over positioned slots, without any of the code under test."""

from __future__ import annotations

import dataclasses

import numpy as np


def attention(
    q, k, v, q_positions, k_positions, *, scale, window=None, softcap=None, q_segments=None, k_segments=None,
    allowed=None,
):  # fmt: skip
    """One query at a time. `allowed(b, h, t, s)` may forbid more pairs.

    Returns out [B, Hq, T, D], lse [B, Hq, T], probs [B, Hq, T, S], all float64.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    batch, q_heads, tokens, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    k_positions = np.asarray(k_positions)
    if k_positions.ndim == 2:
        k_positions = np.repeat(k_positions[:, None], kv_heads, 1)
    out = np.zeros((batch, q_heads, tokens, dim))
    lse = np.full((batch, q_heads, tokens), -np.inf)
    probs = np.zeros((batch, q_heads, tokens, slots))
    for b in range(batch):
        for h in range(q_heads):
            kv = h // (q_heads // kv_heads)
            for t in range(tokens):
                at = int(q_positions[b, t])
                seen = [
                    s
                    for s in range(slots)
                    if 0 <= k_positions[b, kv, s] <= at
                    and (window is None or k_positions[b, kv, s] > at - window)
                    and (q_segments is None or q_segments[b, t] == k_segments[b, s])
                    and (allowed is None or allowed(b, h, t, s))
                ]
                if not seen:
                    continue
                logits = k[b, kv, seen] @ q[b, h, t] * scale
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                top = logits.max()
                weights = np.exp(logits - top)
                lse[b, h, t] = top + np.log(weights.sum())
                weights /= weights.sum()
                probs[b, h, t, seen] = weights
                out[b, h, t] = weights @ v[b, kv, seen]
    return out, lse, probs


@dataclasses.dataclass
class Case:
    """Operands of one call, as numpy arrays (bfloat16 rounding is applied by `cast`)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_positions: np.ndarray
    k_positions: np.ndarray
    options: dict


def fresh_rng() -> np.random.Generator:
    """A new seed every run; pytest shows it on failure through the captured output."""
    seed = int(np.random.SeedSequence().entropy) % (1 << 32)
    print(f"seed={seed}")
    return np.random.default_rng(seed)


def aligned_case(
    rng, *, batch=2, q_heads=4, kv_heads=2, tokens=40, dim=16, lengths=None, left=False, **options
):
    """A causal prompt with ragged rows: padding right (or left), NaN in every empty slot of K and V."""
    q = rng.normal(size=(batch, q_heads, tokens, dim))
    k = rng.normal(size=(batch, kv_heads, tokens, dim))
    v = rng.normal(size=(batch, kv_heads, tokens, dim))
    positions = np.full((batch, tokens), -1, np.int32)
    for b in range(batch):
        n = tokens if lengths is None else lengths[b]
        start = tokens - n if left else 0
        positions[b, start : start + n] = np.arange(n)
        k[b, :, positions[b] < 0] = np.nan
        v[b, :, positions[b] < 0] = np.nan
    return Case(q, k, v, positions, positions, dict(causal_aligned=True, **options))


def scattered_case(rng, *, batch=2, q_heads=4, kv_heads=2, tokens=9, slots=50, dim=16, fill=0.7, **options):
    """A chunk of queries over slots in any order, different per KV head; NaN in empty ones."""
    q = rng.normal(size=(batch, q_heads, tokens, dim))
    k = rng.normal(size=(batch, kv_heads, slots, dim))
    v = rng.normal(size=(batch, kv_heads, slots, dim))
    k_positions = np.full((batch, kv_heads, slots), -1, np.int32)
    for b in range(batch):
        for h in range(kv_heads):
            order = rng.permutation(slots)
            used = rng.random(slots) < fill
            k_positions[b, h] = np.where(used, order, -1)
            k[b, h, ~used] = np.nan
            v[b, h, ~used] = np.nan
    q_positions = np.stack([np.arange(tokens) + rng.integers(0, slots) for _ in range(batch)]).astype(
        np.int32
    )
    q_positions[0, tokens // 2] = -1
    return Case(q, k, v, q_positions, k_positions, dict(options))


def relative_error(have, want) -> float:
    """||have - want|| / ||want|| in float64; inf where `have` is not finite but `want` is."""
    have, want = np.asarray(have).astype(np.float64), np.asarray(want)
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(have), finite) or not np.array_equal(have[~finite], want[~finite]):
        return float("inf")
    norm = np.linalg.norm(want[finite])
    return float(np.linalg.norm(have[finite] - want[finite]) / (norm if norm > 0 else 1.0))
