"""Every TPU kernel as a function and abstract arguments, for compilation without the hardware."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.cache_write.tpu import append_tpu
from pallas_kernels.decode_attention.tpu import decode_attention_tpu
from pallas_kernels.observe.tpu import column_mass_tpu
from pallas_kernels.prefill_attention.block_table import BlockTable
from pallas_kernels.prefill_attention.tpu import prefill_attention_tpu

Shape = jax.ShapeDtypeStruct

PAGE = 128


class Sizes(NamedTuple):
    """One problem size for all kernels."""

    batch: int = 8
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    context: int = 8192  # slots of a decode cache
    prompt: int = 8192  # tokens of a prefill


class Case(NamedTuple):
    """A kernel call: `jax.jit(fn, donate_argnums=donate).lower(*args)`."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()


def cases(sizes: Sizes = Sizes()) -> Iterator[Case]:
    """All kernels: decode in every format and layout, prefill, column mass, append."""
    yield from _decode(sizes)
    yield from _prefill(sizes)
    yield from _cache_write(sizes)


def abstract_store(fmt: str, lead: tuple[int, ...], slots: int, head_dim: int) -> formats.KVStore:
    """A `KVStore` of ShapeDtypeStructs."""
    x = Shape((*lead, slots, head_dim), jnp.bfloat16)
    # bfloat16 scales are read as they are; float16 ones are first copied by XLA, for no TPU loads float16.
    meta = jnp.bfloat16 if fmt in formats.PACKED_BITS else None
    return jax.eval_shape(lambda k, v: formats.encode(k, v, fmt, meta_dtype=meta), x, x)


def decode_call(q, store, lengths, table=None, blocks=None, positions=None, q_positions=None, **static):
    """`decode_attention_tpu` with the options that a case leaves alone filled in."""
    options = dict(
        mask=None, scale=q.shape[-1] ** -0.5, window=None, softcap=None, block_size=None, return_mass=False
    )
    options.update(static)
    return decode_attention_tpu(
        q, store, lengths=lengths, table=table, blocks=blocks, positions=positions, q_positions=q_positions,
        **options,
    )  # fmt: skip


def _decode(s: Sizes) -> Iterator[Case]:
    heads = (s.batch, s.kv_heads)
    q = Shape((s.batch, s.q_heads, 1, s.head_dim), jnp.bfloat16)
    lengths = Shape(heads, jnp.int32)
    pages = s.context // PAGE
    table = Shape((*heads, pages), jnp.int32)
    for fmt in formats.FORMATS:
        dense = abstract_store(fmt, heads, s.context, s.head_dim)
        pool = abstract_store(fmt, (s.batch * s.kv_heads * pages,), PAGE, s.head_dim)
        yield Case(f"decode_{fmt}", decode_call, (q, dense, lengths))
        yield Case(f"decode_{fmt}_paged", decode_call, (q, pool, lengths, table))
    dense = abstract_store("dense", heads, s.context, s.head_dim)
    blocks = Shape((*heads, max(1, pages // 10)), jnp.int32)
    chosen = functools.partial(decode_call, block_size=PAGE, return_mass=True)
    yield Case("decode_dense_blocks", chosen, (q, dense, lengths, None, blocks))
    q4 = Shape((s.batch, s.q_heads, 4, s.head_dim), jnp.bfloat16)
    windowed = functools.partial(decode_call, window=s.context // 2, softcap=30.0)
    positions = Shape((*heads, s.context), jnp.int32)
    args = (q4, dense, lengths, None, None, positions, Shape((s.batch, 4), jnp.int32))
    yield Case("decode_dense_4_tokens_positions", windowed, args)


def _prefill(s: Sizes) -> Iterator[Case]:
    q = Shape((1, s.q_heads, s.prompt, s.head_dim), jnp.bfloat16)
    k = Shape((1, s.kv_heads, s.prompt, s.head_dim), jnp.bfloat16)
    positions = Shape((1, s.prompt), jnp.int32)
    lse = Shape(q.shape[:3], jnp.float32)
    scale = s.head_dim**-0.5

    def aligned(q, k, v, pos, blocks=None):
        return prefill_attention_tpu(
            q, k, v, q_positions=pos, k_positions=pos, scale=scale, causal_aligned=True, blocks=blocks
        )

    def general(q, k, v, pos, segments):
        return prefill_attention_tpu(
            q, k, v, q_positions=pos, k_positions=pos, scale=scale, window=s.prompt // 2, softcap=30.0,
            q_segments=segments, k_segments=segments,
        )  # fmt: skip

    def column(q, k, pos, lse):
        return column_mass_tpu(
            q, k, q_positions=pos, k_positions=pos, lse=lse, scale=scale, causal_aligned=True
        )

    tiles = s.prompt // 128
    indices: Any = Shape((1, s.q_heads, tiles, max(1, tiles // 10)), jnp.int32)
    table = BlockTable(indices, 128, 128)
    yield Case("prefill_causal", aligned, (q, k, k, positions))
    yield Case("prefill_block_sparse", aligned, (q, k, k, positions, table))
    yield Case("prefill_positions_segments", general, (q, k, k, positions, positions))
    yield Case("column_mass", column, (q, k, positions, lse))


def _cache_write(s: Sizes) -> Iterator[Case]:
    heads = (s.batch, s.kv_heads)
    for dtype in (jnp.bfloat16, jnp.int8):
        cache = Shape((*heads, s.context, s.head_dim), dtype)
        new = Shape((*heads, 1, s.head_dim), dtype)
        slots = Shape((*heads, 1), jnp.int32)
        yield Case(f"append_{jnp.dtype(dtype).name}", append_tpu, (cache, new, slots), donate=(0,))
