"""XAttention: blocks ranked by the sums of their antidiagonals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kvjax.policies.prefill_patterns.base import PrefillPattern
from kvjax.policies.prefill_patterns.blocks import Blocks, covering
from pallas_kernels.platform import dot_precision, target_platform
from pallas_kernels.prefill_attention.reference import causal_segments, pad_axis

Array = jax.Array


def antidiagonal_mass(x: Blocks, stride: int) -> Array:
    """f32 [batch, q_heads, q_blocks, k_blocks]: estimated attention mass of every block; stride 1 gives the exact mass.

    Queries and keys are cut into tiles of stride x stride; the mean logit over a tile's antidiagonal, sum_p
    q[r S + S-1-p] . k[c S + p] / S, stands for the tile. The softmax runs over all tiles that a row of tiles sees,
    one reduced query per `stride` tokens; its probabilities are summed over the tiles of a block. A block of padding
    has mass 0. Work: 1 / stride of the product of queries and keys.
    """
    obs, block = x.obs, x.block
    q, k = obs.need("q"), obs.k
    b, kv, _, d = k.shape
    groups, per = obs.groups, block // stride
    rows, cols = x.q_blocks * per, x.k_blocks * per
    q_pos, k_pos = obs.need("q_pos"), obs.pos
    q = jnp.where((q_pos >= 0)[:, None, :, None], q, 0)
    k = jnp.where((k_pos >= 0)[..., None], k, 0)
    q = pad_axis(q, 2, rows * stride).reshape(b, kv, groups, rows, stride, d)[..., ::-1, :]
    q = q.reshape(b, kv, groups, rows, stride * d)
    k = pad_axis(k, 2, cols * stride).reshape(b, kv, cols, stride * d)
    q_high = pad_axis(q_pos, 1, rows * stride, -1).reshape(b, 1, 1, rows, stride).max(-1)
    k_low = pad_axis(k_pos, 2, cols * stride, -1).reshape(b, kv, 1, 1, cols, stride)
    k_low = jnp.where(k_low < 0, jnp.iinfo(jnp.int32).max, k_low).min(-1)
    chunk = _chunk(b * x.q_heads * cols, rows, per)

    def one(start: Array, end: int) -> Array:
        """Blocks of `chunk` reduced rows over the first `end` reduced columns."""
        q_c = lax.dynamic_slice_in_dim(q, start, chunk, axis=3)
        seen = k_low[..., :end] <= lax.dynamic_slice_in_dim(q_high, start, chunk, axis=3)[..., None]
        logits = jnp.einsum(
            "bhgrd,bhcd->bhgrc", q_c, k[:, :, :end],
            precision=dot_precision(k.dtype), preferred_element_type=jnp.float32,
        ) * (obs.scale / stride)  # fmt: skip
        if obs.softcap is not None:
            logits = obs.softcap * jnp.tanh(logits / obs.softcap)
        logits = jnp.where(seen, logits, -jnp.inf)
        top = logits.max(-1, keepdims=True)
        weight = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0.0))
        mass = weight.reshape(*weight.shape[:-1], end // per, per).sum(-1)
        total = mass.sum(-1, keepdims=True)
        mass = mass / jnp.where(total > 0, total, 1.0)
        mass = mass.reshape(b, x.q_heads, chunk // per, per, end // per).sum(3)
        return pad_axis(mass, 3, x.k_blocks)

    parts = []
    for first, stop in causal_segments(rows, chunk) if x.aligned else [(0, rows)]:
        end = stop if x.aligned else cols
        starts = jnp.arange(first, stop, chunk)
        mass = lax.map(lambda at, end=end: one(at, end), starts) if len(starts) > 1 else one(first, end)[None]
        parts.append(jnp.moveaxis(mass, 0, 2).reshape(b, x.q_heads, -1, x.k_blocks))
    return jnp.concatenate(parts, axis=2)


def _chunk(scores_per_row: int, rows: int, per: int) -> int:
    """Reduced rows at once: whole blocks that divide `rows`, few enough to bound the scores alive."""
    most = (1 << 21 if target_platform() == "cpu" else 1 << 26) // max(1, scores_per_row)
    blocks = rows // per
    best = max(n for n in range(1, blocks + 1) if blocks % n == 0 and (n == 1 or n * per <= most))
    return best * per


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention(PrefillPattern):
    """Every query block reads the fewest key blocks whose estimated mass is `threshold` of its row, at least."""

    stride: int = 16
    threshold: float = 0.9
    min_recall: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1 or self.block % self.stride or not 0.0 < self.threshold <= 1.0:
            raise ValueError(
                f"xattention: stride={self.stride} must divide block={self.block}, and threshold={self.threshold} be in (0, 1]"
            )

    def keep(self, x: Blocks) -> Array:
        """The first and the diagonal block count towards the threshold: they are read anyway."""
        if self.threshold >= 1.0:
            return x.visible
        mass = antidiagonal_mass(x, self.stride)
        forced = x.sinks(1) | x.near(1)
        rest = jnp.where(forced, 0.0, mass)
        row = jnp.sum(mass, axis=-1)
        missing = self.threshold * row - jnp.sum(jnp.where(forced, mass, 0.0), axis=-1)
        return forced | (covering(rest, missing) & (missing > 0)[..., None])
