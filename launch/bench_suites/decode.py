"""Suite `decode_attention`: one new token over a stored cache, every format and layout, beside the peers.

On an accelerator `us` is the time that the device is busy for one call, the merge of split results included, from
the profiler; `kernel_us` is the attention kernel alone and `chained_us` a call in a dependent loop under one jit.
gb_per_s counts the bytes that must be read: the stored keys, values and scales of the slots attended.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from launch.bench_suites import timing
from pallas_kernels import formats
from pallas_kernels.decode_attention import decode_attention

Array = jax.Array
Row = dict[str, Any]

HEADS = (32, 8, 128)  # query heads, KV heads, head_dim
SHAPES = [(1, 32768), (1, 131072), (8, 8192), (8, 32768), (32, 8192), (64, 4096)]  # batch, slots
QUANTIZED = [(8, 32768), (32, 8192)]
RAGGED = [(32, 8192, 16), (32, 8192, 64), (32, 8192, 128)]  # batch, slots, page_size
LONG = (8, 131072)
_CALLS = 10
_CHAIN = 20


def device_us(fn: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Microseconds per call that the device is busy, and those in the attention kernel alone."""
    jax.block_until_ready(fn(*args))

    def run() -> None:
        for _ in range(_CALLS):
            out = fn(*args)
        jax.block_until_ready(out)

    spans = timing.device_spans(run)
    busy = {name: statistics.median(us) * len(us) / _CALLS for name, us in spans.items()}
    return sum(busy.values()), sum(us for name, us in busy.items() if "decode_attention" in name)


def chained_us(fn: Callable[[Array], Array], q: Array, *args: Any) -> float:
    """Microseconds per call in a loop under one jit where every query depends on the result before."""

    def loop(q, *args):
        def step(_, total):
            return total + fn(q + (total * 0).astype(q.dtype), *args).astype(jnp.float32)

        return lax.fori_loop(0, _CHAIN, step, jnp.zeros(q.shape, jnp.float32))

    return timing.measure(jax.jit(loop), q, *args) / _CHAIN * 1e6


@functools.lru_cache(maxsize=1)
def operands(batch: int, slots: int, heads: tuple[int, int, int], dtype: Any) -> tuple[Array, Array, Array]:
    """Random q [batch, q_heads, 1, head_dim], k and v [batch, kv_heads, slots, head_dim]."""
    q_heads, kv_heads, dim = heads
    keys = jax.random.split(jax.random.key(batch * slots), 3)
    make = jax.jit(lambda key: jax.random.normal(key, (batch, kv_heads, slots, dim), dtype))
    return jax.random.normal(keys[0], (batch, q_heads, 1, dim), dtype), make(keys[1]), make(keys[2])


def store_of(k: Array, v: Array, fmt: str, meta_dtype: Any = None, group: int = 64) -> formats.KVStore:
    """Encode row by row: the float32 temporaries of a whole batch would not fit."""
    if fmt == formats.DENSE:
        return formats.KVStore(k, v)
    encode = jax.jit(functools.partial(formats.encode, format=fmt, meta_dtype=meta_dtype, group=group))
    parts = [encode(k[i : i + 1], v[i : i + 1]) for i in range(k.shape[0])]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def with_window(store: formats.KVStore, dtype: Any, entries: int = 128) -> formats.KVStore:
    """The store with a full residual window of random entries."""
    batch, kv_heads, _, dim = store.k.shape
    k, v = jax.random.normal(jax.random.key(2), (2, batch, kv_heads, entries, dim), dtype)
    lengths = jnp.full((batch, kv_heads), entries, jnp.int32)
    return dataclasses.replace(store, k_res=k, v_res=v, res_lengths=lengths)


