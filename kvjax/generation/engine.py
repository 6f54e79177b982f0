"""The jitted functions: prefill, prefill one chunk, extend, and the decode loop. Static: the model and the plan.

Every function takes the cache as data and gives it back; the loops donate it. Shapes depend only on the plan
and on bucketed lengths, so that requests of one bucket share one compilation.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from kvjax import attend, probe
from kvjax.cache import ops, placing
from kvjax.cache.plan import Plan
from kvjax.cache.prefix import Prefix
from kvjax.cache.state import KVCache
from kvjax.compress import finish
from kvjax.generation.packing import Packed
from kvjax.generation.sampling import SamplingArrays, sample
from kvjax.packed_prefill import packed_prefill, unpack
from kvjax.sharding import constrain
from kvjax.types import Array, AttendFn, ModelShape


class LanguageModel(Protocol):
    """What the loops need of a model. Hashable: it is a static argument."""

    @property
    def shape(self) -> ModelShape:
        """Layers, heads, windows, dtype."""

    def hidden(
        self, params: Any, tokens: Array, positions: Array, cache: Any, attend: AttendFn
    ) -> tuple[Array, Any]:
        """tokens, positions int32 [batch, tokens] (position -1 = padding) -> hidden [batch, tokens, embed], cache."""

    def logits(self, params: Any, hidden: Array) -> Array:
        """[..., embed] -> f32 [..., vocab]."""


@struct.dataclass
class DecodeState:
    """Carry of the decode loop; rows are independent, a finished row changes nothing any more."""

    cache: KVCache
    last: Array  # int32 [batch] token to feed next (chosen, not yet in the cache)
    tokens: Array  # int32 [batch, room] generated tokens, -1 beyond `count`
    count: Array  # int32 [batch] generated tokens
    done: Array  # bool [batch] stop token met, or limit reached
    seen: Array | None  # bool [batch, vocab] for the repetition penalty


def _last_hidden(hidden: Array, positions: Array) -> Array:
    """The hidden state of each row's last valid token, [batch, embed]."""
    index = jnp.argmax(positions, axis=1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def _with_tokens(plan: Plan, cache: KVCache, tokens: Array) -> KVCache:
    return cache.replace(token_ids=tokens) if "token_ids" in plan.policy.needs else cache


def empty(plan: Plan, prefix: Prefix | None = None) -> KVCache:
    """A cache without entries, for rows that follow `prefix`."""
    cache = ops.empty(plan)
    return cache if prefix is None else cache.replace(next_position=prefix.starts(plan.batch))


@functools.partial(jax.jit, static_argnames=("lm", "plan", "implementation"))
def prefill(
    lm: LanguageModel,
    plan: Plan,
    params: Any,
    tokens: Array,
    positions: Array,
    *,
    prefix: Prefix | None = None,
    implementation: str | None = None,
) -> tuple[Array, KVCache]:
    """Whole prompt into a new, compressed cache. Returns the last token's logits f32 [batch, vocab], cache.

    prefix: what all rows follow; their positions begin at its length.
    """
    cache = empty(plan, prefix)
    if plan.policy.probe is not None:
        hidden, cache = probe.prefill(lm, plan, params, cache, tokens, positions, implementation, fresh=True)
        return lm.logits(params, _last_hidden(hidden, positions)), cache
    cache = _with_tokens(plan, cache, tokens)
    fn = attend.prefill(plan, fresh=True, prefix=prefix, implementation=implementation)
    hidden, cache = lm.hidden(params, tokens, positions, cache, fn)
    cache = finish(plan, cache, positions)
    return lm.logits(params, _last_hidden(hidden, positions)), cache


@functools.partial(jax.jit, static_argnames=("lm", "plan", "implementation"))
def prefill_packed(
    lm: LanguageModel,
    plan: Plan,
    params: Any,
    packed: Packed,
    *,
    prefix: Prefix | None = None,
    implementation: str | None = None,
) -> tuple[Array, KVCache]:
    """`prefill` of prompts that share rows; the cache and the logits have a row each."""
    tokens, index = jnp.asarray(packed.tokens), jnp.asarray(packed.index)
    cache = _with_tokens(plan, empty(plan, prefix), unpack(tokens, index, 1))
    fn = packed_prefill(
        plan, jnp.asarray(packed.segments), index, prefix=prefix, implementation=implementation
    )
    hidden, cache = lm.hidden(params, tokens, packed.positions, cache, fn)
    cache = finish(plan, cache, jnp.where(index >= 0, unpack(packed.positions, index, 1), -1))
    last = unpack(hidden, jnp.max(index, axis=1), 1)
    return lm.logits(params, last), cache


@functools.partial(
    jax.jit,
    static_argnames=("lm", "plan", "compress", "all_logits", "implementation"),
    donate_argnames=("cache",),
)
def extend(
    lm: LanguageModel,
    plan: Plan,
    params: Any,
    cache: KVCache,
    tokens: Array,
    positions: Array,
    *,
    compress: bool,
    all_logits: bool = False,
    prefix: Prefix | None = None,
    implementation: str | None = None,
    host: placing.Host | None = None,
) -> tuple[Array, KVCache]:
    """More tokens on an existing cache: a prefill chunk (compress=True) or a question after it (False).

    Returns the last token's logits f32 [batch, vocab] of each row, or with `all_logits` those of every token
    f32 [batch, tokens, vocab], and the cache. A row without valid tokens keeps its entries. host: the part of an
    offloaded cache that is not donated (`placing.detach`); the cache that returns has its host part only if compress.
    """
    cache = placing.attach(cache, host)
    if compress and plan.policy.rerotate:
        # Callers count positions from the start of the prompt; stored keys have moved to the front.
        positions = jnp.where(positions >= 0, positions + (cache.next_position - cache.length)[:, None], -1)
    if compress and plan.policy.probe is not None:
        hidden, cache = probe.prefill(lm, plan, params, cache, tokens, positions, implementation, fresh=False)
        return lm.logits(params, hidden if all_logits else _last_hidden(hidden, positions)), cache
    cache = _with_tokens(plan, cache, tokens)
    fn = attend.prefill(plan, fresh=False, compress=compress, prefix=prefix, implementation=implementation)
    hidden, cache = lm.hidden(params, tokens, positions, cache, fn)
    cache = finish(plan, cache, positions)
    if host is not None and not compress:
        cache = placing.detach(cache)[0]
    return lm.logits(params, hidden if all_logits else _last_hidden(hidden, positions)), cache


def step(
    lm: LanguageModel,
    plan: Plan,
    params: Any,
    cache: KVCache,
    tokens: Array,
    active: Array,
    implementation: str | None = None,
    prefix: Prefix | None = None,
) -> tuple[Array, KVCache]:
    """One decode step: tokens int32 [batch] enter the cache, logits f32 [batch, vocab] come out."""
    positions = jnp.where(active, cache.next_position, -1)[:, None]
    cache = _with_tokens(plan, cache, tokens[:, None])
    fn = attend.decode(plan, prefix=prefix, implementation=implementation)
    hidden, cache = lm.hidden(params, tokens[:, None], positions, cache, fn)
    cache = finish(plan, cache, positions)
    return lm.logits(params, hidden[:, 0]), cache


@functools.partial(
    jax.jit, static_argnames=("lm", "plan", "all_logits", "implementation"), donate_argnames=("cache",)
)
def feed(
    lm: LanguageModel,
    plan: Plan,
    params: Any,
    cache: KVCache,
    tokens: Array,
    valid: Array,
    *,
    all_logits: bool = False,
    implementation: str | None = None,
    host: placing.Host | None = None,
) -> tuple[Array, KVCache]:
    """Given tokens int32 [batch, tokens], one decode step each, where `valid` (bool, likewise; first in each row).

    What `extend` does at once, with all that belongs to a step: selection and eviction. Returns the last valid token's
    logits f32 [batch, vocab] (0 in a row without any), or with `all_logits` f32 [batch, tokens, vocab], and the cache.
    host: as in `decode`.
    """

    def one(params: Any, cache: KVCache, token: Array, active: Array) -> tuple[Array, KVCache]:
        logits, cache = step(lm, plan, params, placing.attach(cache, host), token, active, implementation)
        return logits, cache if host is None else placing.detach(cache)[0]

    def body(carry: tuple[KVCache, Array], column: tuple[Array, Array]) -> tuple[tuple[KVCache, Array], Any]:
        cache, last = carry
        token, active = column
        logits, cache = one(params, cache, token, active)
        last = jnp.where(active[:, None], logits, last)
        return (cache, last), logits if all_logits else None

    vocab = jax.eval_shape(lambda p, c: one(p, c, tokens[:, 0], valid[:, 0])[0], params, cache)
    start = (cache, jnp.zeros(vocab.shape, vocab.dtype))
    (cache, last), every = jax.lax.scan(body, start, (tokens.T, valid.T))
    return (jnp.moveaxis(every, 0, 1) if all_logits else last), cache


def _emit(
    state: DecodeState, logits: Array, settings: SamplingArrays, stop: Array, limit: Array
) -> DecodeState:
    """Choose a token for every live row and record it."""
    token = sample(logits, settings, state.count, state.seen)
    rows = jnp.arange(token.shape[0])
    at = jnp.where(state.done, state.tokens.shape[1], state.count)
    tokens = state.tokens.at[rows, at].set(token, mode="drop")
    count = state.count + ~state.done
    seen = state.seen
    if seen is not None:
        seen = seen.at[rows, token].set(True)
    done = state.done | jnp.any(token[:, None] == stop[None, :], axis=1) | (count >= limit)
    return state.replace(
        last=jnp.where(state.done, state.last, token), tokens=tokens, count=count, done=done, seen=seen
    )


def _without_failed(state: DecodeState) -> DecodeState:
    """Rows whose pages could not be written or read are done: what was computed from them is no result."""
    disk = state.cache.disk
    return state if disk is None else state.replace(done=state.done | disk.failed)


@functools.partial(jax.jit, static_argnames=("room",), donate_argnames=("cache",))
def begin(
    cache: KVCache,
    logits: Array,
    settings: SamplingArrays,
    stop: Array,
    limit: Array,
    seen: Array | None,
    *,
    room: int,
) -> DecodeState:
    """The state after the first token, chosen from prefill's logits.

    stop int32 [n] (-1 = unused), limit int32 [batch].
    """
    batch = logits.shape[0]
    state = DecodeState(
        cache=cache,
        last=jnp.zeros((batch,), jnp.int32),
        tokens=jnp.full((batch, room), -1, jnp.int32),
        count=jnp.zeros((batch,), jnp.int32),
        done=limit <= 0,
        seen=seen,
    )
    return _emit(_without_failed(state), logits, settings, stop, limit)


def _decode(
    lm: LanguageModel,
    plan: Plan,
    params: Any,
    state: DecodeState,
    settings: SamplingArrays,
    stop: Array,
    limit: Array,
    steps: Array,
    *,
    prefix: Prefix | None = None,
    implementation: str | None = None,
    host: placing.Host | None = None,
) -> DecodeState:
    """Up to `steps` more tokens per row in one device loop, without a host sync; stops when all rows are done.

    host: the part of an offloaded cache that is not donated; `state.cache` is without it (`placing.detach`).
    """

    def more(carry: tuple[Array, DecodeState]) -> Array:
        i, state = carry
        return (i < steps) & ~jnp.all(state.done)

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        i, state = carry
        cache = placing.attach(state.cache, host)
        logits, cache = step(lm, plan, params, cache, state.last, ~state.done, implementation, prefix)
        if host is not None:
            cache = placing.detach(cache)[0]
        logits = constrain(logits, ("batch", "vocab"))
        return i + 1, _emit(_without_failed(state.replace(cache=cache)), logits, settings, stop, limit)

    return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


_LOOP: dict[str, Any] = dict(static_argnames=("lm", "plan", "implementation"), donate_argnames=("state",))
decode = jax.jit(_decode, **_LOOP)
# CUDA graphs with a branch for what does not depend on the rest: a fetch from host memory runs under the weights' products.
# Graphs of one kernel too, or a layer's fetch and the products before it fall into different ones.
decode_overlapping = jax.jit(
    _decode,
    **_LOOP,
    compiler_options={
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        "xla_gpu_graph_min_graph_size": 1,
    },
)


def decoder(plan: Plan) -> Any:
    """`decode`, compiled so that fetches which were foreseen overlap with the layers before them where that works (GPU)."""
    overlaps = jax.default_backend() == "gpu" and plan.policy.looks_ahead and placing.offloads(plan)
    return decode_overlapping if overlaps else decode
