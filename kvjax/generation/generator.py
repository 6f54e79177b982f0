"""The host side of generation: batches of ragged prompts in, tokens, timings and bytes out."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvjax.cache import placing, traffic
from kvjax.cache import prefix as shared
from kvjax.cache.plan import Plan
from kvjax.cache.prefix import Prefix
from kvjax.cache.shrink import shrink
from kvjax.cache.state import KVCache
from kvjax.generation import engine, limits, staging
from kvjax.generation.buckets import bucket
from kvjax.generation.limits import apart, check_lengths, check_memory, memory_errors
from kvjax.generation.output import Output, collect
from kvjax.generation.packing import Tokens, pack, packed_rows, pad_right
from kvjax.generation.sampling import Sampling, batch_sampling
from kvjax.policies.base import Policy
from kvjax.sharding import to_host
from pallas_kernels.platform import target_platform


@dataclasses.dataclass
class Generator:
    """A model, its weights and a policy, ready to generate.

    lm: see `engine.LanguageModel`. chunk: prefill at most this many tokens at once (None: the whole prompt).
    mesh: spread over this mesh; params must already be placed. page_size: of the Ragged layout.
    memory_limit: refuse to allocate a cache of more bytes than this. packing: let short prompts share rows of a
    prefill where that saves rows; not with a chunked prefill, a prefill pattern, a probe, offload, several shared prefixes or
    a mesh, which go on unpacked. fit: after the prompt, return the pages of a Ragged cache that no head was given; None:
    where what is kept is an outcome and not a budget (corm, dms, simlayerkv, fastgen), on one device.
    """

    lm: engine.LanguageModel
    params: Any
    policy: Policy
    chunk: int | None = None
    mesh: Mesh | None = None
    page_size: int = 16
    implementation: str | None = None
    memory_limit: int | None = None
    packing: bool = False
    fit: bool | None = None

    def __post_init__(self) -> None:
        if self.policy.placement is not None and self.mesh is not None and self.mesh.size > 1:
            name, size = self.policy.name, self.mesh.size
            raise ValueError(f"{name}: offload works on one device, the mesh has {size}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"the prefill chunk must be at least 1 token, got {self.chunk}")

    def plan(self, batch: int, prompt: int, reserve: int) -> Plan:
        """The bucketed plan for `batch` rows of up to `prompt` tokens and `reserve` more."""
        with self._context():
            platform = target_platform()
        return Plan(
            policy=self.policy,
            shape=self.lm.shape,
            batch=batch,
            prompt=bucket(prompt),
            reserve=bucket(reserve) if reserve else 0,
            page_size=self.page_size,
            platform=platform,
            devices=1 if self.mesh is None else self.mesh.size,
        )

    def full_plan(self, plan: Plan) -> Plan:
        """The same shapes without compression, for comparison."""
        return dataclasses.replace(plan, policy=Policy(), pages=())

    def check(self, lengths: Sequence[int], new: int, prefix: int = 0) -> None:
        """ValueError for an empty prompt, one that does not fit the context, or a budget below what is protected.

        prefix: tokens before each prompt.
        """
        check_lengths(self.lm.shape, self.policy, lengths, new, prefix)

    def share(self, *prefixes: Tokens | Session) -> Prefix:
        """Prefill a prefix that many prompts follow; it is stored once and each decode step reads it once.

        Tokens are prefilled without compression and kept in the model's dtype. A session, whose policy may compress,
        gives what its cache holds. Several prefixes serve equal, contiguous parts of a batch. Prompts that follow a
        prefix are tokenized without a token that begins a text. ValueError on a mesh.
        """
        if self.mesh is not None:
            raise ValueError("a shared prefix is not spread over a mesh; generate without one")
        if not prefixes:
            raise ValueError("no prefix was given")
        if len(prefixes) == 1 and isinstance(prefixes[0], Session):
            session = prefixes[0]
        elif any(isinstance(p, Session) for p in prefixes):
            raise ValueError("share either one session, whose rows are the prefixes, or token sequences")
        else:
            whole = dataclasses.replace(self, policy=Policy(prefill=self.policy.prefill), packing=False)
            session = whole.prefill([list(p) for p in prefixes])  # type: ignore[arg-type]
        return shared.of_cache(session.plan, session.cache)

    def prefill(self, prompts: Sequence[Tokens], reserve: int = 0, prefix: Prefix | None = None) -> Session:
        """Run the prompts through the model into a compressed cache with room for `reserve` more tokens a row.

        prefix: from `share`; the prompts follow it, and the policy applies to their own entries only.
        """
        lengths = [len(p) for p in prompts]
        if not lengths:
            raise ValueError("no prompt was given")
        self.check(lengths, reserve, 0 if prefix is None else int(to_host(prefix.length).max()))
        plan = self.plan(len(prompts), max(lengths), reserve)
        need = check_memory(plan, self.memory_limit)
        start = time.perf_counter()
        with self._context(), memory_errors(need):
            logits, cache = self._prefill(plan, prompts, prefix)
            logits.block_until_ready()
            plan, cache, kept = shrink(plan, cache) if self._fits() else (plan, cache, ())
            cache, host = apart(plan, cache)
        seconds = time.perf_counter() - start
        session = Session(
            self, plan, cache, logits, lengths, seconds, prefix=prefix, host=host, prompt_pages=kept
        )
        limits.release_files(session, cache)
        return session

    def _fits(self) -> bool:
        if self.fit is None:
            return self.policy.compresses and self.policy.allocator.outcome and self.mesh is None
        return self.fit

    def _prefill(
        self, plan: Plan, prompts: Sequence[Tokens], prefix: Prefix | None
    ) -> tuple[jax.Array, KVCache]:
        longest = max(len(p) for p in prompts)
        starts = np.zeros((len(prompts), 1), np.int32)
        if prefix is not None:
            shared.check(plan, prefix)
            starts = to_host(prefix.starts(plan.batch))[:, None]
        options: dict[str, Any] = dict(prefix=prefix, implementation=self.implementation)
        if self.chunk is None or longest <= self.chunk:
            if self._packs(plan, prompts, prefix):
                packed = pack(prompts, plan.prompt, int(starts[0, 0]))
                return engine.prefill_packed(self.lm, plan, self.params, packed, **options)
            tokens, positions = pad_right(prompts, plan.prompt, starts)
            return engine.prefill(self.lm, plan, self.params, tokens, positions, **options)
        chunks = staging.staged(plan) or plan
        cache = jax.jit(engine.empty, static_argnums=0)(chunks, prefix)
        cache = cache.replace(expected=jnp.asarray([len(p) for p in prompts], jnp.int32))
        tokens, positions = pad_right(prompts, -(-longest // self.chunk) * self.chunk, starts)
        logits = None
        for at in range(0, tokens.shape[1], self.chunk):
            part = slice(at, at + self.chunk)
            cache, host = apart(chunks, cache)
            new, cache = engine.extend(
                self.lm,
                chunks,
                self.params,
                cache,
                tokens[:, part],
                positions[:, part],
                compress=True,
                **options,
                host=host,
            )
            ends = np.any(positions[:, part] >= 0, axis=1, keepdims=True)
            logits = new if logits is None else jnp.where(ends, new, logits)
        assert logits is not None
        if chunks is not plan:
            cache = staging.settle(self.lm, chunks, plan, self.params, cache)
        return logits, cache

    def _packs(self, plan: Plan, prompts: Sequence[Tokens], prefix: Prefix | None) -> bool:
        policy = self.policy
        if (
            not self.packing
            or self.mesh is not None
            or policy.prefill is not None
            or policy.probe is not None
        ):
            return False
        if prefix is not None and prefix.groups > 1:
            return False
        return packed_rows([len(p) for p in prompts], plan.prompt) < plan.batch

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        stop_tokens: Sequence[int] = (),
        stop: Callable[[int, list[int]], bool] | None = None,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[list[Output], Session]:
        """Prefill, then decode. See `prefill` for the prefix and `Session.decode` for the other arguments."""
        if not prompts:
            raise ValueError("no prompt was given")
        new = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if any(n < 1 for n in new):
            raise ValueError(f"max_new_tokens must be at least 1, got {min(new)}")
        session = self.prefill(prompts, max(new), prefix)
        return session.decode(new, sampling, stop_tokens, stop, on_tokens, prompts), session

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh):
                yield


@dataclasses.dataclass
class Session:
    """A filled cache that can be extended and decoded. Its buffers are donated to each call in turn."""

    generator: Generator
    plan: Plan
    cache: KVCache
    logits: jax.Array  # f32 [batch, vocab] after the last token of each row
    lengths: list[int]  # prompt tokens of each row
    prefill_s: float
    decode_s: float = 0.0
    new_tokens: int = 0
    prefix: Prefix | None = None  # not donated: other sessions read it too
    host: placing.Host | None = None  # the part of an offloaded cache that is not donated
    prompt_pages: tuple[int, ...] = ()  # of the pool of each layer, when the cache was fitted to the prompt

    def _prompt_only(self) -> Plan:
        alone = self.plan.prompt_only()
        return dataclasses.replace(alone, pages=self.prompt_pages) if self.prompt_pages else alone

    @property
    def cache_bytes(self) -> int:
        """Bytes of the compressed prompt, as allocated (room for generated tokens not counted); a shared prefix once."""
        once = 0 if self.prefix is None else self.prefix.nbytes
        return self._prompt_only().nbytes() + once

    @property
    def host_cache_bytes(self) -> int:
        """Of `cache_bytes`, those in host memory."""
        return self.plan.prompt_only().host_nbytes()

    @property
    def moved_bytes(self) -> float:
        """Bytes that the last decode step moved from host memory to the device; those read from disk are among them."""
        return traffic.moved_bytes(self.plan, self.cache)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the last call (a decode step) read from disk."""
        return traffic.disk_bytes(self.plan, self.cache)

    @property
    def disk_cache_bytes(self) -> int:
        """Of `cache_bytes`, those on disk."""
        return self.plan.prompt_only().disk_nbytes()

    @property
    def errors(self) -> dict[int, str]:
        """Rows that failed, and why in one line each."""
        return limits.row_errors(self.cache)

    @property
    def full_cache_bytes(self) -> int:
        """Bytes that the uncompressed prompt would take, with a prefix of its own in every row."""
        plan = self.generator.full_plan(self.plan).prompt_only()
        if self.prefix is not None:
            plan = dataclasses.replace(plan, prompt=plan.prompt + int(to_host(self.prefix.length).max()))
        return plan.nbytes()

    def extend(self, more: Sequence[Tokens], *, stepwise: bool = False) -> None:
        """Append tokens to every row (a question after its context). Not compressed, except that policies which
        evict while decoding stay at their budget. A row's list may be empty. stepwise: one decode step a token, so
        that a selector chooses for each of them (not with a shared prefix); at once, they attend to everything that is
        stored."""
        longest = max(len(m) for m in more)
        if longest == 0:
            return
        g = self.generator
        before = 0 if self.prefix is None else int(to_host(self.prefix.length).max())
        g.check([n + len(m) for n, m in zip(self.lengths, more)], 0, before)
        for n, m in zip(self.lengths, more):
            if n + len(m) > self.plan.prompt + self.plan.reserve:
                raise ValueError(f"{len(m)} more tokens do not fit: {self.plan.reserve} were reserved")
        tokens, positions = pad_right(more, bucket(longest))
        starts = to_host(self.cache.next_position)[:, None]
        positions = np.where(positions >= 0, positions + starts, -1)
        start = time.perf_counter()
        with g._context():
            common: dict[str, Any] = dict(implementation=g.implementation, host=self.host)
            args = (g.lm, self.plan, g.params, self.cache, tokens)
            if stepwise and self.plan.policy.selector is not None and self.prefix is None:
                new, self.cache = engine.feed(*args, positions >= 0, **common)
            else:
                new, self.cache = engine.extend(
                    *args, positions, compress=False, prefix=self.prefix, **common
                )
            has = np.asarray([len(m) > 0 for m in more])[:, None]
            self.logits = jnp.where(has, new, self.logits)
            self.logits.block_until_ready()
        self.lengths = [n + len(m) for n, m in zip(self.lengths, more)]
        self.prefill_s += time.perf_counter() - start

    def decode(
        self,
        max_new_tokens: Sequence[int],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        stop_tokens: Sequence[int] = (),
        stop: Callable[[int, list[int]], bool] | None = None,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        prompts: Sequence[Tokens] | None = None,
        every: int = 16,
    ) -> list[Output]:
        """Generate up to max_new_tokens[i] tokens for row i; consumes the session.

        stop_tokens end a row inside the device loop (the token is dropped from the output). stop(row, tokens) is
        asked every `every` tokens, for conditions on text; on_tokens(row, new) streams. Without either the whole
        generation is one device loop. One Sampling serves all rows with seeds seed, seed+1, ...; a sequence
        gives each row its own. prompts: needed for the repetition penalty only.
        """
        g, batch = self.generator, self.plan.batch
        most = np.asarray(max_new_tokens, np.int32)
        for n, new in zip(self.lengths, most):
            if new > self.plan.reserve or n + new > self.plan.prompt + self.plan.reserve:
                raise ValueError(f"{new} new tokens do not fit: {self.plan.reserve} were reserved")
        if isinstance(sampling, Sampling):
            sampling = [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(batch)]
        settings = batch_sampling(sampling)
        seen = None
        if settings.penalize:
            if prompts is None:
                raise ValueError("repetition_penalty needs the prompts' tokens")
            mask = np.zeros((batch, self.logits.shape[-1]), bool)
            for i, p in enumerate(prompts):
                mask[i, np.asarray(p)] = True
            seen = jnp.asarray(mask)
        stops = np.full((max(8, len(stop_tokens)),), -1, np.int32)
        stops[: len(stop_tokens)] = list(stop_tokens)
        room = self.plan.reserve  # not the limits: requests of one plan share one program
        streaming = stop is not None or on_tokens is not None
        start = time.perf_counter()
        shown, ended = [0] * batch, [False] * batch
        with g._context():
            state = engine.begin(self.cache, self.logits, settings, stops, most, seen, room=room)
            while True:
                if streaming:
                    self._report(state, stops, shown, ended, stop, on_tokens)
                    state = state.replace(done=state.done | np.asarray(ended))
                if to_host(state.done).all():
                    break
                steps = np.int32(every if streaming else room)
                state = engine.decoder(self.plan)(
                    g.lm,
                    self.plan,
                    g.params,
                    state,
                    settings,
                    stops,
                    most,
                    steps,
                    prefix=self.prefix,
                    implementation=g.implementation,
                    host=self.host,
                )
            state.tokens.block_until_ready()
        self.cache = state.cache
        self.decode_s = time.perf_counter() - start
        tokens, counts = to_host(state.tokens), to_host(state.count)
        self.new_tokens = int(counts.sum())
        return collect(tokens, counts, self.lengths, stop_tokens, ended, self.errors)

    def _report(
        self,
        state: engine.DecodeState,
        stops: np.ndarray,
        shown: list[int],
        ended: list[bool],
        stop: Callable[[int, list[int]], bool] | None,
        on_tokens: Callable[[int, list[int]], None] | None,
    ) -> None:
        tokens, counts = to_host(state.tokens), to_host(state.count)
        for i in range(len(shown)):
            row = [int(t) for t in tokens[i, : counts[i]]]
            if row and row[-1] in stops:
                row = row[:-1]
            if ended[i] or len(row) <= shown[i]:
                continue
            if on_tokens is not None:
                on_tokens(i, row[shown[i] :])
            shown[i] = len(row)
            if stop is not None and stop(i, row):
                ended[i] = True
