"""Suite `shared_prefix`: decode attention of rows that share a prefix, stored once, beside a copy in every row.

`us` is the time that the device is busy for one call. gb_per_s counts keys and values as stored. `error` is |out -
unshared| / |unshared| on the same keys and values.
"""

from __future__ import annotations

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


def own(q: Array, k: Array, v: Array, *, return_lse: bool) -> Any:
    """Decode attention over stored slots, all filled."""
    return decode_attention(
        q, KVStore(k, v), lengths=jnp.full(k.shape[:2], k.shape[2], jnp.int32), scale=q.shape[-1] ** -0.5,
        return_lse=return_lse,
    )  # fmt: skip


def shared(q: Array, k: Array, v: Array, prefix: PrefixLayer) -> Array:
    """The same with the prefix apart, as `kvjax.attend.decode` does it."""
    part = own(q, k, v, return_lse=True)
    at = jnp.full((q.shape[0], 1), prefix.k.shape[2] + k.shape[2], jnp.int32)
    x = AttentionInputs(q=q, k=k, v=v, positions=at, scale=q.shape[-1] ** -0.5)
    return attend(x, prefix, part.out, part.lse, None)[0].astype(q.dtype)


def _measure(fn: Any, *args: Any) -> float:
    return device_us(fn, *args)[0] / 1e6 if jax.default_backend() == "gpu" else timing.measure(fn, *args)


def rows() -> Iterator[Row]:
    """Per shape: a copy of the prefix in every row, then one for all."""
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    for (q_heads, kv_heads, dim), batch, slots, tokens in SMALL if small else SHAPES:
        keys = iter(jax.random.split(jax.random.key(0), 5))
        draw = lambda *shape: jax.random.normal(next(keys), (*shape, dim), dtype)  # noqa: E731
        q = draw(batch, q_heads, 1)
        pk, pv = draw(1, kv_heads, slots), draw(1, kv_heads, slots)
        k, v = draw(batch, kv_heads, tokens), draw(batch, kv_heads, tokens)
        pos = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (1, kv_heads, slots))
        shape = (batch, q_heads, kv_heads, f"{slots}+{tokens}", dim)

        every = jax.jit(lambda a, b: jnp.concatenate([jnp.repeat(a, b.shape[0], axis=0), b], axis=2))
        copied = every(pk, k), every(pv, v)
        plain = jax.jit(lambda q, k, v: own(q, k, v, return_lse=False))
        want = plain(q, *copied)
        moved = sum(x.nbytes for x in copied)
        first = _measure(plain, q, *copied)
        yield timing.row("unshared", shape, dtype.__name__, timing.own_name(), first, moved=moved)
        del copied

        prefix = PrefixLayer(pk, pv, pos)
        call = jax.jit(shared)
        got = call(q, k, v, prefix)
        seconds = _measure(call, q, k, v, prefix)
        moved = sum(x.nbytes for x in (pk, pv, k, v))
        row = timing.row("shared prefix", shape, dtype.__name__, timing.own_name(), seconds, moved=moved)
        difference = jnp.linalg.norm(got.astype(jnp.float32) - want.astype(jnp.float32))
        row["error"] = float(difference / jnp.linalg.norm(want.astype(jnp.float32)))
        row["speedup"] = first / seconds
        yield row
