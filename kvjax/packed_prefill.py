"""Attention of packed prompts, and each prompt's entries in a row of its own of the cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attend import new_entries, score_and_store
from kvjax.cache import prefix as shared
from kvjax.cache.plan import Plan
from kvjax.cache.prefix import Prefix
from kvjax.cache.state import KVCache
from kvjax.sharded_kernels import prefill_attention
from kvjax.sharding import constrain
from kvjax.types import Array, AttendFn, AttentionInputs


def unpack(x: Array, index: Array, axis: int) -> Array:
    """Packed [rows, ..., width, ...] with tokens along `axis` (1 or 2) -> [batch, ..., prompt, ...]; padding is arbitrary."""
    at = jnp.maximum(index, 0)
    if axis == 1:
        return x.reshape(-1, *x.shape[2:])[at]
    flat = jnp.moveaxis(x, 1, 0)  # heads first: a head's tokens of all rows in one axis
    flat = flat.reshape(flat.shape[0], -1, *x.shape[3:])
    return jnp.moveaxis(jnp.take(flat, at, axis=1), 0, 1)


def unpack_inputs(x: AttentionInputs, index: Array) -> AttentionInputs:
    """What an unpacked call of the layer would have been given."""
    fields: dict[str, Any] = {name: unpack(getattr(x, name), index, 2) for name in ("q", "k", "v")}
    if x.hidden is not None:
        fields["hidden"] = unpack(x.hidden, index, 1)
    positions = jnp.where(index >= 0, unpack(x.positions, index, 1), -1)
    return x.replace(positions=positions, **fields)  # type: ignore[attr-defined]


def packed_prefill(
    plan: Plan,
    segments: Array,
    index: Array,
    *,
    prefix: Prefix | None = None,
    implementation: str | None = None,
) -> AttendFn:
    """AttendFn for whole prompts in packed rows; `kvjax.attend.prefill` with fresh=True for everything after attention.

    segments int32 [rows, width] and index int32 [batch, prompt]: see `kvjax.generation.packing.Packed`.
    prefix: one for all prompts.
    """

    def attend(x: AttentionInputs, cache: KVCache) -> tuple[Array, KVCache]:
        with jax.named_scope("prefill_attention"):
            out, lse = prefill_attention(
                x.q,
                x.k,
                x.v,
                q_positions=x.positions,
                k_positions=x.positions,
                q_segments=segments,
                k_segments=segments,
                scale=x.scale,
                window=x.window,
                softcap=x.softcap,
                causal_aligned=True,
                return_lse=True,
                partial=prefix is not None,
                implementation=implementation,
            )
            if prefix is not None:
                out, lse = shared.attend(x, prefix.layers[x.layer], out, lse, implementation)
                out = out.astype(x.q.dtype)
        out = constrain(out, ("batch", "q_heads", None, None))
        rows = unpack_inputs(x, index)
        entries = new_entries(plan, rows)
        lse = jnp.where(rows.positions[:, None] >= 0, unpack(lse, index, 2), -jnp.inf)
        return out, score_and_store(
            plan, cache, rows, entries, rows.k, rows.v, lse, compress=True, fresh=True, aligned=prefix is None
        )

    return attend
