"""Spans around the best tokens, whatever their position (LongCache / ReAttention)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.codecs.transforms import rope
from kvjax.policies.selectors.base import NEVER, Call, Index, Selector
from kvjax.policies.selectors.blocks import plain_keys
from kvjax.policies.selectors.pages import scatter_pages
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Spans(Selector):
    """Spans of `span` slots that hold one of the `top` tokens of some query head, one set for all KV heads (ReAttention).

    Scores are q.k without RoPE, over all entries but the sinks and the newest; a span has a vote for each such token,
    most votes first, then the larger score. Spans without a vote are not read. There is no index: all keys are scored.
    """

    span: int = 32
    top: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise ValueError(f"{type(self).__name__}: top must be at least 1, got {self.top}")

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots per span."""
        return self.span

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Votes, plus a share below 1 that grows with the best score."""
        assert call.inv_freq is not None
        entries = call.stored()
        k = plain_keys(entries, call)
        q = call.grouped
        pos = jnp.broadcast_to(jnp.max(call.q_pos, axis=1)[:, None, None], q.shape[:3])
        q = rope(q, pos, call.inv_freq, inverse=True)
        logits = jnp.einsum("bhgd,bhnd->bhgn", q, k, precision="highest") * call.scale
        # Heads may hold different entries: each votes for the spans of its own slots.
        end = jnp.max(entries.slots, axis=-1, keepdims=True) + 1
        middle = (entries.slots >= self.sink) & (entries.slots < end - self.recent)
        logits = jnp.where(middle[:, :, None], logits, -jnp.inf)
        best, at = jax.lax.top_k(logits, min(self.top, logits.shape[-1]))
        slots = jnp.take_along_axis(jnp.broadcast_to(entries.slots[:, :, None], logits.shape), at, axis=-1)
        spans = jnp.where(best > -jnp.inf, slots // self.span, -1)
        b, h, n = entries.slots.shape
        units = -(-n // self.span)
        spans, best = spans.reshape(b, 1, -1), best.reshape(b, 1, -1)
        votes = scatter_pages(jnp.zeros((b, 1, units)), spans, jnp.ones_like(best), "add")
        share = jax.nn.sigmoid(jnp.where(best > -jnp.inf, best, -1e9) / 8.0) * 0.999
        share = scatter_pages(jnp.zeros((b, 1, units)), spans, share, "max")
        none = 0.0 if self.read == 1.0 else NEVER
        scores = jnp.where(votes > 0, votes + share, none)
        return jnp.broadcast_to(scores, (b, h, units)), index

    def scanned(self, specs: dict[str, ArraySpec], slots: int, batch: int, shape: ModelShape) -> float:
        """All keys."""
        return float(batch * shape.kv_heads * slots * shape.head_dim * jnp.dtype(shape.dtype).itemsize)
