"""Attention of a prompt or chunk that reads only the key blocks which a policy's prefill pattern names."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.policies.observation import Observation
from kvjax.policies.prefill_patterns.base import PrefillPattern
from kvjax.sharded_kernels import prefill_attention
from kvjax.types import Array


def sparse_attention(
    pattern: PrefillPattern,
    obs: Observation,
    *,
    aligned: bool,
    partial: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """(out [batch, q_heads, tokens, head_dim], lse f32 [batch, q_heads, tokens] over the blocks that were read).

    obs: this call's queries and all entries. aligned: queries and entries are the same tokens. partial: `out` in
    float32. Rows padded in front are moved to the front first, so that blocks, and with them the result, do not depend on the side of the padding.
    """
    if not aligned:
        return _attend(pattern, obs, aligned, partial, implementation)
    q_pos = obs.need("q_pos")
    start = jnp.argmax(q_pos >= 0, axis=1)

    def shifted(by: Array, *arrays: Array) -> tuple[Array, ...]:
        """Arrays [batch, ..., tokens, (head_dim)] turned by `by` tokens; q_pos-like ones have two axes."""
        roll = lambda x, n: jnp.roll(x, n, axis=0 if x.ndim == 1 else 1)  # noqa: E731
        turn = lambda arrays: tuple(jax.vmap(roll)(x, by) for x in arrays)  # noqa: E731
        return jax.lax.cond(jnp.any(by != 0), turn, lambda arrays: arrays, arrays)

    q, k, v, at = shifted(-start, obs.need("q"), obs.k, obs.v, q_pos)
    pos = jnp.broadcast_to(at[:, None], obs.pos.shape)
    moved = obs.replace(q=q, k=k, v=v, q_pos=at, pos=pos)  # type: ignore[attr-defined]
    out, lse = _attend(pattern, moved, aligned, partial, implementation)
    out, lse = shifted(start, out, lse)
    return out, lse


def _attend(
    pattern: PrefillPattern, obs: Observation, aligned: bool, partial: bool, implementation: str | None
) -> tuple[Array, Array]:
    q_pos = obs.need("q_pos")
    return prefill_attention(
        obs.need("q"),
        obs.k,
        obs.v,
        q_positions=q_pos,
        k_positions=q_pos if aligned else obs.pos,
        scale=obs.scale,
        window=obs.window,
        softcap=obs.softcap,
        causal_aligned=aligned,
        blocks=pattern.blocks(obs, aligned=aligned),
        return_lse=True,
        partial=partial,
        implementation=implementation,
    )
