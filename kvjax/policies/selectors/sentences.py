"""Sentences as units (SentenceKV)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from kvjax.arrays import ArraySpec
from kvjax.policies.selectors.base import ALWAYS, Call, Entries, Index, Selector, index_axes, over_group
from kvjax.policies.selectors.grouping import by_label, group_sums, heads_map, label_spec, put_labels
from kvjax.types import ModelShape

Array = jax.Array
_FAR = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sentences(Selector):
    """Sentences by mean query . mean key, whole ones in order, the last one cut at the budget (SentenceKV).

    The mean query runs over the queries of the sentence that is being written, per query head. Index, S sentences:
    starts int32 [batch, S] (position of their first token, ascending), keys [batch, kv_heads, S, head_dim] (mean of the
    stored keys), sizes int32 [batch, kv_heads, S], labels [batch, kv_heads, slots], opened int32 [batch] (position at
    which the current sentence begins), query f32 [batch, q_heads, head_dim] and queries int32 [batch] (sum and number of
    its queries), closed bool [batch] (the newest token ends it).

    stops: token ids that end a sentence. room: tokens of a sentence for which the index has room, on average; what is
    beyond belongs to the last sentence. Of a sentence with one token, all entries count alike.
    """

    stops: tuple[int, ...] = ()
    room: int = 8
    over: str = "max"
    needs: ClassVar[frozenset[str]] = frozenset({"token_ids"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stops or self.room < 1:
            raise ValueError(f"{type(self).__name__}: needs token ids that end a sentence, and room >= 1")

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        s, lead = max(2, slots // self.room), (batch, shape.kv_heads)
        row = ArraySpec((batch,), "int32", ("batch",))
        return {
            "starts": ArraySpec((batch, s), "int32", ("batch", None), fill=_FAR),
            "keys": ArraySpec((*lead, s, shape.head_dim), shape.dtype, index_axes(1)),
            "sizes": ArraySpec((*lead, s), "int32", index_axes(0)),
            "labels": label_spec(batch, slots, shape, s),
            "opened": row,
            "query": ArraySpec((batch, shape.q_heads, shape.head_dim), "float32", ("batch", "q_heads", None)),
            "queries": row,
            "closed": ArraySpec((batch,), "bool", ("batch",), fill=1),
        }

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """All sentences anew; their starts in earlier chunks are known already."""
        if previous:
            kept = {n: previous[n] for n in ("starts", "opened", "query", "queries", "closed")}
            index = {**index, **kept}
        return self._add(self._read(index, call), entries)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """New tokens continue the current sentence, or begin the next after a stop token."""
        return self._add(self._read(index, call), entries)

    def _read(self, index: Index, call: Call) -> Index:
        """Sentence starts and the running query after this call's tokens."""
        valid = call.q_pos >= 0
        stop = jnp.isin(call.token_ids, jnp.asarray(self.stops)) & valid
        # Padding may stand before or behind the tokens: look at the nearest token to the left.
        place = jnp.arange(valid.shape[1])
        last = jax.lax.cummax(jnp.where(valid, place, -1), axis=1)
        left = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
        found = jnp.take_along_axis(stop, jnp.maximum(left, 0), axis=1)
        before = jnp.where(left < 0, index["closed"][:, None], found)
        begins = before & valid
        known = jnp.sum(index["starts"] < _FAR, axis=1, keepdims=True)
        number = known + jnp.cumsum(begins, axis=1) - 1
        size = index["starts"].shape[1]
        at = jnp.where(begins & (number < size), number, size)
        starts = jax.vmap(lambda a, i, x: a.at[i].set(x, mode="drop"))(index["starts"], at, call.q_pos)
        opened = jnp.maximum(index["opened"], jnp.max(jnp.where(begins, call.q_pos, -1), axis=1))
        here = (call.q_pos >= opened[:, None]) & valid
        total = jnp.einsum("bhtd,bt->bhd", call.q.astype(jnp.float32), here.astype(jnp.float32))
        fresh = jnp.any(begins, axis=1)
        some = jnp.any(valid, axis=1)
        newest = jnp.take_along_axis(stop, jnp.argmax(call.q_pos, axis=1)[:, None], axis=1)[:, 0]
        return {
            **index,
            "starts": starts,
            "opened": opened,
            "query": jnp.where(fresh[:, None, None], total, index["query"] + total),
            "queries": jnp.where(fresh, 0, index["queries"]) + jnp.sum(here, axis=1, dtype=jnp.int32),
            "closed": jnp.where(some, newest, index["closed"]),
        }

    def _add(self, index: Index, entries: Entries) -> Index:
        """Entries to the mean keys of their sentences."""
        s = index["keys"].shape[2]
        find = jax.vmap(lambda starts, pos: jnp.searchsorted(starts, pos, side="right") - 1)
        valid = (entries.slots >= 0) & (entries.pos >= 0)
        labels = jnp.where(valid, jnp.maximum(find(index["starts"], entries.pos), 0), -1)
        sums, new = heads_map(lambda x, n: group_sums(x, n, s))(entries.k, labels)
        sizes = index["sizes"] + new
        old = index["keys"].astype(jnp.float32)
        keys = old + (sums - old * new[..., None]) / jnp.maximum(sizes, 1)[..., None]
        return {
            **index,
            "keys": keys.astype(index["keys"].dtype),
            "sizes": sizes,
            "labels": put_labels(index["labels"], jnp.where(valid, entries.slots, -1), labels),
        }

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """Mean query . mean key of every slot's sentence; the current sentence is read first."""
        b, h, d = index["query"].shape
        q = index["query"] / jnp.maximum(index["queries"], 1)[:, None, None]
        q = q.reshape(b, -1, call.groups, d)
        keys = index["keys"].astype(jnp.float32)
        scores = over_group(jnp.einsum("bhgd,bhsd->bhgs", q, keys, precision="highest"), self.over)
        scores = jnp.where((index["queries"] > 1)[:, None, None], scores, 0.0)
        current = index["starts"] >= index["opened"][:, None]
        scores = jnp.where(current[:, None] & (index["sizes"] > 0), ALWAYS, scores)
        return by_label(scores, index["labels"]), index
