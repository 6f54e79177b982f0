"""The reducer contract: what happens to the entries that lose their place?

A reducer sees a layer's entries when they are compacted (`survivors`, after a prompt, a chunk of one, or `interval`
steps), and the one entry that a head evicts in a decode step (`absorb`). What it has to remember beside the entries,
such as a moving threshold, is one number per (row, KV head) and name, in `Layer.state`; it reads it as `obs.state`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from flax import struct

from kvjax.policies.observation import Observation

Array = jax.Array
LOG_COUNT = "log_count"  # slot state: logarithm of the number of tokens that a slot stands for
LOG_VALUE = (
    "log_value"  # slot state, optional: logarithm of the weight of its value, where that is another one
)


@struct.dataclass
class Survivors:
    """What a layer holds after a compaction; unused places come last."""

    k: Array  # [batch, kv_heads, places, head_dim]
    v: Array  # [batch, kv_heads, places, head_dim]
    pos: Array | None = None  # int32 [batch, kv_heads, places], -1 = unused; None: of the selected entries
    slot_state: dict[str, Array] | None = None  # [batch, kv_heads, places, ...]; None: moves with the entries
    state: dict[str, Array] = struct.field(default_factory=dict)  # what changes of `obs.state`


@struct.dataclass
class Written:
    """Slots that a decode step rewrites, beside the one that is freed."""

    slots: Array  # int32 [batch, kv_heads, n], each at most once; -1 = none
    k: Array  # [batch, kv_heads, n, head_dim]
    v: Array  # [batch, kv_heads, n, head_dim]
    state: dict[str, Array] = struct.field(default_factory=dict)  # what changes of `obs.state`


class Reducer:
    """Base class; the losers are dropped unless a subclass says otherwise."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Observation fields that it uses; see `Scorer.needs`."""
    merges: ClassVar[bool] = False
    """True when survivors change: the reducer then works on keys and values before they are encoded."""
    absorbs: ClassVar[bool] = False
    """True when `absorb` says what an entry evicted in a decode step leaves behind; otherwise it is dropped."""
    resamples: ClassVar[bool] = False
    """True when decoding calls `survivors` too, every `interval` steps: losers go into what survivors stand for."""

    @property
    def weighs(self) -> bool:
        """True when any slot may count other than once. Attention then runs in XLA (`kvjax.cache.weighted`): kernels
        read no weight per slot. The scorer keeps the weights, as slot state LOG_COUNT and perhaps LOG_VALUE."""
        return False

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Slot state that the reducer writes, as `Scorer.slot_state`; `Counted` adds it to a scorer's."""
        return {}

    def state(self) -> dict[str, float]:
        """name -> initial value of what it keeps per row and KV head, float32 [batch, kv_heads] each."""
        return {}

    def reduce(self, obs: Observation, index: Array, scores: Array) -> tuple[Array, Array]:
        """Survivors' (k, v) [batch, kv_heads, places, head_dim] from all entries; `index` as from `Selection`."""
        raise NotImplementedError

    def apply(
        self, obs: Observation, index: Array, scores: Array, state: dict[str, Array]
    ) -> tuple[Array, Array, dict[str, Array] | None]:
        """`reduce`, for reducers that also change the survivors' slot state (None: it moves with them unchanged).

        state: of all entries, [batch, kv_heads, slots, ...]; returned: of the survivors, [batch, kv_heads, places, ...].
        """
        return *self.reduce(obs, index, scores), None

    def survivors(self, obs: Observation, index: Array, scores: Array, state: dict[str, Array]) -> Survivors:
        """`apply`, for reducers whose survivors are not the selected entries, or that remember something."""
        k, v, slot_state = self.apply(obs, index, scores, state)
        return Survivors(k, v, slot_state=slot_state)

    def absorb(self, obs: Observation, victim: Array) -> Written:
        """What changes when a decode step evicts slot `victim` int32 [batch, kv_heads] (-1: none) of all entries."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Drop(Reducer):
    """Losers are dropped."""
