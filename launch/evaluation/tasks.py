"""What `--tasks` names: RULER files, synthetic RULER, needles, perplexity of a text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

from launch.evaluation.ruler import load_ruler
from launch.evaluation.samples import Sample
from launch.evaluation.synthetic import DEPTHS, RULER_TASKS, needle_sample, ruler_sample

KINDS = ("ruler:DIR", "ruler_synthetic:LENGTH", "needle:LENGTH", "ppl:FILE")
DEFAULT_SAMPLES = 8  # of generated tasks, which have no end of their own
STRING_MATCH = "string_match"  # mean share of answers found, in percent
PERPLEXITY = "perplexity"  # exp of the mean negative log-likelihood, per token


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of text: `context` is compressed, then `targets` are predicted one after the other."""

    context: tuple[int, ...]
    targets: tuple[int, ...]

    def digest(self) -> str:
        """16 hex digits that change with any token."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of results per policy."""

    name: str
    metric: str
    items: tuple[Sample, ...] | tuple[Window, ...]
    note: str = ""  # what of the source is not scored


@dataclasses.dataclass(frozen=True)
class Source:
    """How tasks are made: the limit (0 = all), the seed of generated ones, perplexity windows in tokens."""

    encode: Callable[[str], Sequence[int]]  # without begin-of-text
    limit: int = 0
    seed: int = 0
    ppl_context: int = 1024
    ppl_targets: int = 1024

    @property
    def count(self) -> int:
        """Samples of a generated task."""
        return self.limit or DEFAULT_SAMPLES


def parse_tasks(text: str, source: Source) -> list[Task]:
    """Tasks of a comma-separated list such as 'ruler:DIR,ppl:FILE'. ValueError names what it cannot use."""
    tasks: list[Task] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        kind, _, argument = part.partition(":")
        makers = {"ruler": _ruler, "ruler_synthetic": _synthetic, "needle": _needle, "ppl": _perplexity}
        if kind not in makers or not argument:
            raise ValueError(f"--tasks: {part!r} is not a task; tasks are {', '.join(KINDS)}")
        tasks += makers[kind](part, argument, source)
    if not tasks:
        raise ValueError(f"--tasks is empty; tasks are {', '.join(KINDS)}")
    names = [t.name for t in tasks]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"--tasks: two tasks are called {twice[0]!r}")
    return tasks


def _ruler(part: str, folder: str, source: Source) -> list[Task]:
    found = load_ruler(folder, source.limit)
    return [Task(name, STRING_MATCH, tuple(samples)) for name, samples in found.items()]


def _length(part: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--tasks: {part!r} needs a length in tokens, such as 4096")
    return int(text)


def _synthetic(part: str, text: str, source: Source) -> list[Task]:
    length = _length(part, text)
    return [
        Task(
            f"{part}/{name}",
            STRING_MATCH,
            tuple(
                ruler_sample(name, length, source.encode, source.seed, index) for index in range(source.count)
            ),
        )
        for name in RULER_TASKS
    ]


def _needle(part: str, text: str, source: Source) -> list[Task]:
    length = _length(part, text)
    return [
        Task(
            f"{part}/depth_{depth:.0%}",
            STRING_MATCH,
            tuple(needle_sample(depth, length, source.encode, source.seed, i) for i in range(source.count)),
        )
        for depth in DEPTHS
    ]


def _perplexity(part: str, file: str, source: Source) -> list[Task]:
    try:
        tokens = list(source.encode(pathlib.Path(file).read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    every = windows(tokens, source.ppl_context, source.ppl_targets)
    used = every[: source.limit] if source.limit else every
    scored = sum(len(w.targets) for w in used)
    note = f"{part}: {scored} of {len(tokens)} tokens scored; the first {source.ppl_context} are context only"
    if len(used) < len(every):
        note += f", and --limit takes {len(used)} of {len(every)} windows"
    return [Task(part, PERPLEXITY, tuple(used), note)]


def windows(tokens: Sequence[int], context: int, targets: int) -> list[Window]:
    """Overlapping windows that score every token after the first `context` exactly once.

    The last window may have fewer targets. ValueError when no token is left to score.
    """
    if context < 1 or targets < 1:
        raise ValueError(
            f"a window needs at least 1 token of context and 1 target, got {context} and {targets}"
        )
    if len(tokens) <= context:
        raise ValueError(f"the text has {len(tokens)} tokens: none follows the first {context} of context")
    starts = range(0, len(tokens) - context, targets)
    return [
        Window(tuple(tokens[s : s + context]), tuple(tokens[s + context : s + context + targets]))
        for s in starts
    ]
