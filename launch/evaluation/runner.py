"""Every policy on every task, batch by batch, reusing what a results store already holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from launch import cli
from launch.evaluation.results import Record, Store, key_of, row_of
from launch.evaluation.samples import Sample, string_match
from launch.evaluation.tasks import PERPLEXITY, Task, Window

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a batch cost, all rows together. read_fraction: bytes that a decode step reads, of the full cache's.

    moved_bytes, disk_bytes: what the last step moved from host memory to the device, and read from disk. errors: by
    sample, why it failed.
    """

    cache_bytes: int
    full_cache_bytes: int
    read_fraction: float
    prefill_s: float
    decode_s: float
    warm: bool  # nothing was compiled
    moved_bytes: float = 0.0
    disk_bytes: float = 0.0
    errors: dict[int, str] = dataclasses.field(default_factory=dict)


class Engine(Protocol):
    """A model that answers questions on compressed contexts."""

    def answer(self, policy: str, samples: Sequence[Sample]) -> tuple[list[str], Cost]:
        """Greedy answers, one a sample."""

    def negative_log_likelihood(self, policy: str, windows: Sequence[Window]) -> tuple[list[float], Cost]:
        """Mean over each window's targets, in nats."""


def evaluate(
    engine: Engine,
    tasks: Sequence[Task],
    policies: Sequence[str],
    store: Store,
    settings: dict[str, Any],
    *,
    batch: int,
    advance: Callable[[int], Any] = lambda samples: None,
) -> list[Row]:
    """Rows policy by policy, task by task; the results file is rewritten after each row.

    settings: everything besides policy and sample that a record depends on (model fingerprint, dtype, ...).
    advance: called with the number of samples done, for a progress bar.
    """
    rows: list[Row] = []
    for policy in policies:
        for task in tasks:
            records, errors = _records(engine, task, policy, store, settings, batch, advance)
            row = row_of(policy, task.name, task.metric, records, errors)
            if task.metric == PERPLEXITY and records:
                row["score"] = math.exp(row["score"])
            rows.append(row)
            store.write_rows(rows)
        jax.clear_caches()  # no other policy shares its programs, and a process has room for some 60 policies' only
    return rows


def _records(
    engine: Engine,
    task: Task,
    policy: str,
    store: Store,
    settings: dict[str, Any],
    batch: int,
    advance: Callable[[int], Any],
) -> tuple[list[Record], list[str]]:
    """(records, what went wrong with the samples that have none); the latter are tried again by a later run.

    A policy that refuses a batch (a budget below what it protects, say) fails its own samples only.
    """
    errors: list[str] = []
    keys = [key_of(policy=policy, task=task.name, sample=item.digest(), **settings) for item in task.items]
    missing = [(key, item) for key, item in zip(keys, task.items) if store.get(key) is None]
    advance(len(keys) - len(missing))
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        try:
            done = _score(engine, task, policy, [item for _, item in part])
        except ValueError as error:  # what this policy refuses, the next may accept
            reason = cli.explain(error)
            if reason is None:
                raise
            done = [reason] * len(part)
        store.add({key: record for (key, _), record in zip(part, done) if isinstance(record, Record)})
        errors += [record for record in done if isinstance(record, str)]
        advance(len(part))
    found = [store.get(key) for key in keys]
    return [record for record in found if record is not None], errors


def _score(engine: Engine, task: Task, policy: str, items: Sequence[Any]) -> list[Record | str]:
    """A record for every item, or why it failed."""
    if task.metric == PERPLEXITY:
        scores, cost = engine.negative_log_likelihood(policy, items)
        weights = [float(len(w.targets)) for w in items]
    else:
        texts, cost = engine.answer(policy, items)
        scores = [100.0 * string_match(text, item.answers) for text, item in zip(texts, items)]
        weights = [1.0] * len(items)
    share = 1.0 / len(items)
    return [
        cost.errors[i]
        if i in cost.errors
        else Record(
            score=score,
            weight=weight,
            cache_bytes=cost.cache_bytes * share,
            full_cache_bytes=cost.full_cache_bytes * share,
            read_fraction=cost.read_fraction,
            prefill_s=cost.prefill_s * share,
            decode_s=cost.decode_s * share,
            warm=cost.warm,
            moved_bytes=cost.moved_bytes * share,
            disk_bytes=cost.disk_bytes * share,
        )
        for i, (score, weight) in enumerate(zip(scores, weights))
    ]
