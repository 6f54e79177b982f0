"""How a selector's budget is divided among the model's heads."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from kvjax.policies.allocators.tables import check_table
from kvjax.policies.head_scores import Table, check_file
from kvjax.types import ModelShape

Array = jax.Array
_PARTS = 1024  # shares are multiples of 1 / _PARTS, so that a count is exact in int32


@dataclasses.dataclass(frozen=True)
class HeadReads:
    """HeadKV's division (arXiv 2410.19258), of what is read instead of what is kept.

    With `read` the mean fraction over all heads: share[l, h] = read (1 - 1 / beta) + (read / beta) L H p[l, h], p the scores
    normalised over the model; what exceeds 1 goes to the other heads in proportion to p.
    """

    scores: Table
    beta: float = 1.5
    file: str = ""

    def check(self, shape: ModelShape) -> None:
        """ValueError unless there is a score for every layer and KV head of this model."""
        check_file(self.file, shape)
        check_table("head scores", self.scores, shape)

    def shares(self, read: float) -> np.ndarray:
        """int [layers, kv_heads]: parts of 1024 that each head reads of its entries; their mean is at most `read`."""
        p = np.maximum(np.asarray(self.scores, np.float64), 1e-9)
        share = np.full(p.shape, read * (1 - 1 / self.beta))
        rest = read / self.beta * p.size
        while rest > 1e-9 and (share < 1).any():
            open_ = share < 1
            given = np.where(open_, rest * p / p[open_].sum(), 0.0)
            taken = np.minimum(share + given, 1.0) - share
            share, rest = share + taken, rest - taken.sum()
        return np.floor(share * _PARTS + 1e-6).astype(np.int64)

    def entries(self, read: float, layer: int, stored: Array) -> Array:
        """int32 [batch, kv_heads]: entries that each head of a layer reads of `stored` (at most 2**20)."""
        return stored * self.shares(read)[layer].astype(np.int32) // _PARTS
