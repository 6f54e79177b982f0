"""Heads of a model get entries by measured importance or by a role."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from kvjax.policies.allocators.shares import count, protected, split_heads, spread
from kvjax.policies.allocators.tables import check_table
from kvjax.policies.base import Allocator, Array
from kvjax.policies.head_scores import Table, check_file
from kvjax.policies.observation import Observation
from kvjax.types import ModelShape


@dataclasses.dataclass(frozen=True)
class HeadImportance(Allocator):
    """HeadKV (arXiv 2410.19258): a pool of b // beta entries a head is shared by importance, the rest equally.

    cap[l, h] = p[l, h] (b // beta) L H + (b - b // beta) plus the window, p normalised over all layers and heads
    and raised to `temp`. What exceeds the entries that a head has goes to the other heads.
    """

    scores: Table
    beta: float = 1.5
    temp: float = 1.0
    file: str = ""
    ragged: ClassVar[bool] = True
    scope: ClassVar[str] = "model"
    ahead: ClassVar[bool] = True

    def check(self, shape: ModelShape) -> None:
        """A score for every layer and KV head."""
        check_file(self.file, shape)
        check_table("head scores", self.scores, shape)

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """A head may win all it has."""
        return length

    def measure(self, obs: Observation, scores: Array) -> Array:
        """The layer's row of the table, f32 [batch, kv_heads]."""
        row = np.maximum(np.asarray(self.scores[obs.layer], np.float32), 0) ** self.temp
        return jnp.broadcast_to(jnp.asarray(row), (obs.pos.shape[0], row.size))

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        low = []
        for s in scores:
            b = jnp.maximum(keep[:, None] - count(protected(s)), 0)
            low.append(b - b * 1000 // round(self.beta * 1000))
        return split_heads(list(stats), scores, valid, keep, low)


@dataclasses.dataclass(frozen=True)
class HeadRoles(Allocator):
    """DuoAttention and RazorAttention: retrieval heads keep everything, the others sinks and a recent window.

    scores: how much of a retrieval head each (layer, KV head) is. full: the fraction of heads that keep everything;
    None derives it from the budget: as many heads as the budget allows after every head has its `streaming`
    entries, and what is left over widens the other heads' windows.
    """

    scores: Table
    streaming: int
    full: float | None = None
    file: str = ""
    ragged: ClassVar[bool] = True
    scope: ClassVar[str] = "model"
    ahead: ClassVar[bool] = True

    def check(self, shape: ModelShape) -> None:
        """A score for every layer and KV head."""
        check_file(self.file, shape)
        check_table("head scores", self.scores, shape)

    @property
    def rank(self) -> np.ndarray:
        """int32 [layers, kv_heads]: 0 is the best retrieval head of the model; ties go to the later one.

        The stable ascending sort is kvpress' tie rule as well.
        """
        flat = np.asarray(self.scores, np.float64).reshape(-1)
        rank = np.empty(flat.size, np.int32)
        rank[np.argsort(flat, kind="stable")[::-1]] = np.arange(flat.size)
        return rank.reshape(len(self.scores), -1)

    @property
    def full_heads(self) -> int | None:
        """How many heads keep everything: those of `rank` below it; None when the budget decides."""
        heads = len(self.scores) * len(self.scores[0])
        return None if self.full is None else heads - round(heads * (1 - self.full))

    def layer_keep(self, layer: int, layers: int, keep: Any, length: Any) -> Any:
        """Mean of the layer: the budget, or what the fixed roles need."""
        if self.full_heads is None:
            return keep
        heads = len(self.scores[0])
        full = int((self.rank[layer] < self.full_heads).sum())
        least = (
            min(self.streaming, length) if isinstance(length, int) else jnp.minimum(self.streaming, length)
        )
        return -(-(full * length + (heads - full) * least) // heads)

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """Retrieval heads keep everything."""
        return length

    def measure(self, obs: Observation, scores: Array) -> Array:
        """The layer's ranks, int32 [batch, kv_heads]."""
        row = jnp.asarray(self.rank[obs.layer])
        return jnp.broadcast_to(row, (obs.pos.shape[0], row.size))

    def model_counts(self, scores, valid, keep, length, stats) -> list[Array]:
        """int32 [batch, kv_heads] a layer."""
        held = jnp.concatenate([count(v) for v in valid], axis=1)
        rank = jnp.concatenate(list(stats), axis=1)
        heads = held.shape[1]
        least = jnp.minimum(self.streaming, length)
        if self.full_heads is not None:
            share = jnp.where(rank < self.full_heads, held, jnp.minimum(held, self.streaming))
        else:
            full = heads * (keep - least) // jnp.maximum(length - least, 1)
            everything = rank < jnp.clip(full, 0, heads)[:, None]
            low = jnp.where(everything, held, jnp.minimum(held, least[:, None]))
            share = spread(jnp.where(everything, 0.0, 1.0), heads * keep, low, held)
            share = jnp.where((length <= keep)[:, None], held, share)
        n = heads // len(scores)
        return [share[:, i * n : (i + 1) * n] for i in range(len(scores))]


@dataclasses.dataclass(frozen=True)
class SemanticHeads(Allocator):
    """Task-KV (arXiv 2501.15113): heads whose semantic vector is far from the layer's centre keep everything.

    With C the mean attention of the last `window` queries (mean over the query group), v_h = the sum of C V over
    the `top` entries of largest C; heads are ranked by |v_h - mean v|. Layer r of R gives all entries to the
    f(r) = beta H - (beta H - m) r / (R-1) farthest heads and the single closest one, as far as the budget leaves
    every other head its protected entries; the others share the rest equally.
    """

    beta: float = 0.25
    m: int = 1
    window: int = 32
    top: int = 256
    ragged: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """Heterogeneous heads keep everything."""
        return length

    def measure(self, obs: Observation, scores: Array) -> Array:
        """Distance from the semantic centre, f32 [batch, kv_heads]."""
        probs = obs.group(jnp.sum(obs.window_probs(self.window), axis=2))
        c = probs / jnp.maximum(jnp.minimum(obs.tokens, self.window), 1)[:, None, None]
        best = jnp.sort(c, axis=-1, descending=True)[..., min(self.top, c.shape[-1]) - 1]
        c = jnp.where(obs.valid & (c >= best[..., None]), c, 0.0)
        v = jnp.where(obs.valid[..., None], obs.v.astype(jnp.float32), 0.0)
        vector = jnp.einsum("bhs,bhsd->bhd", c, v)
        return jnp.linalg.norm(vector - jnp.mean(vector, axis=1, keepdims=True), axis=-1)

    def layer_counts(self, scores, valid, keep, layer, layers, length, stats) -> Array:
        """int32 [batch, kv_heads]."""
        held, heads = count(valid), valid.shape[1]
        least = jnp.minimum(count(protected(scores)), keep[:, None])
        wide = self.beta * heads
        far = round(wide - (wide - self.m) * layer / max(layers - 1, 1))
        order = jnp.argsort(jnp.argsort(-stats, axis=1, stable=True), axis=1)
        # Farthest first, then the closest, then the rest.
        turn = jnp.where(order == heads - 1, far, jnp.where(order >= far, order + 1, order))
        room = heads * keep - jnp.sum(least, axis=1)
        extra = jnp.maximum(length - jnp.max(least, axis=1), 1)
        allowed = jnp.minimum(min(far + 1, heads), room // extra)
        everything = turn < allowed[:, None]
        low = jnp.where(everything, held, jnp.minimum(least, held))
        return spread(jnp.where(everything, 0.0, 1.0), heads * keep, low, held)


@dataclasses.dataclass(frozen=True)
class Structure(Allocator):
    """FastGen (arXiv 2310.01801): each head takes the cheapest structure that recovers its attention.

    Structures, cheapest first: special tokens; + frequent tokens; + local window; full. rec = mean over the last
    `rows` queries of the attention on the structure's entries (mean over the query group); a head takes the first
    with rec >= threshold. special = protected sinks; frequent = the int(frequent * n) entries of largest attention
    per query that saw them among those that are left; local = the last int(local * n) before each query. The policy's
    budget is the ceiling of a layer: when its heads ask for more, they are cut in proportion.
    Punctuation, a structure of the paper, needs token ids, which attention does not see.
    """

    threshold: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    special: int = 4
    rows: int = 64
    ragged: ClassVar[bool] = True
    outcome: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"q"})

    def head_capacity(self, keep: int, length: int, kv_heads: int) -> int:
        """A head may need the full structure."""
        return length

    def profile(self, obs: Observation) -> tuple[Array, Array, Array, Array]:
        """(structure int32 [batch, kv_heads] 0..3, frequency, special, frequent [batch, kv_heads, slots])."""
        first = (obs.length - obs.tokens)[:, None, None]
        seen_by = jnp.maximum(obs.length[:, None, None] - jnp.maximum(obs.pos, first), 1)
        frequency = jnp.where(obs.valid, obs.group(obs.column_mass()) / seen_by, -1.0)
        special = obs.valid & (obs.pos < self.special)
        often = self._top(jnp.where(special, -1.0, frequency), obs)
        probs = obs.group(obs.window_probs(self.rows))
        _, q_pos = obs.last_queries(self.rows)
        n = jnp.maximum(jnp.sum(q_pos >= 0, axis=1), 1)[:, None]
        reach = self.size(self.local, obs.length)[:, None, None, None]
        near = obs.pos[:, :, None] > q_pos[:, None, :, None] - reach
        rec = []
        for chosen in (
            special[:, :, None],
            (special | often)[:, :, None],
            (special | often)[:, :, None] | near,
        ):
            rec.append(jnp.sum(jnp.where(chosen, probs, 0.0), axis=(2, 3)) / n)
        enough = jnp.stack([r >= self.threshold for r in rec] + [jnp.ones_like(rec[0], bool)])
        return jnp.argmax(enough, axis=0).astype(jnp.int32), frequency, special, often

    def size(self, share: float, length: Array) -> Array:
        """Entries that a share of the row is: int(share * length), int32 [batch]."""
        return length * round(share * 1000) // 1000

    def _top(self, x: Array, obs: Observation) -> Array:
        rank = jnp.argsort(jnp.argsort(-x, axis=-1, stable=True), axis=-1)
        return obs.valid & (rank < self.size(self.frequent, obs.length)[:, None, None]) & (x >= 0)

    def measure(self, obs: Observation, scores: Array) -> Array:
        """Entries that each head's structure holds, int32 [batch, kv_heads]."""
        structure, _, special, often = self.profile(obs)
        near = obs.valid & (obs.pos >= (obs.length - self.size(self.local, obs.length))[:, None, None])
        sizes = jnp.stack([count(x) for x in (special, special | often, special | often | near, obs.valid)])
        return jnp.take_along_axis(sizes, structure[None], axis=0)[0]

    def layer_counts(self, scores, valid, keep, layer, layers, length, stats) -> Array:
        """int32 [batch, kv_heads]."""
        held = count(valid)
        least = jnp.minimum(count(protected(scores)), keep[:, None])
        want = jnp.clip(stats, jnp.minimum(least, held), held)
        want = jnp.where((keep >= length)[:, None], held, want)
        return spread(want.astype(jnp.float32), valid.shape[1] * keep, jnp.minimum(least, want), want)
