"""Decode attention over a page pool that is spread over a mesh: every device reads the pages that it holds.

Heads of a Ragged cache own different numbers of pages, as the data decides, so no static cut of the pool by heads is
balanced. The pool is cut by pages instead. Each device attends, for all rows and heads, to the pages in its part of the pool,
through a page table of its own, and partial results merge by their log-sum-exp across devices. Queries, tables, lengths and
outputs are small beside the pages, and they are all that travels. A device walks the tables of all rows and heads; entries
that lie elsewhere are behind the local lengths and are not fetched.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kvjax.sharding import DEFAULT_RULES, Rules
from kvjax.types import Array
from pallas_kernels import decode_attention as decode_op
from pallas_kernels.formats import KVStore
from pallas_kernels.merge_partials import merge_partials
from pallas_kernels.platform import split_axes


def page_axes(pages: int, rules: Rules = DEFAULT_RULES) -> tuple[str, ...] | None:
    """Mesh axes that a pool of `pages` is spread over; None where they are not all that XLA splits here, or do not divide it."""
    split = split_axes()
    (part,) = rules.spec(("pages",), tuple(split))
    names = () if part is None else (part,) if isinstance(part, str) else tuple(part)
    ways = math.prod(split[name] for name in names)
    return names if names and set(names) == set(split) and pages % ways == 0 else None


def local_table(table: Array, first: Array, count: int, lengths: Array, page: int):
    """What of a page table lies in pages first .. first + count - 1.

    Args:
      table: int32 [batch, kv_heads, pages], -1 where no page is assigned.
      first: int32 scalar.
      count: pages of the part.
      lengths: int32 [batch, kv_heads], slots in use.
      page: slots a page.

    Returns: order int32 [batch, kv_heads, n], the table's entries of this part first, in their order, n = min(pages, count);
      the local table, likewise, counted from `first`; and the local lengths int32 [batch, kv_heads]. Only the last page of a
      head is partly filled, and it stays the last.
    """
    used = jnp.clip(lengths[..., None] - page * jnp.arange(table.shape[2], dtype=jnp.int32), 0, page)
    here = (table >= first) & (table < first + count) & (used > 0)
    order = jnp.argsort(~here, axis=-1, stable=True)[..., : min(table.shape[2], count)].astype(jnp.int32)
    mine = jnp.take_along_axis(here, order, axis=-1)
    local = jnp.where(mine, jnp.take_along_axis(table, order, axis=-1) - first, 0)
    return order, local, jnp.sum(jnp.where(here, used, 0), axis=-1, dtype=jnp.int32)


def by_page(x: Array, order: Array, page: int) -> Array:
    """x [batch, kv_heads, slots] with its pages in `order`: [batch, kv_heads, n * page]."""
    pages = x.reshape(*order.shape[:2], -1, page)
    return jnp.take_along_axis(pages, order[..., None], axis=2).reshape(*order.shape[:2], -1)


def decode_paged(
    q: Array,
    kv: KVStore,
    *,
    lengths: Array,
    table: Array,
    axes: tuple[str, ...],
    return_lse: bool,
    return_mass: bool,
    mass_per: str = "query",
    positions: Array | None = None,
    q_positions: Array | None = None,
    **options: Any,
) -> decode_op.DecodeOut:
    """`pallas_kernels.decode_attention.decode_attention` with a pool spread over the mesh axes `axes`.

    One query token if `return_mass`; no tree mask, no block table. Arguments as there; `out` is float32 if `return_lse`.
    The residual window is a part of its own, left to the compiler's partitioning.
    """
    page, batch, kv_heads = kv.slots, *lengths.shape
    slots = page * table.shape[2]
    if (
        positions is None and q_positions is not None
    ):  # the n-th stored token has position n, wherever it is read
        n = slots + kv.residual
        stored = jnp.arange(n, dtype=jnp.int32) - jnp.where(
            jnp.arange(n) < slots, 0, slots - lengths[..., None]
        )
        positions = jnp.broadcast_to(stored, (batch, kv_heads, n))
    pool = dataclasses.replace(kv, k_res=None, v_res=None, res_lengths=None)
    seen = {} if q_positions is None else {"q_positions": q_positions}
    known = {} if positions is None else {"positions": positions[..., :slots]}

    def local(q, pool, lengths, table, seen, known):
        count = pool.k.shape[0]
        first = jax.lax.axis_index(axes).astype(jnp.int32) * count
        order, mine, here = local_table(table, first, count, lengths, page)
        known = {n: by_page(x, order, page) for n, x in known.items()}
        part = decode_op.decode_attention(
            q, pool, lengths=here, table=mine, return_lse=True, return_mass=return_mass, **seen, **known, **options
        )  # fmt: skip
        top = jax.lax.pmax(part.lse, axes)
        weight = jnp.exp(part.lse - jnp.where(top == -jnp.inf, 0.0, top))
        total = jax.lax.psum(weight, axes)
        out = jax.lax.psum(weight[..., None] * part.out, axes) / jnp.where(total > 0, total, 1.0)[..., None]
        lse = jnp.where(total > 0, jnp.log(total) + top, -jnp.inf)
        if not return_mass:
            return out, lse
        share = part.mass * (weight / jnp.where(total > 0, total, 1.0))
        return out, lse, jax.lax.psum(_to_slots(share, order, table.shape[2], page), axes)

    whole = PartitionSpec()
    mapped = jax.shard_map(
        local,
        in_specs=(whole, PartitionSpec(axes), whole, whole, whole, whole),
        out_specs=(whole,) * (2 + return_mass),
        check_vma=False,
    )
    out, lse, *mass = mapped(q, pool, lengths, table, seen, known)
    if kv.residual:
        late = decode_op.decode_attention(
            q, KVStore(kv.k_res, kv.v_res), lengths=kv.res_lengths, return_lse=True, return_mass=return_mass,
            **seen, **({} if positions is None else {"positions": positions[..., slots:]}),
            **{**options, "implementation": "xla"},
        )  # fmt: skip
        before = lse
        out, lse = merge_partials([out, late.out], [before, late.lse])
        if return_mass:
            parts = zip((mass[0], late.mass), (before, late.lse))
            mass = [jnp.concatenate([m * _share(one, lse) for m, one in parts], axis=-1)]
    if return_mass and mass_per == "kv_head":
        mass = [mass[0].reshape(batch, kv_heads, -1, mass[0].shape[-1]).sum(2)]
    return decode_op.DecodeOut(
        out if return_lse else out.astype(q.dtype), lse if return_lse else None, mass[0] if mass else None
    )


def _share(part: Array, total: Array) -> Array:
    """Of one token's probability, what lies in a part, by their log-sum-exp [batch, q_heads, 1]."""
    return jnp.exp(part - jnp.where(total == -jnp.inf, 0.0, total))


def _to_slots(mass: Array, order: Array, pages: int, page: int) -> Array:
    """Columns of the local table [batch, q_heads, n * page] -> columns by slot [batch, q_heads, pages * page]."""
    batch, kv_heads, n = order.shape
    local = mass.reshape(batch, kv_heads, -1, n, page)
    place = jax.vmap(jax.vmap(lambda m, at: jnp.zeros((m.shape[0], pages, page), m.dtype).at[:, at].set(m)))
    return place(local, order).reshape(batch, mass.shape[1], pages * page)
