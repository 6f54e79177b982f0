"""The attention entry points on a mesh: each device runs the kernel on its own rows and KV heads.

XLA cannot split a Pallas kernel, and splits the plain XLA path of a quantized cache badly. Rows and KV heads are
independent, so where the mesh divides them the call runs inside `jax.shard_map`, and every device reads only
its own slots; of a page pool, its own pages. Without a mesh, or where slots are sharded, the call is left to the compiler.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kvjax.paged_shards import decode_paged, page_axes
from kvjax.sharding import DEFAULT_RULES, Rules
from kvjax.types import Array
from pallas_kernels import decode_attention as decode_op
from pallas_kernels import prefill_attention as prefill_op
from pallas_kernels import select as select_op
from pallas_kernels.formats import KVStore
from pallas_kernels.platform import split_axes


def partition(batch: int, kv_heads: int, rules: Rules = DEFAULT_RULES) -> PartitionSpec | None:
    """Mesh axes of [batch, kv_heads] if they use up every axis that XLA splits here, else None."""
    split = split_axes()
    spec = rules.spec(("batch", "kv_heads"), tuple(split))
    used: list[str] = []
    for size, part in zip((batch, kv_heads), spec):
        names = () if part is None else (part,) if isinstance(part, str) else tuple(part)
        for name in names:
            if size % split[name]:
                return None
            size //= split[name]
        used += names
    return spec if split and set(used) == set(split) else None


def decode_attention(
    q: Array, kv: KVStore, *, lengths: Array, table: Array | None = None, **options: Any
) -> Any:
    """`pallas_kernels.decode_attention.decode_attention`, spread over the ambient mesh where it can be.

    A page pool, shared by all rows and heads, is spread by pages (`kvjax.paged_shards`) where the mesh divides it; tree
    masks, block tables and the mass of several tokens are then left to the compiler.
    """
    asks_mass = options.get("return_mass", False)
    if table is not None:
        axes = page_axes(kv.k.shape[0])
        simple = options.get("mask") is None and options.get("blocks") is None
        if axes is not None and simple and (q.shape[2] == 1 or not asks_mass):
            asked = {"return_lse": options.get("return_lse", False), "return_mass": asks_mass}
            options = {n: x for n, x in options.items() if n not in ("mask", "blocks", "block_size")} | asked
            got = decode_paged(q, kv, lengths=lengths, table=table, axes=axes, **options)
            return got if any(asked.values()) else got.out
    spec = None if table is not None else partition(*lengths.shape)
    if spec is None:
        return decode_op.decode_attention(q, kv, lengths=lengths, table=table, **options)
    rows = PartitionSpec(spec[0])
    by_row = ("q_positions", "mask")
    arrays = {n: x for n, x in options.items() if isinstance(x, jax.Array)}
    static = {n: x for n, x in options.items() if n not in arrays}
    asks = static.get("return_lse", False) or static.get("return_mass", False)

    def local(q, kv, lengths, arrays):
        result = decode_op.decode_attention(q, kv, lengths=lengths, **arrays, **static)
        return tuple(x for x in result if x is not None) if asks else (result,)

    specs = {n: rows if n in by_row else spec for n in arrays}
    count = 1 + bool(static.get("return_lse")) + bool(static.get("return_mass"))
    mapped = jax.shard_map(
        local, in_specs=(spec, spec, spec, specs), out_specs=(spec,) * count, check_vma=False
    )
    out = mapped(q, kv, lengths, arrays)
    if not asks:
        return out[0]
    lse = out[1] if static.get("return_lse") else None
    return decode_op.DecodeOut(out[0], lse, out[-1] if static.get("return_mass") else None)


def fuses(
    q: Array,
    kv: KVStore,
    *,
    lengths: Array,
    table: Array | None,
    blocks: Array,
    block_size: int,
    **options: Any,
) -> bool:
    """True when a kernel of this platform reads such a block table itself; else chosen blocks are gathered first."""
    if options.get("implementation") == "xla" or (
        table is not None and partition(*lengths.shape) is not None
    ):
        return False
    return decode_op.reads_blocks(q, kv, lengths=lengths, table=table, blocks=blocks, block_size=block_size)


def select_top(scores: Array, counts: Array, *, width: int, implementation: str | None = None) -> Array:
    """`pallas_kernels.select.select_top`, spread over the ambient mesh where it can be; XLA's where slots are sharded."""
    spec = partition(*counts.shape)
    if spec is None:
        return select_op.select_top(scores, counts, width=width, implementation=implementation)
    local = functools.partial(select_op.select_top, width=width, implementation=implementation)
    return jax.shard_map(local, in_specs=(spec, spec), out_specs=spec, check_vma=False)(scores, counts)


def prefill_attention(
    q: Array, k: Array, v: Array, *, q_positions: Array, k_positions: Array, **options: Any
) -> Any:
    """`pallas_kernels.prefill_attention.prefill_attention`, spread over the ambient mesh where it can be."""
    spec = partition(k.shape[0], k.shape[1])
    if spec is None:
        return prefill_op.prefill_attention(
            q, k, v, q_positions=q_positions, k_positions=k_positions, **options
        )
    rows = PartitionSpec(spec[0])
    arrays = {n: x for n, x in options.items() if isinstance(x, jax.Array)}  # segments
    specs = {n: rows for n in arrays}
    static = {n: x for n, x in options.items() if n not in arrays and n != "blocks"}
    blocks = options.get("blocks")
    if blocks is not None:  # rows and query heads of the table, where it has them
        split = (axis if size > 1 else None for axis, size in zip((*spec, None, None), blocks.indices.shape))
        arrays["blocks"], specs["blocks"] = blocks, PartitionSpec(*split)

    def local(q, k, v, q_positions, k_positions, arrays):
        return prefill_op.prefill_attention(
            q, k, v, q_positions=q_positions, k_positions=k_positions, **arrays, **static
        )

    keys = rows if k_positions.ndim == 2 else spec
    outs = (spec, spec) if static.get("return_lse") else spec
    mapped = jax.shard_map(
        local, in_specs=(spec, spec, spec, rows, keys, specs), out_specs=outs, check_vma=False
    )
    return mapped(q, k, v, q_positions, k_positions, arrays)
