"""DuoAttention's gates: which heads need the whole context, found with optax on synthetic passkeys.

Weights are frozen. Each KV head's output is alpha * full + (1 - alpha) * streaming (sinks and a recent window);
the loss is the mean squared error of the final hidden states against the full model on the answer's tokens plus
an L1 term on alpha, which starts at 1 and is clamped to [0, 1] after each step (arXiv 2410.10819).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.types import Array, AttendFn, AttentionInputs
from launch.calibration import samples
from launch.calibration.heads import Progress
from launch.session import Session
from models.decoder import causal_attend, masked_attention


def gated(alpha: Array, sink: int, recent: int) -> AttendFn:
    """Attention with gates alpha f32 [layers, kv_heads]."""

    def attend(x: AttentionInputs, cache: Any) -> tuple[Array, Any]:
        full, cache = causal_attend(x, cache)
        keys, queries = x.positions[:, None, :], x.positions[:, :, None]
        seen = (keys >= 0) & (keys <= queries) & ((keys < sink) | (keys > queries - recent))
        streaming = masked_attention(x, x.k, x.v, seen[:, None, None])
        gate = jnp.repeat(alpha[x.layer], x.q.shape[1] // x.k.shape[1])[:, None, None]
        return gate * full + (1 - gate) * streaming, cache

    return attend


@functools.partial(jax.jit, static_argnames=("lm", "sink", "recent", "optimizer"))
def update(
    lm: Any, params: Any, alpha: Array, state: Any, tokens: Array, positions: Array, answer: Array,
    strength: Array, *, sink: int, recent: int, optimizer: optax.GradientTransformation,
) -> tuple[Array, Any, Array]:  # fmt: skip
    """One step on one sample: (alpha, optimizer state, loss)."""
    at = ((positions >= answer) & (positions >= 0))[..., None]
    want = lm.hidden(params, tokens, positions, (), causal_attend)[0]

    def loss(alpha: Array) -> Array:
        got = lm.hidden(params, tokens, positions, (), gated(alpha, sink, recent))[0]
        error = jnp.where(at, (got - want).astype(jnp.float32) ** 2, 0.0)
        return jnp.sum(error) / (jnp.sum(at) * got.shape[-1]) + strength * jnp.sum(jnp.abs(alpha))

    value, grad = jax.value_and_grad(loss)(alpha)
    change, state = optimizer.update(grad, state)
    return jnp.clip(optax.apply_updates(alpha, change), 0.0, 1.0), state, value


def gates(
    session: Session,
    count: int,
    length: int,
    step: Progress,
    *,
    sink: int = 16,
    recent: int = 64,
    rate: float = 0.02,
    strength: float = 0.05,
) -> dict[str, np.ndarray]:
    """duo f32 [layers, kv_heads]: alpha after `count` steps of Adam, one sample of `length` tokens each."""
    shape = session.lm.shape
    optimizer = optax.adam(rate)
    alpha = jnp.ones((shape.layers, shape.kv_heads), jnp.float32)
    state = optimizer.init(alpha)
    width = -(-(length + 64) // samples.BIN) * samples.BIN
    for index in range(count):
        item = samples.needle(session, length, 2000 + index)
        tokens, positions = samples.padded(item.tokens, width)
        alpha, state, _ = update(
            session.lm, session.model.params, alpha, state, tokens, positions, item.answer - 1,
            jnp.float32(strength), sink=sink, recent=recent, optimizer=optimizer,
        )  # fmt: skip
        step(1)
    return {"duo": np.asarray(alpha)}
