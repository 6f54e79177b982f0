"""The selector contract: everything stays stored, a decode step reads only what its query needs.

A selector keeps an *index* beside a layer's entries: arrays that summarise them. It is built when the prompt has been
stored, grows with every token, and turns a query into scores of *units* of consecutive slots. What follows is
the same for every selector (`kvjax.cache.selecting`): sinks and the newest entries are always read, the best units fill
the rest of `read`, and the attention kernel gets a table of the blocks to read.

    store prompt -> build(index)      append token -> append(index)      query -> score -> blocks -> attend

Three methods against this contract:

- **Quest**: unit = page of 16 slots; index = element-wise bounds of the page's keys, widened by `append`; score =
  upper bound of q.k over the page.
- **ClusterKV**: unit = 1 slot; index = centroids, a label per slot; score = q.centroid of the slot's cluster, so that the
  best slots are whole clusters in order, the last one cut at the budget. New tokens have no label until 320 of them are
  clustered: until then they score `ALWAYS`.
- **LouisKV**: `due` compares this query with the last one, and the previous choice is read again until it says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kvjax.arrays import ArraySpec, nbytes
from kvjax.types import ModelShape

Array = jax.Array
Index = dict[str, Array]
NEVER = -jnp.inf  # score of a unit that must not be read even if there is room
ALWAYS = jnp.inf  # score of a unit that is read before all others


@struct.dataclass
class Entries:
    """Keys and values that enter the index, as they are stored (decoded), and where.

    `build` gets all stored entries of a layer, `append` the new ones of one call.
    """

    k: Array  # [batch, kv_heads, n, head_dim], after RoPE
    v: Array  # [batch, kv_heads, n, head_dim]
    pos: Array  # int32 [batch, kv_heads, n], -1 = empty
    slots: Array  # int32 [batch, kv_heads, n] slot of each entry, -1 = none (empty, or an exact sink of the codec)


@struct.dataclass
class Call:
    """The call that an index sees: its queries, and what else the model handed over."""

    q: Array  # [batch, q_heads, tokens, head_dim], after RoPE
    q_pos: Array  # int32 [batch, tokens], -1 = padding
    fill: Array  # int32 [batch, kv_heads] slots that hold entries (of a deferred codec: encoded ones)
    stored: Callable[[], Entries] = struct.field(pytree_node=False)  # all entries, decoded; costs a full read
    lse: Array | None = (
        None  # f32 [batch, q_heads, tokens], prefill only: log-sum-exp of this call's attention
    )
    hidden: Array | None = None  # [batch, tokens, embed]
    before: Array | None = None  # `hidden` of the layer before, for selectors that need 'before'
    token_ids: Array | None = None  # int32 [batch, tokens], for selectors that need 'token_ids'
    inv_freq: Array | None = None  # f32 [rotary_dim // 2]
    const: dict[str, Array] = struct.field(default_factory=dict)  # `Selector.constants` of this layer
    layer: int = struct.field(pytree_node=False, default=0)
    scale: float = struct.field(pytree_node=False, default=1.0)
    softcap: float | None = struct.field(pytree_node=False, default=None)

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.fill.shape[1]

    @property
    def grouped(self) -> Array:
        """The newest query by KV head: f32 [batch, kv_heads, groups, head_dim]."""
        b, _, _, d = self.q.shape
        return self.q[:, :, -1].reshape(b, -1, self.groups, d).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Selector:
    """Base class of selectors: frozen dataclasses (static under `jit`) of pure functions.

    read: entries read per step and KV head, sinks and recent ones included: an int, or a fraction of those stored.
    sink, recent: the first slots and the newest ones that are always read.
    skip_layers: the first layers, which read everything.
    interval: decode steps from one selection to the next; in between the last choice and the newest are read.
    """

    read: int | float = 0.1
    sink: int = 0
    recent: int = 1
    skip_layers: int = 0
    interval: int = 1

    unit: ClassVar[int] = 1
    """Slots that share a score. A subclass may have a field or property of that name."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of `Call`, beyond what every call has: any of 'hidden', 'before', 'token_ids'."""
    biased: ClassVar[bool] = False
    """True when `bias` changes logits: attention then gathers in XLA."""
    triggered: ClassVar[bool] = False
    """True when `due` decides at which steps to select anew."""
    ahead: ClassVar[bool] = False
    """True to choose with the queries that the layer before foresaw (`AttentionInputs.ahead`); a field may have that name."""
    supplies: ClassVar[frozenset[str]] = frozenset()
    """Stored fields that `supply` computes, so that an offloaded layer does not fetch them."""
    reorders: ClassVar[bool] = False
    """True when `order` moves stored entries, so that what belongs together shares a page."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.read, bool) or not isinstance(self.read, int | float):
            raise ValueError(f"{name}: read must be an int or a float in (0, 1], got {self.read!r}")
        if (isinstance(self.read, float) and not 0.0 < self.read <= 1.0) or self.read <= 0:
            raise ValueError(
                f"{name}: read must be at least 1 entry or a fraction in (0, 1], got {self.read}"
            )
        if min(self.sink, self.skip_layers) < 0 or self.recent < 1 or self.interval < 1 or self.unit < 1:
            raise ValueError(
                f"{name}: sink and skip_layers cannot be negative; recent, interval and the unit must be at least 1"
            )
        if isinstance(self.read, int) and self.read < self.sink + self.recent:
            raise ValueError(
                f"{name}: read={self.read} is below the {self.sink + self.recent} entries that are always read "
                f"(sink={self.sink} + recent={self.recent}); raise read or lower them"
            )

    @property
    def keeps_choice(self) -> bool:
        """True when a choice serves several steps."""
        return self.interval > 1 or self.triggered

    @property
    def estimates(self) -> bool:
        """True when `estimate` adds a partial result."""
        return type(self).estimate is not Selector.estimate

    def check(self, shape: ModelShape) -> None:
        """ValueError when this selector does not fit a model."""

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """The index of one layer for `slots` slots a head (a multiple of `unit`); {} = the entries themselves."""
        return {}

    def constants(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        """Calibration arrays of one layer, handed back as `Call.const`."""
        return {}

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """The index of all stored entries of a layer.

        index: empty, as `specs` fills it. previous: that of the chunks before (empty for a whole prompt); entries may have
        moved or left since. The default appends all entries to the empty index.
        """
        return self.append(index, entries, call)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """The index after `entries` (one or more tokens a row) were stored; empty ones (slot -1) change nothing."""
        return index

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """(f32 [batch, kv_heads, units], index): how much this step's query (the last of `call`) needs each unit.

        Any scale; NEVER and ALWAYS as above. Units without entries may hold anything but NaN.
        """
        raise NotImplementedError

    def due(self, index: Index, call: Call) -> tuple[Array, Index]:
        """(bool [batch]: select anew at this step, index), for `triggered` selectors."""
        raise NotImplementedError

    def order(self, entries: Entries, call: Call) -> Array:
        """int32 [batch, kv_heads, n]: which entry goes to each place, for selectors that `reorders`; a permutation
        that leaves empty entries at the end."""
        raise NotImplementedError

    def bias(self, index: Index, call: Call, slots: Array) -> Array:
        """f32 [batch, q_heads, n], added to the logits of the chosen slots int32 [batch, kv_heads, n] (`biased`)."""
        raise NotImplementedError

    def estimate(self, index: Index, call: Call, chosen: Array) -> tuple[Array, Array] | None:
        """Partial attention over summaries of what was not read, merged by its log-sum-exp: (out f32 [batch, q_heads, 1,
        head_dim], lse f32 [batch, q_heads, 1]). chosen: bool [batch, kv_heads, units]. None: what is not read is lost."""
        return None

    def supply(self, index: Index, call: Call, slots: Array) -> dict[str, Array]:
        """The fields of `supplies` [batch, kv_heads, n, ...] at slots int32 [batch, kv_heads, n] of the prompt, from the
        index; slots outside it may give anything finite."""
        return {}

    def scanned(self, specs: dict[str, ArraySpec], slots: int, batch: int, shape: ModelShape) -> float:
        """Bytes that one selection reads when all `slots` slots of a layer are filled. The default: the whole index."""
        return float(nbytes(specs))

    def entries(self, stored: int) -> int:
        """Entries read per step and KV head when `stored` are (host int)."""
        wanted = int(stored * self.read) if isinstance(self.read, float) else self.read
        return min(stored, max(wanted, self.sink + self.recent, 1))


def over_group(scores: Array, how: str, where: Array | None = None) -> Array:
    """One score per KV head from those of its query heads: f32 [batch, kv_heads, groups, units] -> [.., units].

    how: 'max' or 'mean' of the scores, 'softmax_max' or 'softmax_mean' of their softmax over the units; where: bool,
    broadcastable, units that take part in it.
    """
    kind, _, after = how.partition("_")
    if kind == "softmax":
        scores = jax.nn.softmax(scores if where is None else jnp.where(where, scores, -1e30), axis=-1)
        kind = after
    if kind not in ("max", "mean"):
        raise ValueError(
            f"unknown way to combine a group: {how!r}; choose max, mean, softmax_max, softmax_mean"
        )
    return jnp.max(scores, axis=2) if kind == "max" else jnp.mean(scores, axis=2)


def index_axes(suffix: int) -> tuple[Any, ...]:
    """Axis names of an index array [batch, kv_heads, units, ...] with `suffix` more axes."""
    return ("batch", "kv_heads", "slots", *(None,) * suffix)
