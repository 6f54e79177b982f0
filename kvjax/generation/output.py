"""What a row's generation ends with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Output:
    """One row's result. `finish` is 'stop' (a stop token or string), 'length', or 'error' with one line in `error`.

    The tokens of a row that failed are those before its error.
    """

    tokens: list[int]
    prompt_tokens: int
    finish: str
    error: str = ""


def collect(
    tokens: np.ndarray,
    counts: np.ndarray,
    lengths: Sequence[int],
    stop_tokens: Sequence[int],
    ended: Sequence[bool],
    errors: Mapping[int, str],
) -> list[Output]:
    """Results of all rows: tokens int [rows, room] of which counts int [rows] are valid, prompts of `lengths` tokens.

    A stop token is dropped. ended: rows that a condition on their text ended. errors: rows that failed, and why.
    """
    out = []
    for i, length in enumerate(lengths):
        row = [int(t) for t in tokens[i, : counts[i]]]
        stopped = bool(row) and row[-1] in set(stop_tokens)
        finish = "error" if i in errors else "stop" if stopped or ended[i] else "length"
        out.append(Output(row[:-1] if stopped else row, length, finish, errors.get(i, "")))
    return out
