"""The policy contract: orthogonal parts, each a frozen (hashable) dataclass of pure functions.

Life of an entry, the same for every method:

    attend -> observe -> score -> allocate -> select -> reduce -> encode          (prefill, per chunk)
    append -> select blocks -> attend (+ mass) -> score -> evict one              (every decode step)

A `Policy` is static under `jit`; what varies lives in the cache pytree. A method is a preset of parts, and
`a | b` combines presets: a part that one of them sets explicitly wins over a default of the other, and two
explicit settings of the same part exclude each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.arrays import ArraySpec
from kvjax.codecs.base import Codec, Plain
from kvjax.policies.observation import NEG, Observation
from kvjax.policies.prefill_patterns.base import PrefillPattern
from kvjax.policies.reducing import Drop, Reducer
from kvjax.types import ModelShape

Array = jax.Array
State = dict[str, Array]
PROTECTED = 1e30  # `Policy.protect` lifts sinks and recent entries to this or above; other scores stay below


class Scorer:
    """How important is each stored entry?

    `score` sees all entries (stored ones first, then this call's) and returns f32 [batch, kv_heads, slots],
    higher = keep; empty slots may hold anything, protected ones are handled by the caller. The same function
    serves prefill (many queries) and decode (one query). State that belongs to an entry, such as accumulated
    attention, is declared by `slot_state` and moves with the entry when the cache is compacted.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Observation fields used: any of 'q', 'mass' (decode mass), 'hidden', 'wo', 'inv_freq', 'const', 'token_ids'."""
    chunk_exact: ClassVar[bool] = False
    """True when an entry's score never changes, so that chunked prefill keeps what whole prefill keeps."""
    prefill_only: ClassVar[bool] = False
    """True when one query says too little: the scorer then cannot evict while decoding."""

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """name -> (shape after [batch, kv_heads, slots], dtype). New entries start at zero."""
        return {}

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """(scores f32 [batch, kv_heads, slots], new slot state)."""
        raise NotImplementedError

    def constants(self, layer: int, shape: ModelShape) -> dict[str, Any]:
        """Calibration arrays of this layer, handed back as `obs.const`; empty for most scorers."""
        return {}


class Allocator:
    """How many entries does each layer and KV head keep?

    `keep` below is the mean number per KV head per layer that the budget allows a row (int32 [batch], or a
    Python int when capacities are planned on the host).
    """

    ragged: ClassVar[bool] = False
    """True when heads of one layer may keep different numbers: the cache then uses the Ragged layout."""
    scope: ClassVar[str] = "layer"
    """'layer': counts need this layer's scores only. 'model': layers share one pool, compaction waits for the last."""
    outcome: ClassVar[bool] = False
    """True when the budget is only a ceiling: how much is kept follows from the data, and pools are fitted to it."""
    ahead: ClassVar[bool] = False
    """For scope 'model': the counts of all layers follow from the lengths and from what is protected, so that the
    layers of a whole prompt need not wait for the last; `measure` then reads nothing of an observation but its layer."""
    cascades: ClassVar[bool] = False
    """For scope 'model': the first layers can divide the whole budget among themselves, each losing as others come
    (`cascade_counts`), so that the layers of a prompt, or of a chunk of one, need not wait for the last."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Observation fields that `measure` uses; see `Scorer.needs`."""

    def check(self, shape: ModelShape) -> None:
        """ValueError when this allocator does not fit a model, e.g. a table of another number of layers."""

    def layer_keep(self, layer: int, layers: int, keep: Any, length: Any) -> Any:
        """Mean entries per head of `layer`, given the budget mean `keep` and the row length; ints or arrays."""
        return keep

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """The most entries that one head can receive (host ints): the width of a Ragged page table."""
        return keep

    def total_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """The most entries that the heads of one layer keep together (host ints): the size of a page pool."""
        return keep * kv_heads

    def counts(self, scores: Array, valid: Array, keep: Array, layer: int) -> Array:
        """int32 [batch, kv_heads] entries to keep, from protected scores [batch, kv_heads, slots]."""
        n = jnp.sum(valid, axis=-1, dtype=jnp.int32)
        return jnp.minimum(keep[:, None], n)

    def decode_counts(self, scores: Array, valid: Array, limit: Array) -> Array:
        """int32 [batch, kv_heads] entries that stay when heads are compacted while decoding: their `limit`, or fewer."""
        return limit

    def measure(self, obs: Observation, scores: Array) -> Any:
        """Statistics of one layer that its allocation needs (a pytree), from the observation and the protected
        scores [batch, kv_heads, slots] of all entries; None for most allocators."""
        return None

    def layer_counts(
        self, scores: Array, valid: Array, keep: Array, layer: int, layers: int, length: Array, stats: Any
    ) -> Array:
        """For scope 'layer': `counts`, given the row lengths int32 [batch] and what `measure` returned as well."""
        return self.counts(scores, valid, keep, layer)

    def model_counts(
        self,
        scores: Sequence[Array],
        valid: Sequence[Array],
        keep: Array,
        length: Array,
        stats: Sequence[Any],
    ) -> list[Array]:
        """For scope 'model': counts of every layer, from the protected scores of all.

        scores, valid: per layer, of the best `head_capacity` entries at least. keep int32 [batch]: the budget,
        mean entries per KV head over all layers, which the counts must not exceed. stats: from `measure`.
        """
        return [self.counts(s, v, keep, i) for i, (s, v) in enumerate(zip(scores, valid))]

    def cascade_counts(
        self, fixed: Sequence[Array], held: Sequence[Array], keep: Array, layers: int, stats: Sequence[Any]
    ) -> list[Array]:
        """`model_counts` of the first layers, which share the budget of all `layers` layers.

        fixed, held: how many protected, and how many entries in all, their heads have; int32 [batch, kv_heads] each.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Uniform(Allocator):
    """The same number for every layer and head."""


class Selection:
    """Which entries survive, given scores and counts. The default keeps the best-scored single tokens."""

    reuse: int = 1
    """Layers in a row that share the scores, and so the choice, of the first of them."""

    def select(self, scores: Array, valid: Array, counts: Array, capacity: int) -> Array:
        """int32 [batch, kv_heads, capacity] slot indices in time (slot) order; `slots` marks an unused place."""
        slots = scores.shape[-1]
        k = min(capacity, slots)
        scores = jnp.where(valid, scores, -jnp.inf)
        _, index = jax.lax.top_k(scores, k)
        index = jnp.where(jnp.arange(k) < counts[..., None], index, slots)
        index = jnp.sort(index, axis=-1)
        return jnp.pad(index, ((0, 0), (0, 0), (0, capacity - k)), constant_values=slots)


@dataclasses.dataclass(frozen=True)
class Tokens(Selection):
    """Single tokens."""


@dataclasses.dataclass(frozen=True)
class Room:
    """Entries per head that may be added while decoding, beside those kept of the prompt (SCOPE).

    slots: the most. start, every: begin with `start` and add one every `every` decode steps (0: all at once).
    """

    slots: int
    start: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        if self.slots < 1 or not 0 <= self.start <= self.slots or self.every < 0:
            raise ValueError(f"decode room needs slots >= 1, 0 <= start <= slots and every >= 0, got {self}")

    def missing(self, steps: Array) -> Array:
        """How many of the slots are not open yet after `steps` (int32 [batch]) decode steps."""
        if self.every == 0:
            return jnp.zeros_like(steps)
        return jnp.maximum(self.slots - self.start - steps // self.every, 0)


PARTS = (
    "scorer",
    "allocator",
    "selection",
    "reducer",
    "codec",
    "selector",
    "placement",
    "prefill",
    "head_reads",
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A composition of parts. Build it with `kvjax.policies.parse` or the functions named after the methods.

    prefill: the key blocks that a prompt's queries read; None reads all of them.
    budget: int = mean entries per KV head per layer; float in (0, 1] = fraction of the prompt; None = all.
    sink, recent: the first `sink` positions and the newest `recent` entries are always kept.
    evict_decode: evict while decoding too, so that the cache stays at the budget.
    interval: decode steps from one eviction to the next; a head then exceeds its budget by up to `interval`.
    room: entries that generated tokens may take beside the prompt's (needs evict_decode).
    rerotate: rotate kept keys to the positions 0..K-1; the next token follows at K.
    probe: tokens that are run against the uncompressed cache, observed, and not stored; see `kvjax.probe`.
    explicit: the fields that the method sets, as opposed to defaults that another part may replace.
    """

    name: str = "full"
    scorer: Scorer | None = None
    allocator: Allocator = Uniform()
    selection: Selection = Tokens()
    reducer: Reducer = Drop()
    codec: Codec = Plain()
    selector: Any = None
    placement: Any = None
    head_reads: Any = None
    prefill: PrefillPattern | None = None
    budget: int | float | None = None
    sink: int = 0
    recent: int = 0
    evict_decode: bool = False
    interval: int = 1
    room: Room | None = None
    rerotate: bool = False
    probe: Any = None
    explicit: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        b = self.budget
        if b is not None:
            if isinstance(b, bool) or not isinstance(b, int | float):
                raise ValueError(f"{self.name}: budget must be an int or a float in (0, 1], got {b!r}")
            if isinstance(b, float) and not 0.0 < b <= 1.0:
                raise ValueError(f"{self.name}: a float budget is a fraction in (0, 1], got {b}")
            if isinstance(b, int) and b < 1:
                raise ValueError(f"{self.name}: budget must be at least 1 entry, got {b}")
        if min(self.sink, self.recent) < 0:
            raise ValueError(f"{self.name}: sink and recent cannot be negative")
        if self.evict_decode and self.scorer is not None and self.scorer.prefill_only:
            raise ValueError(
                f"{self.name}: {type(self.scorer).__name__} scores prompts only; set evict_decode=False or choose "
                "a scorer that also works while decoding, such as h2o, tova or keydiff"
            )
        if self.evict_decode and self.selector is not None:
            raise ValueError(
                f"{self.name}: {type(self.selector).__name__} chooses among entries in the order in which they were stored; "
                "it does not compose with eviction while decoding: set evict_decode=False"
            )
        if self.interval < 1:
            raise ValueError(f"{self.name}: interval must be at least 1 step, got {self.interval}")
        if self.interval > 1 and self.allocator.scope == "model":
            raise ValueError(f"{self.name}: interval > 1 needs an allocator that decides layer by layer")
        if self.rerotate and (
            self.allocator.ragged or type(self.allocator).layer_keep is not Allocator.layer_keep
        ):
            raise ValueError(
                f"{self.name}: rerotate needs the same number of entries in every layer and head, which "
                f"{type(self.allocator).__name__} does not give; set rerotate=False or use the uniform allocator"
            )
        if isinstance(b, int) and b < self.protected:
            raise ValueError(
                f"{self.name}: budget={b} is below the {self.protected} entries that are always kept "
                f"(sink={self.sink} + recent={self.recent}); raise budget or lower them"
            )

    @property
    def protected(self) -> int:
        """Entries per head that are always kept."""
        return self.sink + self.recent

    @property
    def spare(self) -> int:
        """Slots per head beyond the prompt's while decoding with eviction."""
        return self.interval + (0 if self.room is None else self.room.slots)

    @property
    def compresses(self) -> bool:
        """True when entries are removed at some point."""
        return self.scorer is not None and self.budget is not None

    @property
    def needs(self) -> frozenset[str]:
        """Observation fields that a caller must supply."""
        selector = frozenset() if self.selector is None else self.selector.needs
        if self.looks_ahead:
            selector |= {"ahead"}
        if self.scorer is None:
            return selector
        return selector | self.scorer.needs | self.allocator.needs | self.reducer.needs

    @property
    def looks_ahead(self) -> bool:
        """True when a layer's blocks are chosen with the queries that the layer before foresaw."""
        if self.selector is None:
            return False
        return self.selector.ahead or (self.placement is not None and self.placement.ahead)

    def __or__(self, other: Policy) -> Policy:
        """Compose; ValueError when both set the same part explicitly."""
        merged: dict[str, Any] = {"name": f"{self.name} | {other.name}"}
        second = "scorer" in other.explicit or (self.scorer is None and other.scorer is not None)
        lead, follow = (other, self) if second and "scorer" not in self.explicit else (self, other)
        for field in dataclasses.fields(self):
            if field.name in ("name", "explicit"):
                continue
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            in_a, in_b = field.name in self.explicit, field.name in other.explicit
            if in_a and in_b and mine != theirs:
                raise ValueError(
                    f"{self.name!r} and {other.name!r} exclude each other: both set the {field.name} "
                    f"({_short(mine)} and {_short(theirs)})"
                )
            if in_a or in_b:
                merged[field.name] = mine if in_a else theirs
            elif field.name in PARTS:
                value = getattr(lead, field.name)
                merged[field.name] = value if value != field.default else getattr(follow, field.name)
            else:  # budget, protection and decode behaviour belong to the method that scores
                merged[field.name] = getattr(lead, field.name)
        return Policy(**merged, explicit=self.explicit | other.explicit)

    def keep(self, length: int) -> int:
        """Mean entries per KV head kept of a prompt of `length` tokens (host int): max(1, int(length * budget))."""
        if self.budget is None:
            return length
        if isinstance(self.budget, float):
            return max(1, int(length * self.budget)) if length else 0
        return min(self.budget, length)

    def keep_counts(self, length: Array, longest: int) -> Array:
        """`keep` for traced row lengths: int32 [batch]; `longest` bounds them. Exact: no float arithmetic on device."""
        if isinstance(self.budget, float):
            table = np.array([self.keep(n) for n in range(longest + 1)], np.int32)
            return jnp.asarray(table)[jnp.minimum(length, longest)]
        return length if self.budget is None else jnp.minimum(self.budget, length)

    def protect(self, scores: Array, pos: Array, length: Array) -> Array:
        """Scores with sinks and recent entries lifted to `PROTECTED` and above (newest first), empty slots at -inf."""
        newest = length[:, None, None] - self.recent
        keep = ((pos < self.sink) | (pos >= newest)) & (pos >= 0)
        order = jnp.where(pos < self.sink, 4 * PROTECTED, PROTECTED) * (
            1 + jnp.minimum(pos, 2**20) * 2.0**-20
        )
        scores = jnp.where(jnp.isnan(scores), NEG, jnp.clip(scores.astype(jnp.float32), NEG, 0.5 * PROTECTED))
        return jnp.where(keep, order, jnp.where(pos >= 0, scores, -jnp.inf))


def _short(part: Any) -> str:
    return (
        part
        if isinstance(part, str)
        else repr(part)
        if isinstance(part, int | float)
        else type(part).__name__
    )


def specs_of_slot_state(
    scorer: Scorer | None, lead: tuple[int, ...], axes: tuple[str | None, ...]
) -> dict[str, ArraySpec]:
    """Array specs of a scorer's per-slot state with the leading `lead` shape and logical `axes`."""
    if scorer is None:
        return {}
    return {
        name: ArraySpec((*lead, *suffix), dtype, (*axes, *(None,) * len(suffix)))
        for name, (suffix, dtype) in scorer.slot_state().items()
    }
