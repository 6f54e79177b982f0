"""Where results are kept: rows in one JSON file, and beside it every sample, so that a run can resume."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

Key = str


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample under one policy. Bytes and seconds are this sample's share of its batch."""

    score: float
    weight: float  # what the score is averaged with: 1, or the number of tokens scored
    cache_bytes: float
    full_cache_bytes: float
    read_fraction: float
    prefill_s: float
    decode_s: float
    warm: bool  # False when the batch compiled something: its seconds are not representative
    moved_bytes: float = 0.0  # by the last step, from host memory to the device
    disk_bytes: float = 0.0  # by the last step, read from disk


def row_of(
    policy: str, task: str, metric: str, records: Sequence[Record], errors: Sequence[str] = ()
) -> dict[str, Any]:
    """One row of the results file.

    score: weighted mean of the samples' scores; n: sum of the weights. Seconds: median over the samples that
    compiled nothing, if there are any. Other figures: means. errors, of samples that failed and have no record: the row
    then has `failed`, how many, and `errors`; its figures are of the others, and None where there are none. Bytes per
    step are given where there were any.
    """
    failed = {"failed": len(errors), "errors": list(errors)} if errors else {}
    if not records and errors:
        figures = ("cache_bytes", "full_cache_bytes", "read_fraction", "prefill_s", "decode_s")
        row = {"policy": policy, "task": task, "metric": metric, "score": None, "n": 0}
        return {**row, **dict.fromkeys(figures), **failed}
    if not records:
        raise ValueError(f"{policy}, {task}: no samples")
    moved = {
        n: round(statistics.fmean(getattr(r, n) for r in records)) for n in ("moved_bytes", "disk_bytes")
    }
    weight = sum(r.weight for r in records)
    timed = [r for r in records if r.warm] or list(records)
    return {
        "policy": policy,
        "task": task,
        "metric": metric,
        "score": sum(r.score * r.weight for r in records) / weight,
        "n": round(weight),
        "cache_bytes": round(statistics.fmean(r.cache_bytes for r in records)),
        "full_cache_bytes": round(statistics.fmean(r.full_cache_bytes for r in records)),
        "read_fraction": statistics.fmean(r.read_fraction for r in records),
        "prefill_s": statistics.median(r.prefill_s for r in timed),
        "decode_s": statistics.median(r.decode_s for r in timed),
        **{f"{n}_last_step": x for n, x in moved.items() if x},
        **failed,
    }


class Store:
    """Samples already computed, by key; appended to a `.samples.jsonl` file beside the results.

    A key spells out everything that a record depends on (model fingerprint, policy, sample, settings), so a
    later run reuses what fits and computes the rest. A line cut short by an interruption is dropped.
    """

    def __init__(self, out: pathlib.Path) -> None:
        """out: the results file. ValueError names a line of the samples file that is not one of ours."""
        self.out = out
        self.samples = out.with_suffix(".samples.jsonl")
        self._records: dict[Key, Record] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.samples.exists():
            self._read()

    def _read(self) -> None:
        text = self.samples.read_text(encoding="utf-8")
        *lines, torn = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._records[entry["key"]] = Record(**entry["record"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.samples}:{number} is not a record of launch.eval; move it away to start afresh"
                ) from error
        if torn:
            replace_text(self.samples, text[: len(text) - len(torn)])

    def get(self, key: Key) -> Record | None:
        """The record of an earlier run, or None."""
        return self._records.get(key)

    def add(self, new: dict[Key, Record]) -> None:
        """Append records and force them to the disk."""
        entries = [{"key": k, "record": dataclasses.asdict(r)} for k, r in new.items()]
        with self.samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        self._records.update(new)

    def write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the results file in one step: a reader sees the old rows or the new ones."""
        replace_text(self.out, json.dumps(list(rows), indent=1) + "\n")


def key_of(**parts: Any) -> Key:
    """The key of a record: its parts as canonical JSON."""
    return json.dumps(parts, sort_keys=True)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
