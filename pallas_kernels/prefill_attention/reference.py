"""Prefill attention in XLA: the oracle of the kernels, and the path for CPUs and uncommon shapes.

Blocked over queries, so no [tokens, slots] array of the whole prompt exists. The query heads of a KV head are
folded into the rows of one product, so K and V are never repeated. Differentiable (the loops are `lax.map`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.platform import dot_precision, target_platform
from pallas_kernels.prefill_attention.block_table import BlockTable, to_mask

Array = jax.Array

_SEGMENTS = 4  # parts of a causal prompt with their own key range; 4 cut the work by 3/8 for 4 compiled loops
_CPU_SCORES = 1 << 20  # float32 scores alive at once; measured best on CPU at [1, 6, 32, 4096] (4 MiB, L3)
_ACCELERATOR_SCORES = 1 << 28


def visible(
    q_positions: Array,
    k_positions: Array,
    window: int | None = None,
    q_segments: Array | None = None,
    k_segments: Array | None = None,
) -> Array:
    """Which slots each query may see: bool [batch, 1 or kv_heads, 1, tokens, slots].

    A slot is seen iff it is filled (position >= 0), not after the query, less than `window` before it, and of
    the same segment. Padded queries (position -1) see nothing.

    Args:
      q_positions: int32 [batch, tokens].
      k_positions: int32 [batch, slots] or [batch, kv_heads, slots].
      window: sliding window in tokens, or None.
      q_segments: int32 [batch, tokens], or None.
      k_segments: int32 [batch, slots], or None.
    """
    keys = k_positions[:, None] if k_positions.ndim == 2 else k_positions
    keys = keys[:, :, None, None, :]
    queries = q_positions[:, None, None, :, None]
    seen = (keys >= 0) & (keys <= queries)
    if window is not None:
        seen &= keys > queries - window
    if q_segments is not None and k_segments is not None:
        seen &= q_segments[:, None, None, :, None] == k_segments[:, None, None, None, :]
    return seen


def block_scores(q: Array, k: Array, seen: Array, *, scale: float, softcap: float | None) -> Array:
    """Masked logits of one query block, f32 [batch, kv_heads, group, tokens, slots]; -inf where not seen.

    Args:
      q: [batch, q_heads, tokens, head_dim].
      k: [batch, kv_heads, slots, head_dim].
      seen: bool, broadcastable to the result.
    """
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    rows = q.reshape(batch, kv_heads, q_heads // kv_heads * tokens, head_dim)
    logits = jnp.einsum(
        "bhqd,bhsd->bhqs", rows, k, precision=dot_precision(k.dtype), preferred_element_type=jnp.float32
    )
    logits = logits.reshape(batch, kv_heads, q_heads // kv_heads, tokens, slots) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.where(seen, logits, -jnp.inf)


def _attend_block(q: Array, k: Array, v_ones: Array, seen: Array, *, scale: float, softcap: float | None):
    """Softmax attention of one query block; `v_ones` is V with a column of ones, which sums the weights.

    Returns (out f32 [batch, q_heads, tokens, head_dim], lse f32 [batch, q_heads, tokens]).
    """
    batch, q_heads, tokens = q.shape[:3]
    logits = block_scores(q, k, seen, scale=scale, softcap=softcap)
    top = logits.max(-1, keepdims=True)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    weights = jnp.exp(logits - top)
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1]).astype(v_ones.dtype)
    sums = jnp.einsum(
        "bhqs,bhsd->bhqd",
        rows,
        v_ones,
        precision=dot_precision(rows.dtype),
        preferred_element_type=jnp.float32,
    ).reshape(batch, q_heads, tokens, -1)
    # A 16-bit weight is summed after rounding in `sums`, so numerator and denominator round alike.
    total = sums[..., -1]
    out = sums[..., :-1] / jnp.where(total > 0, total, 1.0)[..., None]
    lse = top.reshape(batch, q_heads, tokens) + jnp.log(total)
    return out, lse


def query_block_size(batch: int, q_heads: int, tokens: int, slots: int) -> int:
    """Queries handled at once by the XLA path: a power of two that bounds the scores alive."""
    cpu = target_platform() == "cpu"
    budget, low, high = (_CPU_SCORES, 16, 256) if cpu else (_ACCELERATOR_SCORES, 64, 1024)
    block = low
    while block < high and block * 2 * batch * q_heads * slots <= budget:
        block *= 2
    return min(block, tokens)


def pad_axis(x: Array, axis: int, size: int, value: int | float = 0) -> Array:
    """Pad `axis` of x at its end to `size` with `value`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return x if widths[axis][1] == 0 else jnp.pad(x, widths, constant_values=value)


