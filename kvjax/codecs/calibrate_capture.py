"""Keys, values and how much they matter, measured on a model: the input of every calibration of a codec.

One forward and one backward pass a sample. Importance is the gradient, at every key and value, of the logit margin
of wanted tokens (the target's logit minus the log-sum-exp of the others). Unlike the gradient of the loss it does
not vanish where the model is sure, which is where retrieval must stay intact.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.transforms import rope
from kvjax.types import Array, AttentionInputs, Cache


def _attend(nudges: tuple, found: list, inputs: AttentionInputs, cache: Cache) -> tuple[Array, Cache]:
    """Causal attention with keys (before RoPE) and values shifted by `nudges`, which are zero."""
    dk, dv = nudges[inputs.layer]
    pos = jnp.broadcast_to(inputs.positions[:, None], inputs.k.shape[:3])
    before = inputs.k.astype(jnp.float32)
    if inputs.inv_freq is not None:
        before = rope(before, pos, inputs.inv_freq, inverse=True)
    found.append((before, inputs.v.astype(jnp.float32)))
    k, v = before + dk, inputs.v.astype(jnp.float32) + dv
    if inputs.inv_freq is not None:
        k = rope(k, pos, inputs.inv_freq)
    b, h, t, d = inputs.q.shape
    q = inputs.q.astype(jnp.float32).reshape(b, k.shape[1], -1, t, d)
    gap = inputs.positions[:, :, None] - inputs.positions[:, None, :]
    seen = (gap >= 0) & (inputs.positions >= 0)[:, None]
    if inputs.window is not None:
        seen &= gap < inputs.window

    @jax.checkpoint
    def attention(q, k, v):
        logits = jnp.einsum("bkgtd,bksd->bkgts", q, k) * inputs.scale
        if inputs.softcap is not None:
            logits = inputs.softcap * jnp.tanh(logits / inputs.softcap)
        prob = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30), axis=-1)
        return jnp.einsum("bkgts,bksd->bkgtd", prob, v)

    return attention(q, k, v).reshape(b, h, t, d).astype(inputs.q.dtype), cache


@functools.partial(jax.jit, static_argnames=("lm",))
def capture(lm: Any, params: Any, tokens: Array, weights: Array) -> tuple[list, list]:
    """Samples of every layer from one batch.

    Args:
      lm: a `kvjax.generation.engine.LanguageModel`.
      params: its weights.
      tokens: int32 [batch, tokens], no padding.
      weights: f32 [batch, tokens]: weight of the margin of predicting tokens[:, i] from what precedes it. Random
        signs make the expected square of the gradient a sum of squares over positions.

    Returns: values [(k, v), ...] and gradients [(dk, dv), ...] of each layer, f32 [batch, kv_heads, tokens,
    head_dim]; keys before RoPE.
    """
    shape = lm.shape
    batch, count = tokens.shape
    zero = jnp.zeros((batch, shape.kv_heads, count, shape.head_dim), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), tokens.shape)

    def margin(nudges: tuple) -> tuple[Array, list]:
        found: list = []
        hidden, _ = lm.hidden(params, tokens, positions, None, functools.partial(_attend, nudges, found))
        logits = lm.logits(params, hidden[:, :-1])
        target = tokens[:, 1:, None]
        chosen = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
        others = jnp.put_along_axis(logits, target, -jnp.inf, axis=-1, inplace=False)
        return jnp.sum(weights[:, 1:] * (chosen - jax.nn.logsumexp(others, axis=-1))), found

    grads, found = jax.grad(margin, has_aux=True)(tuple((zero, zero) for _ in range(shape.layers)))
    return found, list(grads)


def collect(
    lm: Any,
    params: Any,
    samples: list[tuple[np.ndarray, np.ndarray]],
    keep: int,
    sink: int = 4,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Samples of many texts, thinned to `keep` tokens each (those that matter most, and random others).

    samples: (tokens int32 [n], bool [n] whose prediction must stay intact). Gradients of each sample are scaled to
    unit mean square over the whole model. The first `sink` tokens, which stay in full precision, are left out.

    Returns: k, v, gk, gv f16 [layers, kv_heads, kept tokens, head_dim].
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list] = {"k": [], "v": [], "gk": [], "gv": []}
    for tokens, wanted in samples:
        signs = np.where(wanted, rng.choice([-1.0, 1.0], tokens.size), 0.0).astype(np.float32)
        found, grads = capture(lm, params, tokens[None], signs[None])
        stacked = {
            "k": np.stack([np.asarray(k[0]) for k, _ in found]),
            "v": np.stack([np.asarray(v[0]) for _, v in found]),
            "gk": np.stack([np.asarray(k[0]) for k, _ in grads]),
            "gv": np.stack([np.asarray(v[0]) for _, v in grads]),
        }
        norm = np.sqrt(np.mean(stacked["gk"] ** 2) + np.mean(stacked["gv"] ** 2)) + 1e-30
        stacked["gk"] /= norm
        stacked["gv"] /= norm
        weight = (stacked["gk"] ** 2 + stacked["gv"] ** 2).sum((0, 1, 3))
        weight[:sink] = -1.0
        top = np.argsort(-weight)[: keep // 4]
        rest = np.setdiff1d(np.arange(sink, tokens.size), top)
        index = np.sort(
            np.concatenate([top, rng.choice(rest, min(keep - top.size, rest.size), replace=False)])
        )
        for name, x in stacked.items():
            parts[name].append(x[:, :, index].astype(np.float16))
    return {name: np.concatenate(x, axis=2) for name, x in parts.items()}