def paged(store: formats.KVStore, page: int) -> tuple[formats.KVStore, Array]:
    """The same cache in shuffled pages, and its table int32 [batch, kv_heads, pages]."""
    batch, kv_heads = store.k.shape[:2]
    pages = store.slots // page
    place = np.random.default_rng(0).permutation(batch * kv_heads * pages).astype(np.int32)
    fields = {}
    for name, (axis, per) in store.slot_fields().items():
        x = getattr(store, name)
        at = x.ndim + axis
        x = jnp.moveaxis(x.reshape(*x.shape[:at], pages, page // per, *x.shape[at + 1 :]), at, 2)
        fields[name] = (
            jnp.zeros((place.size, *x.shape[3:]), x.dtype).at[place].set(x.reshape(-1, *x.shape[3:]))
        )
    return dataclasses.replace(store, **fields), jnp.asarray(place.reshape(batch, kv_heads, pages))


def own(
    name: str, q: Array, store: formats.KVStore, *, share: float = 1.0, implementation: str | None = None,
    mass: str | None = None, chained: bool = False, **more: Any,
) -> Row:  # fmt: skip
    """Measure `decode_attention` reading `share` of the store's bytes."""
    batch = q.shape[0]
    table = more.pop("table", None)
    kv_heads = store.k.shape[1] if table is None else table.shape[1]
    slots = store.slots * (1 if table is None else table.shape[2])
    lengths = more.pop("lengths", None)
    lengths = jnp.full((batch, kv_heads), slots, jnp.int32) if lengths is None else lengths
    static = {n: more.pop(n) for n in ("block_size",) if n in more}

    def call(q, store, lengths, table, more):
        got = decode_attention(
            q, store, lengths=lengths, table=table, scale=q.shape[-1] ** -0.5, return_mass=mass is not None,
            mass_per=mass or "query", implementation=implementation, **more, **static,
        )  # fmt: skip
        return (got.out, got.mass) if mass else got

    args = (q, store, lengths, table, more)
    moved = sum(x.nbytes for x in jax.tree.leaves(store)) * share
    shape = (batch, q.shape[1], kv_heads, slots, q.shape[-1])
    return _row(name, shape, store.k.dtype, implementation or timing.own_name(), call, args, moved, chained)


def _row(name, shape, dtype, implementation, call, args, moved, chained=False) -> Row:
    fn = jax.jit(call)
    kernel = None
    if jax.default_backend() == "gpu":
        us, kernel = device_us(fn, *args)
    else:
        us = timing.measure(fn, *args) * 1e6
    row = timing.row(name, shape, dtype, implementation, us / 1e6, moved=moved)
    row["kernel_us"] = kernel or None
    row["chained_us"] = chained_us(call, *args) if chained else None
    return row


def rows() -> Iterator[Row]:
    """Own rows first, then the peers in JAX, then torch."""
    if jax.default_backend() == "cpu":
        yield from _small()
        return
    for batch, slots in SHAPES:
        q, k, v = operands(batch, slots, HEADS, jnp.bfloat16)
        store = formats.KVStore(k, v)
        yield own("dense", q, store, chained=True)
        yield from _jax_peers(q, k, v)
    for batch, slots in QUANTIZED:
        q, k, v = operands(batch, slots, HEADS, jnp.bfloat16)
        for fmt in formats.FORMATS:
            yield own(f"format {fmt}", q, store_of(k, v, fmt), chained=True)
        for fmt in formats.PACKED_BITS:
            store = store_of(k, v, fmt, group=32)
            yield own(f"format {fmt}, group 32", q, store)
            yield own(f"format {fmt}, group 32, window of 128", q, with_window(store, q.dtype))
    q, k, v = operands(32, 8192, HEADS, jnp.bfloat16)
    for fmt in formats.EIGHT_BIT:
        yield own(f"format {fmt}, bf16 scales", q, store_of(k, v, fmt, jnp.bfloat16))
    for per in ("query", "kv_head"):
        yield own(f"dense, mass per {per}", q, formats.KVStore(k, v), mass=per)
    for batch, slots, page in RAGGED:
        q, k, v = operands(batch, slots, HEADS, jnp.bfloat16)
        store, table = paged(formats.KVStore(k, v), page)
        yield own(f"pages of {page}", q, store, table=table)
    yield from _kept(*operands(8, 32768, HEADS, jnp.bfloat16))
    yield from _blocks(*operands(*LONG, HEADS, jnp.bfloat16))
    yield from _torch_rows()


def _kept(q: Array, k: Array, v: Array) -> Iterator[Row]:
    """A fifth of the pages of every row and head kept."""
    store, table = paged(formats.KVStore(k, v), 64)
    yield own("pages of 64", q, store, table=table)
    lengths = jnp.full(table.shape[:2], k.shape[2] // 5, jnp.int32)
    yield own("pages of 64, 20% kept", q, store, table=table, lengths=lengths, share=0.2)


def _blocks(q: Array, k: Array, v: Array) -> Iterator[Row]:
    """A block table that reads a tenth of the slots."""
    store, rng = formats.KVStore(k, v), np.random.default_rng(0)
    yield own("dense", q, store)
    for size in (64, 128):
        n = k.shape[2] // size
        chosen = [np.sort(rng.permutation(n)[: n // 10]) for _ in range(q.shape[0] * HEADS[1])]
        blocks = jnp.asarray(np.array(chosen, np.int32).reshape(q.shape[0], HEADS[1], -1))
        yield own(f"blocks of {size}, 10% read", q, store, blocks=blocks, block_size=size, share=0.1)


def _jax_peers(q: Array, k: Array, v: Array) -> Iterator[Row]:
    """jax.nn.dot_product_attention on the same data."""
    tokens_first = [jnp.asarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    shape = (q.shape[0], q.shape[1], k.shape[1], k.shape[2], q.shape[3])
    for implementation in ("cudnn", "xla") if jax.default_backend() == "gpu" else ("xla",):
        peer = functools.partial(
            jax.nn.dot_product_attention, scale=q.shape[-1] ** -0.5, implementation=implementation
        )
        name = f"jax.nn {implementation}"
        yield _row("dense", shape, k.dtype, name, peer, tokens_first, 2 * k.nbytes, chained=True)


def _small() -> Iterator[Row]:
    """What a CPU can do: the XLA path in float32 and every format."""
    for batch, slots in ((1, 2048), (4, 1024)):
        q, k, v = operands(batch, slots, (4, 2, 64), jnp.float32)
        for fmt in formats.FORMATS:
            yield own(f"format {fmt}", q, store_of(k, v, fmt))
        yield own("format int4, group 32, window of 128", q, with_window(store_of(k, v, "int4", group=32), q.dtype),
                  mass="kv_head")  # fmt: skip
        yield from _jax_peers(q, k, v)
        store, table = paged(formats.KVStore(k, v), 64)
        yield own("pages of 64", q, store, table=table)


def _torch_rows() -> Iterator[Row]:
    """torch SDPA through cuDNN and flash, timed with events, where torch is installed."""
    torch = timing.torch_with_gpu()
    if torch is None:
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q_heads, kv_heads, dim = HEADS
    for batch, slots in SHAPES:
        make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        q, k, v = make(batch, q_heads, 1, dim), *(make(batch, kv_heads, slots, dim) for _ in range(2))
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            with sdpa_kernel(backend):
                seconds = _torch_seconds(torch, attend)
            shape = (batch, q_heads, kv_heads, slots, dim)
            moved = 2 * k.numel() * k.element_size()
            yield timing.row("dense", shape, "bfloat16", f"torch {name}", seconds, moved=moved)
        del q, k, v, attend


def _torch_seconds(torch: Any, call: Callable[[], Any]) -> float:
    for _ in range(3):
        call()
    spans = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / 1e3)
    return statistics.median(spans)