def map_query_blocks(
    fn, arrays: tuple[Array | None, ...], axes: tuple[int, ...], fill: tuple[int, ...], block: int
):
    """Call `fn(index, *blocks)` for every `block` queries of `arrays` along `axes` and stack the results.

    The last block is padded with `fill`. Returns fn's outputs with a leading axis of blocks.
    """
    tokens = next(a.shape[ax] for a, ax in zip(arrays, axes) if a is not None)
    count = -(-tokens // block)
    split = []
    for array, axis, value in zip(arrays, axes, fill):
        if array is None:
            split.append(None)
            continue
        array = pad_axis(array, axis, count * block, value)
        shape = (*array.shape[:axis], count, block, *array.shape[axis + 1 :])
        split.append(jnp.moveaxis(array.reshape(shape), axis, 0))
    if count == 1:
        single = fn(jnp.int32(0), *(None if s is None else s[0] for s in split))
        return jax.tree.map(lambda x: x[None], single)
    return lax.map(lambda args: fn(*args), (jnp.arange(count, dtype=jnp.int32), *split))


def join_blocks(stacked: Array, tokens: int) -> Array:
    """[blocks, batch, heads, block, ...] -> [batch, heads, tokens, ...]."""
    moved = jnp.moveaxis(stacked, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])[:, :, :tokens]


