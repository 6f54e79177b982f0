"""Scores of attention heads, written inline or read from a calibration file."""

from __future__ import annotations

import pathlib
from typing import Any

from kvjax.policies import calibration
from kvjax.types import ModelShape

Table = tuple[tuple[float, ...], ...]
SHIPPED = pathlib.Path(__file__).parents[2] / "models" / "calibration"


def locate(file: str) -> str:
    """The path of a calibration file; a name without a directory, 'kvref-22m', means the shipped `heads` file."""
    shipped = SHIPPED / file / "heads.safetensors"
    return str(shipped) if not pathlib.Path(file).is_file() and shipped.is_file() else file


def head_table(name: str, heads: Any, key: str) -> tuple[Table, str]:
    """(scores [layers][kv_heads], file) from a table, or from array `key` of a calibration file ('' if inline).

    ValueError when the file is missing or has no such array, or the table is not rectangular.
    """
    file = ""
    if isinstance(heads, str):
        file = locate(heads)
        heads = calibration.array(file, key)
    try:
        table = tuple(tuple(float(x) for x in row) for row in heads)
    except TypeError:
        table = ()
    if not table or not table[0] or len({len(row) for row in table}) != 1:
        raise ValueError(
            f"{name}: heads must be a file or a table [layers][kv_heads] of scores, got {heads!r}"
        )
    return table, file


def layer_table(name: str, values: Any, key: str) -> tuple[tuple[float, ...], str]:
    """(one number a layer, file) from a list, or from array `key` of a calibration file."""
    file = ""
    if isinstance(values, str):
        file = locate(values)
        values = calibration.array(file, key)
    try:
        return tuple(float(x) for x in values), file
    except TypeError:
        raise ValueError(f"{name}: expected a file or one number a layer, got {values!r}") from None


def check_file(file: str, shape: ModelShape) -> None:
    """ValueError when `file` was calibrated on another model; '' is inline and passes."""
    if file:
        calibration.load(file, calibration.fingerprint(shape))
