"""The full-precision residual window in the Hopper decode kernel, and the mass of slots from what the kernel writes.

The window is one more part of every row, attended by a CTA of its own in the same grid with the steps of dense
storage, and joins the same merge. It is read with plain loads, so that its size and alignment are free.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import ptx
from pallas_kernels.decode_attention.gpu_plan import Plan, Thread, tile_offset
from pallas_kernels.formats import KVStore

Array = jax.Array


def window_plan(plan: Plan, q: Array, store: KVStore) -> Plan | None:
    """The plan of the window's CTAs; None if the store has none or in another dtype than the queries."""
    if not store.residual or store.k_res.dtype != q.dtype or store.v_res.dtype != q.dtype:
        return None
    # K and V of a step lie where the stages of the stored K and V do. Of 32 entries, the product with K reads on over
    # whatever follows in shared memory; those rows are masked.
    room = plan.stages * plan.k_rows * plan.k_row
    used = 64 if room >= 64 * plan.dim * 2 else 32
    return dataclasses.replace(plan, fmt="half", block=64, used=used)


def load_window(plan: Plan):
    """Inline function (k, v, k tile, v tile, start, valid, positions?, position tile?): `used` entries from `start` on.

    k, v: [residual, head_dim] of one row and KV head. Entries from `valid` on become 0, their positions -1.
    """

    def body(ctx, k, v, k_tile, v_tile, start, valid, positions=None, position_tile=None):
        t = Thread(plan)
        start, valid = ptx.scalar(start), ptx.scalar(valid)
        chunks = plan.k_row // 16
        found = []
        for source, target in ((k, k_tile), (v, v_tile)):
            base, to = ptx.global_address(source), ptx.smem_address(target)
            for first in range(0, plan.used * chunks, 128):
                index = t.index + first
                row, chunk = index // chunks, index % chunks
                live = start + row < valid
                entry = ptx.select(live, start + row, start)
                words = ptx.load(base + ptx.wide(entry * plan.k_row + chunk * 16), words=4)
                found.append((to + tile_offset(row, chunk, plan.k_row), live, words))
        for to, live, words in found:
            for i, word in enumerate(words):
                ptx.store(to + 4 * i, ptx.select(live, word, 0))
        if positions is not None:
            entry = start + (t.index & 63)
            live = entry < valid
            at = ptx.global_address(positions) + ptx.wide(ptx.select(live, entry, start) * 4)
            position = ptx.select(live, ptx.load(at)[0], -1)
            ptx.store(ptx.smem_address(position_tile) + (t.index & 63) * 4, position)
        ptx.fence_async()
        ptx.barrier()

    return body


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Where a row's weights lie in what the kernel writes out: blocks of slots, then blocks of the window."""

    slots: int
    block: int
    residual: int
    window: int  # entries a step
    columns: int  # those of a KV head
    stored_columns: int
    reference_columns: int
    bulk: bool  # slots of a block are minor, in the order of the swizzled tile; see `Plan.bulk`

    @property
    def blocks(self) -> int:
        """Blocks of slots."""
        return -(-self.slots // self.block)

    @property
    def windows(self) -> int:
        """Blocks of the window."""
        return -(-self.residual // self.window)

    def shapes(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        """Weights bf16 [rows, slots and entries in whole blocks, columns], references f32 [rows, blocks, ..]."""
        # Whole steps of 64 are written, also where the window's are shorter.
        n = self.blocks * self.block + self.windows * self.window + 64
        return [
            jax.ShapeDtypeStruct((rows, n, self.stored_columns), jnp.bfloat16),
            jax.ShapeDtypeStruct((rows, self.blocks + self.windows, self.reference_columns), jnp.float32),
        ]


def mass_of_slots(
    layout: WeightLayout, weights: Array, references: Array, lse: Array, written: Array, tokens: int,
    per_kv_head: bool,
) -> Array:  # fmt: skip
    """Probability of every slot and window entry from p = 2 ** (logit - reference).

    Args:
      weights, references: as `WeightLayout.shapes`; whatever is not `written` may hold anything.
      lse: f32 [batch, kv_heads, columns], natural logarithm.
      written: bool [batch, kv_heads, slots + residual].
      tokens: query tokens, the minor part of the columns.
      per_kv_head: sum over the query heads too.

    Returns: f32 [batch, kv_heads, slots + residual], or [batch, q_heads, slots + residual].
    """
    batch, kv_heads, columns = lse.shape
    group = columns // tokens
    log2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * math.log2(math.e)).reshape(-1, 1, columns)
    factors = jnp.exp2(references[..., :columns] - log2)  # [rows, blocks, columns]
    sizes = [(0, layout.blocks, layout.block, layout.slots, layout.bulk)]
    if layout.windows:
        sizes.append((layout.blocks, layout.windows, layout.window, layout.residual, False))
    heads = (
        [[*range(columns)]] if per_kv_head else [[*range(h * tokens, (h + 1) * tokens)] for h in range(group)]
    )
    parts, at = [], 0
    for first, count, block, entries, bulk in sizes:
        p = weights[:, at : at + count * block]
        column = _swizzled_column if bulk else _column
        p = p.reshape(p.shape[0], count, block * p.shape[2])
        by = factors[:, first : first + count, None]
        sums = [
            sum(column(p, block, c).astype(jnp.float32) * by[..., c] for c in of_head) for of_head in heads
        ]
        parts.append(jnp.stack(sums, 1).reshape(batch, kv_heads, len(heads), -1)[..., :entries])
        at += count * block
    mass = jnp.where(written[:, :, None], jnp.concatenate(parts, -1), 0.0)
    return mass.reshape(batch, kv_heads * len(heads), -1)


def _column(p: Array, block: int, c: int) -> Array:
    """Column c of blocks [rows, blocks, slots x columns] -> [rows, blocks, slots]."""
    return p.reshape(*p.shape[:2], block, -1)[..., c]


def _swizzled_column(p: Array, block: int, c: int) -> Array:
    """The same of blocks [rows, blocks, columns x 64] whose 16-byte chunks j lie at j ^ (c mod 8)."""
    chunks = p.reshape(*p.shape[:2], -1, 2, 2, 2, 8)[:, :, c]
    turned = [axis for axis, bit in ((2, 4), (3, 2), (4, 1)) if c & bit]
    return (
        jnp.flip(chunks, turned).reshape(*p.shape[:2], block)
        if turned
        else chunks.reshape(*p.shape[:2], block)
    )
