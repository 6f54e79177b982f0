"""Decode attention over any codec: decode a tile of slots, attend, forget it.

The whole cache is never dequantized at once: `lax.scan` walks over tiles of about `TILE` slots with an online
softmax, whatever the codec stores and in either layout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.codecs.base import Codec, Context, Field

Array = jax.Array
TILE = 1024


def blocked_attention(
    q: Array,  # [batch, q_heads, tokens, head_dim], after RoPE
    codec: Codec,
    store: dict[str, Array],  # codec fields, [batch, kv_heads, ...] or [pages, ...]
    *,
    lengths: Array,  # int32 [batch, kv_heads] encoded slots; every query sees all of them
    pos: Array
    | None,  # int32 [batch, kv_heads, slots] or [pages, page]; None: slot n holds position sink + n
    table: Array | None,  # int32 [batch, kv_heads, pages per head], Ragged only
    slots: int,  # slots per head (Dense) or per page (Ragged)
    ctx: Context,  # inv_freq and calibration
    dtype: str,
    scale: float,
    softcap: float | None = None,
    return_mass: bool = False,
    tile: int = TILE,
    before: tuple[Codec, dict[str, Array], Context] | None = None,
) -> tuple[Array, Array, Array | None]:
    """(out f32 [batch, q_heads, tokens, head_dim], lse f32 [batch, q_heads, tokens], mass f32 or None).

    mass [batch, q_heads, slots of a head]: probability of each slot, summed over the tokens, normalised by the
    slots seen here. Tokens that see nothing give output 0 and lse -inf. before: codec, fields and context of the
    layer before, for codecs that predict from it (Dense).
    """
    batch, q_heads, tokens, dim = q.shape
    kv_heads = lengths.shape[1]
    fields = dict(codec.fields(dim, dtype))
    if pos is not None:
        store, fields = {**store, "pos": pos}, {**fields, "pos": Field((), "int32")}
    total = slots if table is None else slots * table.shape[2]
    unit = codec.block if table is None else slots
    tile = min(max(tile // unit, 1) * unit, total)
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads * tokens, dim)

    def fetch(x: Array, field: Field, start: Array) -> Array:
        axis = 2 + len(field.before)
        if table is None:
            return jax.lax.dynamic_slice_in_dim(x, start // field.per, tile // field.per, axis=axis)
        pages = jax.lax.dynamic_slice_in_dim(table, start // slots, tile // slots, axis=2)
        got = jnp.moveaxis(jnp.take(x, jnp.maximum(pages, 0), axis=0), 2, axis)
        return got.reshape(*got.shape[:axis], tile // field.per, *got.shape[axis + 2 :])

    def step(carry: tuple[Array, Array, Array], i: Array):
        peak, mass, acc = carry
        # The last tile may overlap the one before; its first slots are then masked.
        start = jnp.minimum(i * tile, total - tile)
        ids = start + jnp.arange(tile, dtype=jnp.int32)
        seen = (ids < lengths[..., None]) & (ids >= i * tile)
        part = {name: fetch(x, fields[name], start) for name, x in store.items()}
        where = part.pop("pos", None)
        if where is None:  # [1, 1, tile]: one table of angles serves all rows and heads
            where = (codec.sink + ids)[None, None]
        else:
            seen &= where >= 0
        with jax.named_scope("decode_tile"):
            here = ctx.replace(pos=where)
            if before is not None:
                other, stored, known = before
                kinds = other.fields(dim, dtype)
                past = {name: fetch(x, kinds[name], start) for name, x in stored.items()}
                here = here.replace(previous=other.decode(past, dtype, known.replace(pos=where)))
            k, v = codec.decode(part, dtype, here)
        logits = jnp.einsum("bhrd,bhnd->bhrn", grouped, k, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
        top = jnp.maximum(peak, logits.max(-1))
        safe = jnp.where(top == -jnp.inf, 0.0, top)
        prob, shrink = jnp.exp(logits - safe[..., None]), jnp.exp(peak - safe)
        v = jnp.where(seen[..., None], v, 0)  # what an empty slot decodes to may be anything
        part_acc = jnp.einsum("bhrn,bhnd->bhrd", prob.astype(v.dtype), v, preferred_element_type=jnp.float32)
        carry = top, mass * shrink + prob.sum(-1), acc * shrink[..., None] + part_acc
        return carry, (logits if return_mass else None)

    zero = jnp.zeros(grouped.shape[:3], jnp.float32)
    start = (zero - jnp.inf, zero, jnp.zeros(grouped.shape, jnp.float32))
    steps = -(-total // tile)
    (peak, mass, acc), logits = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    some = mass > 0
    out = acc / jnp.where(some, mass, 1.0)[..., None]
    lse = jnp.where(some, jnp.log(jnp.where(some, mass, 1.0)) + peak, -jnp.inf)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    return out, lse, _mass(logits, lse, total, tile) if return_mass else None


def _mass(logits: Array, lse: Array, total: int, tile: int) -> Array:
    """logits [steps, batch, kv_heads, rows, tile] -> probabilities by slot, summed over the tokens."""
    steps = logits.shape[0]
    # Drop from the last tile what it shares with the one before.
    last = logits[-1][..., steps * tile - total :]
    flat = jnp.concatenate([*logits[:-1], last], axis=-1)
    batch, q_heads, tokens = lse.shape
    finite = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    return jnp.exp(flat.reshape(batch, q_heads, tokens, total) - finite).sum(2)
