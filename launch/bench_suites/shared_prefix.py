"""Suite `shared_prefix`: decode attention of rows that share a prefix, stored once, beside a copy in every row.

`us` is the time that the device is busy for one call. gb_per_s counts keys and values as stored. `error` is the relative
difference of the output, rounded to its dtype, from exact attention in float32, `from_unshared` that from the unshared
result. Values have mean 0.5 and variance 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.prefix import PrefixLayer, attend
from kvjax.types import AttentionInputs
from launch.bench_suites import timing
from launch.bench_suites.decode import device_us
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.formats import KVStore

Array = jax.Array
Row = dict[str, Any]

SHAPES = [((32, 8, 128), 64, 16384, 256), ((32, 8, 128), 32, 16384, 1024), ((32, 8, 128), 64, 4096, 256)]
SMALL = [((4, 2, 64), 8, 512, 64)]  # heads, batch, prefix, own tokens


def own(q: Array, k: Array, v: Array, *, return_lse: bool, implementation: str | None = None) -> Any:
    """Decode attention over stored slots, all filled."""
    return decode_attention(
        q, KVStore(k, v), lengths=jnp.full(k.shape[:2], k.shape[2], jnp.int32), scale=q.shape[-1] ** -0.5,
        return_lse=return_lse, implementation=implementation,
    )  # fmt: skip


def shared(q: Array, k: Array, v: Array, prefix: PrefixLayer, *, implementation: str | None = None) -> Array:
    """The same with the prefix apart, as `kvjax.attend.decode` does it."""
    part = own(q, k, v, return_lse=True, implementation=implementation)
    at = jnp.full((q.shape[0], 1), prefix.k.shape[2] + k.shape[2], jnp.int32)
    x = AttentionInputs(q=q, k=k, v=v, positions=at, scale=q.shape[-1] ** -0.5)
    return attend(x, prefix, part.out, part.lse, implementation)[0].astype(q.dtype)


@jax.jit
def _norms(a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def _difference(a: Array, b: Array) -> float:
    return float(_norms(a, b))


def _measure(fn: Any, *args: Any) -> float:
    return device_us(fn, *args)[0] / 1e6 if jax.default_backend() == "gpu" else timing.measure(fn, *args)


def rows() -> Iterator[Row]:
    """Per shape: a copy of the prefix in every row, then one for all."""
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    for (q_heads, kv_heads, dim), batch, slots, tokens in SMALL if small else SHAPES:
        leads = [
            (batch, q_heads, 1),
            *[(1, kv_heads, slots)] * 2,
            *[(batch, kv_heads, tokens)] * 2,
        ]
        keys = jax.random.split(jax.random.key(0), len(leads))
        q, pk, pv, k, v = (jax.random.normal(key, (*x, dim), dtype) for key, x in zip(keys, leads))
        pv, v = pv + 0.5, v + 0.5
        pos = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (1, kv_heads, slots))
        shape = (batch, q_heads, kv_heads, f"{slots}+{tokens}", dim)

        every = jax.jit(lambda a, b: jnp.concatenate([jnp.repeat(a, b.shape[0], axis=0), b], axis=2))
        copied = every(pk, k), every(pv, v)
        plain = jax.jit(lambda q, k, v: own(q, k, v, return_lse=False))
        unshared = plain(q, *copied)
        moved = sum(x.nbytes for x in copied)
        first = _measure(plain, q, *copied)
        del copied
        high = [x.astype(jnp.float32) for x in (q, k, v, pk, pv)]
        exact = jax.jit(functools.partial(shared, implementation="xla"))(
            *high[:3], PrefixLayer(k=high[3], v=high[4], pos=pos)
        )
        row = timing.row("unshared", shape, dtype.__name__, timing.own_name(), first, moved=moved)
        row["error"] = _difference(unshared, exact)
        yield row

        prefix = PrefixLayer(k=pk, v=pv, pos=pos)
        call = jax.jit(shared)
        got = call(q, k, v, prefix)
        seconds = _measure(call, q, k, v, prefix)
        moved = sum(x.nbytes for x in (pk, pv, k, v))
        row = timing.row("shared prefix", shape, dtype.__name__, timing.own_name(), seconds, moved=moved)
        row["error"], row["from_unshared"] = _difference(got, exact), _difference(got, unshared)
        row["speedup"] = first / seconds
        yield row
