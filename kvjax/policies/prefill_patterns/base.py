"""The contract of sparse prefill: a pattern names, for every query block of a prompt, the key blocks that it reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.observation import Observation
from kvjax.policies.prefill_patterns.blocks import Blocks
from kvjax.types import ModelShape
from pallas_kernels.prefill_attention import BlockTable, block_table

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillPattern:
    """Which key blocks each query block of each head reads while a prompt is prefilled. None in a policy: all.

    A method implements `keep`. What follows is the same for all: the first block and the diagonal are always read;
    heads whose estimated recall is below `min_recall`, and rows of at most `min_tokens` tokens, read every block that
    causal attention reads. Layers with a sliding window keep reading their window, and a question that is appended
    to a compressed context attends densely; chunks of a prompt follow the pattern over stored entries and the chunk.

    block: tokens per block, of queries and of keys (the GPU kernel needs multiples of 128).
    min_tokens: rows up to this many tokens are dense; 0 stands for two blocks.
    min_recall: the least share of the last queries' attention that a head's blocks must hold; 0 never falls back.
    spread: measure it on queries spread evenly over the prompt instead of the last ones.
    sample: how many last queries estimates are made from. Memory of an estimate is O(slots * sample) per head.
    """

    block: int = 128
    min_tokens: int = 0
    min_recall: float = 0.0
    spread: bool = False
    sample: int = 64

    shortest: ClassVar[int] = 2
    """Rows of up to this many blocks are dense when `min_tokens` is 0."""

    def __post_init__(self) -> None:
        if self.block < 1 or self.sample < 1 or self.min_tokens < 0 or not 0 <= self.min_recall <= 1:
            raise ValueError(
                "a prefill pattern needs block >= 1, sample >= 1, min_tokens >= 0 and min_recall in [0, 1], got "
                f"{self.block}, {self.sample}, {self.min_tokens} and {self.min_recall}"
            )

    def check(self, shape: ModelShape) -> None:
        """ValueError when the pattern does not fit a model, e.g. a table of another number of heads."""

    def keep(self, x: Blocks) -> Array:
        """Bool [batch or 1, q_heads or 1, q_blocks, k_blocks]: the blocks to read; invisible ones may be set."""
        raise NotImplementedError

    def mask(self, x: Blocks) -> Array:
        """`keep` with what every pattern has in common: bool [batch, q_heads, q_blocks, k_blocks]."""
        keep = (self.keep(x) | x.sinks(1) | x.near(1)) & x.visible
        dense = (x.obs.length <= self._dense_up_to)[:, None]
        if self.min_recall > 0:
            dense = dense | (x.recall(keep, self.spread) < self.min_recall)
        return jnp.where(dense[..., None, None], x.visible, keep)

    def blocks(self, obs: Observation, *, aligned: bool) -> BlockTable | None:
        """The table of a call: int32 [batch, q_heads, q_blocks, k_blocks], -1 where unused; None: dense.

        obs: this call's queries over all entries; uses q, q_pos, k, pos, length, scale, window, softcap and layer.
        aligned: queries and slots are the same tokens, each row's first token in slot 0. The table is as wide as
        dense attention needs, since any head may fall back to it: its size does not depend on data.
        """
        if not self.applies(obs.k.shape[2]):
            return None
        with jax.named_scope("prefill_pattern"):
            x = Blocks(obs, self.block, self.sample, aligned)
            return block_table.from_mask(self.mask(x), block_q=self.block, block_k=self.block, ordered=True)

    def applies(self, slots: int) -> bool:
        """False when a call over `slots` slots is dense whatever the data."""
        return slots > self._dense_up_to

    @property
    def _dense_up_to(self) -> int:
        return self.min_tokens or self.shortest * self.block
