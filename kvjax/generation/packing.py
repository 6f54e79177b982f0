"""Prompts as arrays: one padded row each, or several in a row, so that less of it is padding.

Prepacking (arXiv 2404.09529) lays short prompts end to end; segments and restarted positions keep them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from kvjax.generation.buckets import bucket

Array = jax.Array
Tokens = Sequence[int]


@struct.dataclass
class Packed:
    """Prompts laid end to end in rows. Positions restart with every prompt; segments keep them apart."""

    tokens: Array  # int32 [rows, width]
    positions: Array  # int32 [rows, width], -1 = padding
    segments: Array  # int32 [rows, width], the prompt's number; -1 = padding
    index: Array  # int32 [batch, prompt]: where token t of prompt b lies among rows * width; -1 = padding


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Prompts of each row: the longest first, each in the first row that has room.

    ValueError when one is longer than `capacity`.
    """
    if max(lengths) > capacity:
        raise ValueError(f"a prompt of {max(lengths)} tokens does not fit into a row of {capacity}")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(capacity)
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def packed_rows(lengths: Sequence[int], capacity: int) -> int:
    """Rows that `pack` makes: those that the prompts need, rounded up so that batches share programs."""
    return bucket(len(first_fit_decreasing(lengths, capacity)), smallest=1)


def pack(prompts: Sequence[Tokens], width: int, start: int = 0) -> Packed:
    """Prompts in rows of `width` tokens; positions begin at `start`."""
    lengths = [len(p) for p in prompts]
    rows = first_fit_decreasing(lengths, width)
    shape = (bucket(len(rows), smallest=1), width)
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    segments, index = np.full(shape, -1, np.int32), np.full((len(prompts), width), -1, np.int32)
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            part = slice(at, at + lengths[i])
            tokens[r, part] = np.asarray(prompts[i], np.int32)
            positions[r, part] = start + np.arange(lengths[i])
            segments[r, part] = i
            index[i, : lengths[i]] = r * width + at + np.arange(lengths[i])
            at += lengths[i]
    return Packed(tokens, positions, segments, index)


def pad_right(
    rows: Sequence[Tokens], width: int, starts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions) int32 [batch, width]; padding has token 0 and position -1.

    starts: int32 [batch, 1], position of each row's first token; None: 0.
    """
    tokens = np.zeros((len(rows), width), np.int32)
    positions = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = np.asarray(row, np.int32)
        positions[i, : len(row)] = np.arange(len(row)) + (0 if starts is None else starts[i])
    return tokens, positions
