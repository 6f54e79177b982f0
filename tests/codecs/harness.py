"""One attention layer with a cache, filled in different ways; a float64 oracle of its attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import attend, compress
from kvjax.cache import deferred, ops
from kvjax.cache.plan import Plan
from kvjax.policies import parse
from kvjax.types import AttentionInputs, ModelShape


@dataclasses.dataclass
class Layer:
    """A layer's inputs: q [batch, q_heads, tokens, dim], k and v [batch, kv_heads, tokens, dim], row lengths."""

    spec: object
    tokens: int
    lengths: tuple[int, ...]
    q_heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        shapes = [
            (len(self.lengths), h, self.tokens, self.dim)
            for h in (self.q_heads, self.kv_heads, self.kv_heads)
        ]
        self.q, self.k, self.v = (jnp.asarray(rng.standard_normal(s), self.dtype) for s in shapes)
        # Keys with a few large channels, as real ones have.
        self.k = self.k * jnp.where(jnp.arange(self.dim) % 16 == 3, 4.0, 1.0).astype(self.dtype)
        half = self.dim // 2
        self.inv_freq = jnp.asarray(1e4 ** (-np.arange(half) / half), jnp.float32)

    def plan(self, prompt: int, reserve: int, **kwargs) -> Plan:
        shape = ModelShape(
            1, self.q_heads, self.kv_heads, self.dim, (None,), self.dtype, kwargs.pop("context", 131072)
        )
        return Plan(parse(self.spec), shape, len(self.lengths), prompt, reserve, **kwargs)

    def inputs(self, start: int, stop: int, until: np.ndarray, first: int = 0) -> AttentionInputs:
        at = np.arange(start, stop)
        pos = jnp.asarray(np.where(at < until[:, None], at + first, -1), jnp.int32)
        cut = slice(start, stop)
        return AttentionInputs(
            self.q[:, :, cut],
            self.k[:, :, cut],
            self.v[:, :, cut],
            pos,
            inv_freq=self.inv_freq,
            scale=self.dim**-0.5,
        )

    def fill(self, plan: Plan, prompt: int, chunk: int = 0, first: int = 0):
        """A cache with all `lengths` tokens: `prompt` of them by prefill (in chunks), the rest one by one."""
        until, cache = np.asarray(self.lengths), ops.empty(plan)
        if first:
            cache = cache.replace(next_position=cache.next_position + first)

        def run(fresh):
            def call(x, cache):
                fn = attend.decode(plan) if fresh is None else attend.prefill(plan, fresh=fresh)
                out, cache = fn(x, cache)
                return out, compress.finish(plan, cache, x.positions)

            return jax.jit(call)

        step, whole, more = run(None), run(True), run(False)
        out = None
        if prompt and chunk:
            for at in range(0, prompt, chunk):
                out, cache = more(self.inputs(at, at + chunk, until, first), cache)
        elif prompt:
            out, cache = whole(self.inputs(0, prompt, until, first), cache)
        for at in range(prompt, self.tokens):
            out, cache = step(self.inputs(at, at + 1, until, first), cache)
        return out, cache

    def stored(self, plan: Plan, cache):
        """What the layer holds: (k, v) float64 and positions, everything decoded."""
        if plan.layers[0].policy.codec.deferred:
            k, v, pos = deferred.decoded(plan, cache, 0, self.inv_freq)
        else:
            view = ops.view(plan, cache, 0)
            ctx = ops.context(plan, 0, view.pos, self.inv_freq)
            (k, v), pos = plan.layers[0].policy.codec.decode(view.store, self.dtype, ctx), view.pos
        return np.asarray(k, np.float64), np.asarray(v, np.float64), np.asarray(pos)


def oracle(q, k, v, pos, scale: float) -> np.ndarray:
    """Attention of q [batch, q_heads, dim] over the entries with pos >= 0, in float64, one head at a time."""
    q = np.asarray(q, np.float64)
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keep = pos[b, h // group] >= 0
            logits = k[b, h // group][keep] @ q[b, h] * scale
            prob = np.exp(logits - logits.max())
            out[b, h] = prob @ v[b, h // group][keep] / prob.sum()
    return out
