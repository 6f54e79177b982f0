"""Texts to calibrate on, all generated: plain sentences, needles with their answers, repeated random tokens."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from launch.evaluation.synthetic import ruler_sample
from launch.evaluation.text import sentences
from launch.session import Session

NEEDLE_TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
BIN = 64  # rows are padded to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Needle:
    """A prompt with its answer: tokens [n], where the answer starts, and where each needle stands."""

    tokens: list[int]
    answer: int
    needles: tuple[tuple[int, int], ...]


def padded(tokens: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions) int32 [1, length], padded on the right with position -1."""
    out, positions = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
    out[0, : len(tokens)] = tokens
    positions[0, : len(tokens)] = np.arange(len(tokens))
    return out, positions


def plain(session: Session, length: int, index: int) -> list[int]:
    """`length` tokens of generated sentences."""
    stream, text = sentences(random.Random(f"calibrate/{index}")), ""
    while len(tokens := session.begin() + session.encode(text)) < length:
        text += " ".join(next(stream) for _ in range(20)) + " "
    return tokens[:length]


def needle(session: Session, length: int, index: int) -> Needle:
    """A needle task of RULER's kind with its answer appended, at most `length` tokens."""
    task = NEEDLE_TASKS[index % len(NEEDLE_TASKS)]
    sample = ruler_sample(task, length, session.encode, seed=1, index=index)
    prompt = session.begin() + session.encode(sample.context) + session.encode(sample.question)
    answer = session.encode(" " + ", ".join(sample.answers) + ".")
    spans = []
    for value in sample.answers:
        end = sample.context.index(value) + len(value) + 1
        start = max(sample.context.rfind("One of the special", 0, end), 0)
        spans.append(tuple(len(session.begin() + session.encode(sample.context[:at])) for at in (start, end)))
    return Needle(prompt + answer, len(prompt), tuple(spans))


def repeats(session: Session, length: int, copies: int, index: int) -> list[int]:
    """`length` random tokens, `copies` times over: attention to earlier copies owes nothing to language."""
    rng = np.random.default_rng(index)
    tokens = rng.integers(16, session.model.config.vocab_size, length)
    return session.begin() + np.tile(tokens, copies).tolist()
