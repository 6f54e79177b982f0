"""What a generator may ask for: lengths, memory, and the part of a cache that is not donated."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import jax

from kvjax.cache import disk, placing
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache
from kvjax.policies.base import Policy
from kvjax.types import ModelShape


def check_lengths(
    shape: ModelShape, policy: Policy, lengths: Sequence[int], new: int, prefix: int = 0
) -> None:
    """ValueError for an empty prompt, one that does not fit the context, or a budget below what is protected.

    new: tokens that may follow each prompt. prefix: tokens before each prompt.
    """
    limit = shape.max_context - prefix
    after = f" after the shared prefix of {prefix}" if prefix else ""
    for i, n in enumerate(lengths):
        if n < 1:
            raise ValueError(f"prompt {i} is empty: it has no tokens")
        if n > limit:
            raise ValueError(
                f"prompt {i} has {n} tokens, the model's context is {limit}{after}; nothing was truncated"
            )
        if n + new > limit:
            raise ValueError(
                f"prompt {i} has {n} tokens and {new} more may follow, the model's context is {limit}{after}; "
                f"ask for at most {limit - n} new tokens"
            )
        if policy.compresses and policy.keep(n) < min(policy.protected, n):
            raise ValueError(
                f"{policy.name}: the budget keeps {policy.keep(n)} of {n} entries, below the "
                f"{policy.protected} that are always kept (sink={policy.sink} + "
                f"recent={policy.recent}); raise budget or lower them"
            )


def apart(plan: Plan, cache: KVCache) -> tuple[KVCache, placing.Host | None]:
    """(the donated part of a cache, its host part as the next call reads it); all of it and None without offload."""
    if not placing.offloads(plan):
        return cache, None
    cache, host = placing.detach(cache)
    return cache, placing.readable(host)


def check_memory(plan: Plan, limit: int | None) -> int:
    """Bytes of device memory that a cache needs. MemoryError, or OSError for a disk, with the numbers when a memory is too
    small; limit: bytes of device memory that there are (None: unknown)."""
    need, far, policy = plan.device_nbytes(), plan.host_nbytes(), plan.policy.name
    if plan.on_disk:
        disk.check(plan)
    free = free_host_bytes() if far else None
    if free is not None and far > free:
        raise MemoryError(
            f"{policy}: offload needs {far:,} bytes of host memory ({plan.batch} rows of {plan.prompt} tokens), {free:,} are "
            "available"
        )
    if limit is not None and need > limit:
        raise MemoryError(
            f"the cache needs {need:,} bytes ({plan.batch} rows of {plan.prompt}+{plan.reserve} tokens, policy {policy}), "
            f"{limit:,} are available"
        )
    return need


def release_files(owner: object, cache: KVCache) -> None:
    """Close the files of a cache when `owner` is released, or at exit."""
    if cache.disk is not None:
        weakref.finalize(owner, disk.close, int(cache.disk.handle))


def row_errors(cache: KVCache) -> dict[int, str]:
    """Rows of a cache with pages on disk that failed, and why in one line each."""
    return {} if cache.disk is None else dict(disk.store(cache.disk.handle).failed)


def free_host_bytes() -> int | None:
    """Bytes of host memory that a program may still take; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@contextlib.contextmanager
def memory_errors(need: int) -> Iterator[None]:
    """Turn the runtime's out-of-memory error into a MemoryError that gives the cache's bytes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        first = str(e).splitlines()[0]
        raise MemoryError(f"out of device memory; the cache asked for {need:,} bytes ({first})") from None
