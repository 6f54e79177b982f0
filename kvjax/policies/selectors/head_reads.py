"""How a selector's budget is divided among the model's heads, and which heads need no selector."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from kvjax.policies.allocators.tables import check_table
from kvjax.policies.head_scores import Table, check_file
from kvjax.types import ModelShape

Array = jax.Array
_PARTS = 1024  # shares are multiples of 1 / _PARTS, so that a count is exact in int32


@dataclasses.dataclass(frozen=True)
class HeadReads:
    """HeadKV's division (arXiv 2410.19258), of what is read instead of what is kept, and DuoAttention's streaming heads.

    With `read` the mean fraction over all heads: share[l, h] = r (1 - 1 / beta) + (r / beta) R p[l, h], p the scores
    normalised over the R retrieval heads, r = (L H read - S window) / R; what exceeds 1 goes to the others in proportion to p.

    streaming: the S heads of lowest score (a fraction of all, or how many) read `window` of their entries (a fraction): the
    first `sink`, and the newest. They have no index, and a layer of nothing else scores and scans nothing.
    """

    scores: Table
    beta: float = 1.5
    file: str = ""
    streaming: int | float = 0
    window: float = 0.02
    sink: int = 4

    @property
    def streams(self) -> int:
        """How many heads stream."""
        heads = sum(len(row) for row in self.scores)
        return round(heads * self.streaming) if isinstance(self.streaming, float) else self.streaming

    def retrieving(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a layer that do not stream."""
        return tuple(int(h) for h in np.flatnonzero(self._roles()[layer]))

    def _roles(self) -> np.ndarray:
        """bool [layers, kv_heads]: retrieval heads. Of equal scores the earlier head streams."""
        flat = np.asarray(self.scores, np.float64).reshape(-1)
        roles = np.ones(flat.size, bool)
        roles[np.argsort(flat, kind="stable")[: self.streams]] = False
        return roles.reshape(len(self.scores), -1)

    def check(self, shape: ModelShape, selector: Any, name: str) -> None:
        """ValueError unless there is a score for every layer and KV head of this model, and the selector composes."""
        check_file(self.file, shape)
        check_table("head scores", self.scores, shape)
        kind, heads = type(selector).__name__, shape.layers * shape.kv_heads
        if not isinstance(selector.read, float):
            raise ValueError(f"{name}: budgets per head need `read` as a fraction")
        if self.streams >= heads:
            raise ValueError(
                f"{name}: streaming={self.streaming} leaves none of {heads} heads to {kind}; lower it"
            )
        if not self.streams:
            return
        if selector.reorders or selector.supplies:
            what = "moves entries" if selector.reorders else "rebuilds the keys of all heads together"
            raise ValueError(f"{name}: {kind} {what}, which does not compose with streaming heads")
        if self.streams * self.window > selector.read * heads:
            raise ValueError(
                f"{name}: read={selector.read} is below what {self.streams} of {heads} heads stream "
                f"(window={self.window}); raise read or lower window"
            )

    def shares(self, read: float) -> np.ndarray:
        """int [layers, kv_heads]: parts of 1024 that each head reads of its entries; their mean is at most `read`."""
        roles = self._roles()
        p = np.where(roles, np.maximum(np.asarray(self.scores, np.float64), 1e-9), 0.0)
        total = read * p.size - (~roles).sum() * self.window  # of the retrieval heads
        share = np.where(roles, total / roles.sum() * (1 - 1 / self.beta), 1.0)
        rest = total / self.beta
        while rest > 1e-9 and (share < 1).any():
            open_ = share < 1
            given = np.where(open_, rest * p / p[open_].sum(), 0.0)
            taken = np.minimum(share + given, 1.0) - share
            share, rest = share + taken, rest - taken.sum()
        share = np.where(roles, np.minimum(share, 1.0), self.window)
        return np.floor(share * _PARTS + 1e-6).astype(np.int64)

    def entries(self, read: float, layer: int, stored: Array) -> Array:
        """int32 [batch, kv_heads]: entries that each head of a layer reads of `stored` (at most 2**20)."""
        return stored * self.shares(read)[layer].astype(np.int32) // _PARTS
