"""Suite `sparse_prefill`: prefill by pattern beside dense attention, on data with structure, estimation included.

Random data has no pattern to find, so queries and keys are made of parts that attention in language models shows: sinks,
a decay with distance, topics that return, clusters of tokens that all later ones read, and noise. Every head has its own
mix, and two data sets differ in how far structure stands out. `kept` is the share of the causal blocks that were read,
`dense_heads` how many heads fell back, `error` |out - dense| / |dense| over all heads and rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import policies
from kvjax.policies.observation import Observation
from kvjax.policies.prefill_patterns.base import PrefillPattern
from kvjax.sparse_prefill import sparse_attention
from launch.bench_suites import timing
from pallas_kernels.prefill_attention import prefill_attention

Array = jax.Array
Row = dict[str, Any]

HEADS = (32, 8, 128)  # query heads, KV heads, head_dim
LENGTHS = {"gpu": (32768, 131072), "tpu": (32768,), "cpu": (1024,)}
GAINS = {"peaked": (0.9, 1.2), "diffuse": (0.7, 1.1)}  # how far structure stands out from the noise
SPECS = (
    "xattention(stride=16)",
    "xattention(stride=8)",
    "xattention(threshold=0.97, min_recall=0.85, spread=True)",
    "vertical_slash",
    "minference",
    "flexprefill",
    "tri_shape",
)
SMALL = ("xattention(stride=16)", "vertical_slash(vertical=32, slash=128)", "a_shape(sink=32, window=128)")


def structured(
    tokens: int, heads: tuple[int, int, int], dtype: Any, gains: tuple[float, float], seed: int = 0
) -> tuple[Array, Array, Array]:
    """q [1, q_heads, tokens, head_dim], k, v [1, kv_heads, tokens, head_dim] with logits q.k / sqrt(head_dim) of:

    16 (1/n) sum_i cos(w_i distance) + 7 where topics agree + 7 on clusters of 32 tokens + 15 on the first 4 + noise of
    variance about 2, each part but the noise scaled by a factor within `gains` of its own per query head.
    """
    q_heads, kv_heads, dim = heads
    rng = np.random.default_rng(seed)
    waves, topic_dims = dim // 8, dim // 4  # a wave takes two channels
    noise_dims = dim - 2 * waves - topic_dims - 1
    at = np.arange(tokens)
    angle = at[:, None] * 10000.0 ** (-np.arange(waves) / waves)
    wave = np.concatenate([np.cos(angle), np.sin(angle)], 1) / waves**0.5
    topics = rng.standard_normal((16, topic_dims))
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)
    topic = topics[rng.integers(0, 16, -(-tokens // 1024))][at // 1024]
    loud = np.zeros(tokens)
    for start in rng.integers(0, tokens, max(1, tokens // 2048)):
        loud[start : start + 32] = 7.0
    loud[:4] = 15.0
    gain = rng.uniform(*gains, (q_heads, 3, 1, 1)) * dim**0.5
    keys = jax.random.split(jax.random.key(seed), 3)

    @jax.jit
    def make(wave, topic, loud, gain):
        def noise(key, heads):
            return (2.0 * dim / noise_dims) ** 0.25 * jax.random.normal(key, (heads, tokens, noise_dims))

        one = jnp.ones((q_heads, tokens, 1))
        q = [16 * gain[:, 0] * wave, 7 * gain[:, 1] * topic, gain[:, 2] * one, noise(keys[0], q_heads)]
        spread = lambda x: jnp.broadcast_to(x, (kv_heads, *x.shape))  # noqa: E731
        k = [spread(wave), spread(topic), spread(loud[:, None]), noise(keys[1], kv_heads)]
        v = jax.random.normal(keys[2], (kv_heads, tokens, dim))
        return tuple(jnp.concatenate(x, -1).astype(dtype)[None] for x in (q, k, [v]))

    return make(*(jnp.asarray(x, jnp.float32) for x in (wave, topic, loud, gain)))


def observed(q: Array, k: Array, v: Array) -> Observation:
    """A whole prompt, nothing padded."""
    tokens = q.shape[2]
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    return Observation(
        q=q, q_pos=pos, k=k, v=v, pos=jnp.broadcast_to(pos[:, None], (1, k.shape[1], tokens)),
        length=jnp.full((1,), tokens, jnp.int32), scale=q.shape[-1] ** -0.5,
    )  # fmt: skip


def dense(obs: Observation) -> tuple[Array, Array]:
    """Dense attention of the same call."""
    q, pos = obs.need("q"), obs.need("q_pos")
    return prefill_attention(
        q,
        obs.k,
        obs.v,
        q_positions=pos,
        k_positions=pos,
        scale=obs.scale,
        causal_aligned=True,
        return_lse=True,
    )


@jax.jit
def _error(a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.sum(b**2))


def _pattern(spec: str) -> PrefillPattern:
    found = policies.parse(spec).prefill
    assert found is not None
    return found


def rows() -> Iterator[Row]:
    """Dense first, then every pattern: its estimate alone, and the whole call."""
    small = jax.default_backend() == "cpu"
    heads, dtype = ((4, 2, 64), jnp.float32) if small else (HEADS, jnp.bfloat16)
    for tokens, (data, gains) in itertools.product(LENGTHS[jax.default_backend()], GAINS.items()):
        obs = observed(*structured(tokens, heads, dtype, gains))
        shape = (1, *heads[:2], tokens, heads[2])
        flops = 4 * heads[0] * heads[2] * tokens * (tokens + 1) / 2
        named = functools.partial(
            timing.row, shape=shape, dtype=dtype.__name__, implementation=timing.own_name()
        )
        whole = jax.jit(dense)
        want = whole(obs)[0]
        seconds = timing.measure(whole, obs)
        yield named(f"{data}: dense", seconds=seconds, flops=flops)
        for spec in SMALL if small else SPECS:
            pattern = _pattern(spec)
            estimate = jax.jit(lambda o, p=pattern: p.blocks(o, aligned=True).indices)
            call = jax.jit(functools.partial(sparse_attention, pattern, aligned=True))
            n = -(-tokens // pattern.block)
            by_head = np.asarray((estimate(obs) >= 0).sum((0, 2, 3))) / (n * (n + 1) / 2)
            yield named(f"{data}: {spec}, estimate", seconds=timing.measure(estimate, obs))
            got = call(obs)[0]
            kept = float(by_head.mean())
            row = named(f"{data}: {spec}", seconds=timing.measure(call, obs), flops=flops * kept)
            row.update(
                kept=kept, dense_heads=int((by_head == 1).sum()), error=float(_error(got, want)),
                speedup=seconds * 1e6 / row["us"],
            )  # fmt: skip
            yield row
