"""Merge partial attention results by their log-sum-exp.

One function for split-K, shared prefixes, a residual window beside quantized slots, and sequence shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def merge_partials(outs: Array | Sequence[Array], lses: Array | Sequence[Array]) -> tuple[Array, Array]:
    """Merge attention over disjoint sets of keys into attention over their union.

    Args:
      outs: [parts, ..., head_dim], or a sequence of arrays [..., head_dim]: softmax-normalised outputs.
      lses: [parts, ...], or a sequence of arrays [...]: log-sum-exp of each part's logits; -inf for a part
        without visible keys, whose output is then ignored, NaN included.

    Returns: out float32 [..., head_dim] and lse float32 [...]; where every part is empty, 0 and -inf.

    Raises:
      ValueError: no parts, or shapes that do not fit.
    """
    if not isinstance(outs, jax.Array):
        if not len(outs) or len(outs) != len(lses):
            raise ValueError(
                f"merge_partials: {len(outs)} outputs and {len(lses)} log-sum-exps; give one each"
            )
        outs, lses = jnp.stack([jnp.asarray(o) for o in outs]), jnp.stack([jnp.asarray(x) for x in lses])
    if outs.shape[:-1] != lses.shape or not outs.shape[0]:
        raise ValueError(f"merge_partials: outs {outs.shape} and lses {lses.shape} do not fit")
    with jax.named_scope("merge_partials"):
        lses = lses.astype(jnp.float32)
        peak = lses.max(0)
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)
        weight = jnp.exp(lses - peak)
        total = weight.sum(0)
        kept = jnp.where(weight[..., None] > 0, outs.astype(jnp.float32), 0.0)
        out = (weight[..., None] * kept).sum(0) / jnp.where(total > 0, total, 1.0)[..., None]
        return out, jnp.where(total > 0, jnp.log(total) + peak, -jnp.inf)
