"""Which heads a decode step needs more of than sinks and the newest entries: heads are made to stream one after another.

Samples are of all generated task kinds, answers are given. The prompt is attended in full; only the answer's queries are
restricted, as a selector restricts them. At each round the head whose streaming changes the model's distribution of the
answer least (KL divergence to the full model, beside the heads that stream already) begins to stream.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.types import Array, AttendFn, AttentionInputs
from launch.calibration import samples
from launch.calibration.heads import Progress, collect
from launch.evaluation.synthetic import RULER_TASKS, ruler_sample
from launch.session import Session
from models.decoder import masked_attention

ANSWER = 64  # tokens of an answer that are looked at
SINK, WINDOW = 4, 0.02  # what a streaming head reads: the first entries, and this share of the newest


def _keys_values(x: AttentionInputs) -> tuple[Array, Array]:
    return x.k, x.v


def restricted(held: Any, answer: Array, full: Array) -> AttendFn:
    """Attention of an answer's tokens on keys and values `held` (per layer [1, kv_heads, n, head_dim]) of the `answer` tokens
    before, and on their own; heads where full bool [layers, kv_heads] is False see sinks and the newest WINDOW."""

    def attend(x: AttentionInputs, cache: Any) -> tuple[Array, Any]:
        k, v = (jnp.concatenate(pair, axis=2) for pair in zip(held[x.layer], (x.k, x.v)))
        before = jnp.arange(k.shape[2] - x.k.shape[2])
        pos = jnp.concatenate([jnp.where(before < answer, before, -1), x.positions[0]])
        at = x.positions[0][:, None]
        causal = (pos >= 0) & (pos <= at)
        near = causal & ((pos < SINK) | (pos > at - jnp.maximum(WINDOW * answer, 1.0)))
        seen = jnp.where(full[x.layer][:, None, None], causal, near)
        return masked_attention(x, k, v, seen[None, :, None]), cache

    return attend


@functools.partial(jax.jit, static_argnames="lm")
def divergences(
    lm: Any, params: Any, held: Any, tokens: Array, positions: Array, answer: Array, full: Array
) -> Array:
    """f32 [candidates]: mean KL divergence of the next token over an answer, for full bool [candidates, layers, kv_heads]."""

    def predicted(full: Array) -> Array:
        hidden = lm.hidden(params, tokens, positions, (), restricted(held, answer, full))[0]
        return jax.nn.log_softmax(lm.logits(params, hidden)[0], axis=-1)

    want = predicted(jnp.ones(full.shape[1:], bool))
    valid = positions[0] >= 0

    def one(full: Array) -> Array:
        kl = jnp.sum(jnp.exp(want) * (want - predicted(full)), axis=-1)
        return jnp.sum(jnp.where(valid, kl, 0.0)) / jnp.sum(valid)

    return jax.lax.map(one, full)


def reading(session: Session, count: int, length: int, step: Progress) -> dict[str, np.ndarray]:
    """reading f32 [layers, kv_heads]: the divergence at which each head began to stream, never less than before it.

    `count` samples of `length` tokens, of all generated kinds in turn; the mean is over samples.
    """
    shape = session.lm.shape
    width = -(-(length + ANSWER) // samples.BIN) * samples.BIN
    cases = []
    for index in range(count):
        task = RULER_TASKS[index % len(RULER_TASKS)]
        item = ruler_sample(task, length, session.encode, seed=3, index=index // len(RULER_TASKS))
        prompt = session.begin() + session.encode(item.context) + session.encode(item.question)
        given = session.encode(" " + ", ".join(item.answers))[:ANSWER]
        held = collect(session.lm, session.model.params, *samples.padded(prompt[:width], width), _keys_values)
        tokens, positions = samples.padded(given, ANSWER)
        positions = np.where(positions >= 0, positions + len(prompt), -1)
        cases.append((held, tokens, positions, np.int32(len(prompt))))
        step(1)
    full = np.ones((shape.layers, shape.kv_heads), bool)
    score, reached = np.zeros(full.shape, np.float32), 0.0
    while full.any():
        heads = np.argwhere(full)
        rows = full.size
        while rows // 2 >= len(heads):  # few shapes for all rounds
            rows //= 2
        trial = np.repeat(full[None], rows, axis=0)
        trial[np.arange(len(heads)), heads[:, 0], heads[:, 1]] = False
        found = [divergences(session.lm, session.model.params, *case, trial) for case in cases]
        losses = np.mean([np.asarray(x)[: len(heads)] for x in found], axis=0)
        best = int(np.argmin(losses))
        reached = max(reached, float(losses[best]))
        score[tuple(heads[best])], full[tuple(heads[best])] = reached, False
    return {"reading": score}
