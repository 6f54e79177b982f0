"""Scores of heads, from attention: retrieval, retrieval and reasoning, echo and induction; errors of layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.policies.observation import Observation
from kvjax.policies.scorers.attention import pool
from kvjax.types import Array, AttendFn, AttentionInputs
from launch.calibration import samples
from launch.session import Session
from models.decoder import causal_attend, masked_attention

Progress = Callable[[int], Any]


def observing(record: Callable[[AttentionInputs], Any]) -> AttendFn:
    """Causal attention whose `cache`, a tuple, collects record(inputs) of every layer."""

    def attend(x: AttentionInputs, cache: Any) -> tuple[Array, Any]:
        return causal_attend(x, cache)[0], (*cache, record(x))

    return attend


def observe(x: AttentionInputs) -> Observation:
    """The observation of a whole prompt."""
    pos = jnp.broadcast_to(x.positions[:, None], x.k.shape[:3])
    length = jnp.sum(x.positions >= 0, axis=1, dtype=jnp.int32)
    return Observation(
        q=x.q, q_pos=x.positions, k=x.k, v=x.v, pos=pos, length=length, wo=x.wo, inv_freq=x.inv_freq,
        layer=x.layer, scale=x.scale, window=x.window, softcap=x.softcap,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("lm", "record"))
def collect(lm: Any, params: Any, tokens: Array, positions: Array, record: Any) -> tuple[Any, ...]:
    """record(inputs) of every layer."""
    return lm.hidden(params, tokens, positions, (), observing(record))[1]


def answer_rows(x: AttentionInputs) -> Array:
    """Attention of the last 48 queries, f32 [1, q_heads, 48, slots]."""
    return observe(x).window_probs(48)


def by_kv_head(scores: np.ndarray, kv_heads: int, how: Callable[..., np.ndarray] = np.mean) -> np.ndarray:
    """[layers, q_heads] -> [layers, kv_heads]."""
    return how(scores.reshape(scores.shape[0], kv_heads, -1), axis=2)


def retrieval(session: Session, count: int, length: int, step: Progress) -> dict[str, np.ndarray]:
    """Scores on needles with teacher-forced answers, mean over samples.

    retrieval [layers, kv_heads] (HeadKV): 1/|needle| whenever the most attended token lies in the needle and is
    the token to be produced. retrieval_reasoning (HeadKV-R2): of the |needle| most attended tokens those inside the
    needle add their attention / |needle|. semantic [layers, q_heads] (CompressKV): when the token to be produced
    occurs in the needle, the attention on the whole needle; retrieval_heads int32 [layers, 4]: the best by it.
    """
    shape = session.lm.shape
    total = {n: np.zeros((shape.layers, shape.q_heads)) for n in ("retrieval", "reasoning", "semantic")}
    for index in range(count):
        item = samples.needle(session, length, index)
        width = -(-(length + 64) // samples.BIN) * samples.BIN
        rows = collect(session.lm, session.model.params, *samples.padded(item.tokens, width), answer_rows)
        probs = np.stack([np.asarray(r[0]) for r in rows])  # [layers, q_heads, 48, slots]
        tokens, n = np.asarray(item.tokens), len(item.tokens)
        for row in range(item.answer - 1, n - 1):
            a, target = probs[:, :, 48 - n + row], tokens[row + 1]
            best = a.argmax(-1)
            for start, end in item.needles:
                size = end - start
                inside = (best >= start) & (best < end)
                total["retrieval"] += (inside & (tokens[best] == target)) / size
                order = np.argsort(-a, axis=-1)[..., :size]
                top = np.take_along_axis(a, order, -1)
                total["reasoning"] += (top * ((order >= start) & (order < end))).sum(-1) / size
                if target in tokens[start:end]:
                    total["semantic"] += a[..., start:end].sum(-1)
        step(1)
    total = {k: (v / count).astype(np.float32) for k, v in total.items()}
    best = np.argsort(-total["semantic"], axis=-1, kind="stable")[:, :4]
    return {
        "retrieval": by_kv_head(total["retrieval"], shape.kv_heads),
        "retrieval_reasoning": by_kv_head(total["reasoning"], shape.kv_heads),
        "semantic": total["semantic"],
        "retrieval_heads": np.sort(best, axis=-1).astype(np.int32),
    }


def echo_induction(session: Session, count: int, length: int, step: Progress) -> dict[str, np.ndarray]:
    """RazorAttention's scores on random tokens repeated 4 times: echo and induction f32 [layers, kv_heads].

    echo: mean attention from a token to earlier copies of itself; induction: to the tokens after those copies. A KV
    head has the maximum of its query heads.
    """
    shape, copies = session.lm.shape, 4
    period = length // copies
    record = functools.partial(_copies, period=period, first=len(session.begin()))
    total = np.zeros((2, shape.layers, shape.q_heads))
    for index in range(count):
        tokens = samples.repeats(session, period, copies, index)
        rows = collect(session.lm, session.model.params, *samples.padded(tokens, len(tokens)), record)
        total += np.stack([np.asarray(r) for r in rows], axis=1) / count
        step(1)
    echo, induction = (by_kv_head(x.astype(np.float32), shape.kv_heads, np.max) for x in total)
    return {"echo": echo, "induction": induction}


def _copies(x: AttentionInputs, *, period: int, first: int) -> Array:
    """(echo, induction) f32 [2, q_heads], mean over the tokens that have an earlier copy."""

    def fn(probs: Array, q_pos: Array) -> Array:
        gap = q_pos[:, None, :, None] - x.positions[:, None, None, :]
        ours = (x.positions >= first)[:, None, None, :] & (gap > 0)
        late = (q_pos >= first + period)[:, None, :, None]
        echo = jnp.where(ours & late & (gap % period == 0), probs, 0.0)
        after = x.positions[:, None, None, :] > first  # the first token follows no copy
        induction = jnp.where(ours & after & late & (gap % period == period - 1), probs, 0.0)
        return jnp.stack([jnp.sum(echo, axis=(0, 2)), jnp.sum(induction, axis=(0, 2))])

    queries = jnp.sum(x.positions >= first + period)
    return jnp.sum(observe(x).column_reduce(fn), axis=-1) / jnp.maximum(queries, 1)


def layer_errors(
    session: Session, count: int, length: int, heads: np.ndarray, step: Progress
) -> dict[str, np.ndarray]:
    """CompressKV: layer_errors f32 [layers], sum 1.

    Relative Frobenius error of the layer's output (after Wo) at the answer's tokens, when only a tenth of the
    prompt, chosen by the layer's semantic retrieval heads, and its last 8 tokens are kept; mean over samples.
    """
    total = np.zeros(session.lm.shape.layers)
    chosen = tuple(tuple(int(h) for h in row) for row in heads)
    for index in range(count):
        item = samples.needle(session, length, 1000 + index)
        width = -(-(length + 64) // samples.BIN) * samples.BIN
        tokens, positions = samples.padded(item.tokens, width)
        errors = _errors(session.lm, session.model.params, tokens, positions, item.answer, chosen)
        total += np.asarray(errors) / count
        step(1)
    return {"layer_errors": (total / total.sum()).astype(np.float32)}


@functools.partial(jax.jit, static_argnames=("lm", "heads"))
def _errors(lm: Any, params: Any, tokens: Array, positions: Array, answer: Array, heads: Any) -> Array:
    record = functools.partial(_error, heads=heads, answer=answer)
    return jnp.stack(lm.hidden(params, tokens, positions, (), observing(record))[1])


def _error(x: AttentionInputs, *, heads: Any, answer: Array) -> Array:
    window = 8
    pos = x.positions
    prompt = observe(x).replace(q_pos=jnp.where(pos < answer, pos, -1))
    mass = jnp.sum(prompt.window_probs(window)[:, jnp.asarray(heads[x.layer])], axis=2)
    before = (pos >= 0) & (pos < answer - window)
    score = jnp.mean(pool(jnp.where(before[:, None], mass, 0.0), 5, "avg"), axis=1)
    rank = jnp.argsort(jnp.argsort(-jnp.where(before, score, -1.0), axis=1), axis=1)
    kept = (before & (rank < answer // 10)) | (pos >= answer - window)
    causal = (pos[:, None, :] >= 0) & (pos[:, None, :] <= pos[:, :, None])

    def output(mask: Array) -> Array:
        out = masked_attention(x, x.k, x.v, mask[:, None, None])
        return jnp.einsum("bhtd,hde->bte", out, x.wo) * (pos >= answer)[..., None]

    full, small = output(causal), output(causal & kept[:, None])
    return jnp.linalg.norm(small - full) / (jnp.linalg.norm(full) + 1e-5)