def causal_segments(tokens: int, block: int) -> list[tuple[int, int]]:
    """Query ranges [start, stop) of an aligned causal prompt; a range needs no key at or after its stop."""
    step = -(-tokens // _SEGMENTS)
    step = max(-(-step // block) * block, min(tokens, 4 * block))
    return [(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def prefill_attention_xla(
    q: Array,
    k: Array,
    v: Array,
    *,
    q_positions: Array,
    k_positions: Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    q_segments: Array | None = None,
    k_segments: Array | None = None,
    causal_aligned: bool = False,
    blocks: BlockTable | None = None,
    block_q: int | None = None,
    partial: bool = False,
) -> tuple[Array, Array]:
    """See `ops.prefill_attention`. Returns (out in q.dtype, lse f32 [batch, q_heads, tokens])."""
    batch, q_heads, tokens, _ = q.shape
    slots = k.shape[2]
    dtype = jnp.float32 if partial else q.dtype
    with jax.named_scope("prefill_attention_xla"):
        # Empty slots may hold anything, NaN included: 0 * NaN must not reach the output.
        filled = k_positions >= 0 if k_positions.ndim == 3 else (k_positions >= 0)[:, None]
        v_ones = jnp.concatenate([jnp.where(filled[..., None], v, 0), jnp.ones_like(v[..., :1])], axis=-1)
        k_blocks = 0 if blocks is None else -(-slots // blocks.block_k)
        if blocks is not None and blocks.indices.shape[-1] * 2 < k_blocks:
            return _block_sparse(
                q, k, v_ones, blocks, q_positions, k_positions, q_segments, k_segments,
                scale=scale, window=window, softcap=softcap, dtype=dtype,
            )  # fmt: skip
        block = block_q or query_block_size(batch, q_heads, tokens, slots)
        keep = None
        if blocks is not None:  # rows as wide as this gain nothing from gathering: the table is a mask
            keep, block = to_mask(blocks, k_blocks), blocks.block_q
        attend = functools.partial(_attend_block, scale=scale, softcap=softcap)

        if keep is None and causal_aligned and window is not None and slots > 2 * (window + block):
            # A band: every query block reads the same number of slots, at an offset that moves with it.
            width = min(slots, window - 1 + block)

            def banded(index, q_b, pos_b, seg_b):
                start = jnp.clip(index * block - (window - 1), 0, slots - width)
                cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=width)
                k_seg = None if k_segments is None else cut(k_segments, axis=1)
                seen = visible(pos_b, cut(k_positions, axis=-1), window, seg_b, k_seg)
                return attend(q_b, cut(k, axis=2), cut(v_ones, axis=2), seen)

            out, lse = map_query_blocks(banded, (q, q_positions, q_segments), (2, 1, 1), (0, -1, -1), block)
            return join_blocks(out, tokens).astype(dtype), join_blocks(lse, tokens)

        outs, lses = [], []
        for start, stop in causal_segments(tokens, block) if causal_aligned else [(0, tokens)]:
            end = stop if causal_aligned else slots
            k_seg = None if k_segments is None else k_segments[:, :end]

            def dense(index, q_b, pos_b, seg_b, start=start, end=end, k_seg=k_seg):
                seen = visible(pos_b, k_positions[..., :end], window, seg_b, k_seg)
                if keep is not None:
                    row = lax.dynamic_index_in_dim(keep, start // block + index, axis=2, keepdims=False)
                    row = jnp.repeat(row, blocks.block_k, axis=2)[..., :end]
                    heads = (1, 1) if row.shape[1] == 1 else (k.shape[1], -1)
                    seen = seen & row.reshape(row.shape[0], *heads, 1, end)
                return attend(q_b, k[:, :, :end], v_ones[:, :, :end], seen)

            q_seg = None if q_segments is None else q_segments[:, start:stop]
            out, lse = map_query_blocks(
                dense, (q[:, :, start:stop], q_positions[:, start:stop], q_seg), (2, 1, 1), (0, -1, -1), block
            )
            outs.append(join_blocks(out, stop - start).astype(dtype))
            lses.append(join_blocks(lse, stop - start))
        return (outs[0], lses[0]) if len(outs) == 1 else (jnp.concatenate(outs, 2), jnp.concatenate(lses, 2))


def _block_sparse(
    q, k, v_ones, table, q_positions, k_positions, q_segments, k_segments, *, scale, window, softcap, dtype
):
    """Attention over the key blocks of `table`, gathered per query block: the work follows the table."""
    batch, q_heads, tokens, _ = q.shape
    kv_heads, slots = k.shape[1:3]
    group = q_heads // kv_heads
    k_blocks = -(-slots // table.block_k)

    def split(x, fill):  # [batch, heads, slots, ...] -> [batch, heads, k_blocks, block_k, ...]
        x = pad_axis(x, 2, k_blocks * table.block_k, fill)
        return x.reshape(*x.shape[:2], k_blocks, table.block_k, *x.shape[3:])

    k_pos = k_positions if k_positions.ndim == 3 else k_positions[:, None]
    k_parts, v_parts = split(k, 0), split(v_ones, 0)
    pos_parts = split(jnp.broadcast_to(k_pos, (batch, kv_heads, slots)), -1)
    seg_parts = None
    if k_segments is not None:
        seg_parts = split(jnp.broadcast_to(k_segments[:, None], (batch, kv_heads, slots)), -1)
    width = table.indices.shape[-1]
    indices = jnp.broadcast_to(table.indices, (batch, q_heads, *table.indices.shape[2:]))

    def one(index, q_b, pos_b, seg_b):
        chosen = lax.dynamic_index_in_dim(indices, index, axis=2, keepdims=False)
        chosen = chosen.reshape(batch, kv_heads, group * width)

        def gather(parts):  # -> [batch, q_heads, width * block_k, ...]
            at = jnp.maximum(chosen, 0).reshape(*chosen.shape, *([1] * (parts.ndim - 3)))
            taken = jnp.take_along_axis(parts, at, axis=2)
            return taken.reshape(batch, q_heads, width * table.block_k, *parts.shape[4:])

        used = jnp.repeat(chosen.reshape(batch, q_heads, width) >= 0, table.block_k, axis=-1)
        positions = jnp.where(used, gather(pos_parts), -1)
        seen = visible(pos_b, positions, window)
        if seg_parts is not None:
            seen &= seg_b[:, None, None, :, None] == gather(seg_parts)[:, :, None, None, :]
        return _attend_block(q_b, gather(k_parts), gather(v_parts), seen, scale=scale, softcap=softcap)

    out, lse = map_query_blocks(one, (q, q_positions, q_segments), (2, 1, 1), (0, -1, -1), table.block_q)
    return join_blocks(out, tokens).astype(dtype), join_blocks(lse, tokens)
