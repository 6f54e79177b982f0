"""One token stands for everything that a head dropped (RazorAttention, arXiv 2407.15891)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.policies.base import PROTECTED, Array, Scorer, State
from kvjax.policies.observation import Observation
from kvjax.policies.reducers.nearest import gather, losers
from kvjax.policies.reducing import LOG_COUNT, Drop, Reducer
from kvjax.types import ModelShape


@dataclasses.dataclass(frozen=True)
class Counted(Scorer):
    """Another scorer, with the logarithm of the number of tokens that a slot stands for kept beside each slot.

    reducer: one whose slot state is kept as well.
    """

    inner: Scorer
    reducer: Reducer = Drop()

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The inner scorer's."""
        return self.inner.needs

    @property
    def prefill_only(self) -> bool:  # type: ignore[override]
        """The inner scorer's."""
        return self.inner.prefill_only

    @property
    def chunk_exact(self) -> bool:  # type: ignore[override]
        """False: the compensation token moves when a later chunk drops more."""
        return False

    def slot_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The inner scorer's, the reducer's, and log_count; 0 = one token."""
        return {**self.inner.slot_state(), **self.reducer.slot_state(), LOG_COUNT: ((), "float32")}

    def constants(self, layer: int, shape: ModelShape) -> dict[str, Any]:
        """The inner scorer's."""
        return self.inner.constants(layer, shape)

    def score(self, obs: Observation, state: State) -> tuple[Array, State]:
        """The inner scorer's scores."""
        mine = self.inner.slot_state()
        scores, new = self.inner.score(obs, {n: x for n, x in state.items() if n in mine})
        return scores, {**state, **new}


@dataclasses.dataclass(frozen=True)
class Compensate(Reducer):
    """A head's losers become one token: the lowest-scored unprotected survivor turns into their mean, itself included.

    k, v <- sum n_i k_i / sum n_i over that survivor and all losers, n_i = tokens that entry i stands for; it then
    stands for sum n_i tokens, and attention multiplies its exponential by that number (adds its logarithm to the
    logit). A head without losers, or without an unprotected survivor, has none. counted=False leaves the number out,
    as an open port does.
    """

    counted: bool = True
    merges: ClassVar[bool] = True

    def apply(
        self, obs: Observation, index: Array, scores: Array, state: State
    ) -> tuple[Array, Array, State | None]:
        """Survivors' keys and values, and the state with the new numbers."""
        slots = obs.pos.shape[2]
        usable, lost = index < slots, losers(obs, index)
        mine = jnp.where(usable & (gather(scores, index) < PROTECTED), gather(scores, index), jnp.inf)
        place = jnp.argmin(mine, axis=-1)
        some = jnp.any(lost, axis=-1) & jnp.any(jnp.isfinite(mine), axis=-1)
        kept = {n: gather(x, index) for n, x in state.items()}
        ours = (jnp.arange(index.shape[2]) == place[..., None]) & some[..., None]
        number = jnp.exp(state[LOG_COUNT])
        weight = jnp.where(lost, number, 0.0)
        own = jnp.take_along_axis(jnp.exp(kept[LOG_COUNT]), place[..., None], axis=-1)
        total = jnp.sum(weight, axis=-1, keepdims=True) + own
        kept[LOG_COUNT] = jnp.where(ours & self.counted, jnp.log(total), kept[LOG_COUNT])
        kept = {
            n: jnp.where(usable.reshape(*usable.shape, *(1,) * (x.ndim - 3)), x, 0) for n, x in kept.items()
        }
        out = []
        for x in (obs.k, obs.v):
            rows = gather(x, index)
            clean = jnp.where(lost[..., None], x.astype(jnp.float32), 0.0)
            added = jnp.einsum("bhs,bhsd->bhd", weight, clean, precision="highest")
            pivot = jax.vmap(jax.vmap(lambda r, p: r[p]))(rows, place).astype(jnp.float32)
            mean = (added + own * pivot) / total
            out.append(jnp.where(ours[..., None], mean[:, :, None].astype(x.dtype), rows))
        return out[0], out[1], kept
