"""What codecs are calibrated on: keys, values and their importance on generated retrieval tasks and sentences."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvjax.codecs.calibrate_capture import collect
from kvjax.codecs.calibrate_dictionary import dictionaries
from kvjax.codecs.calibrate_levels import levels
from kvjax.codecs.calibrate_precision import precision
from kvjax.codecs.calibrate_vector import vector_codes
from kvjax.codecs.predict import predictors
from launch.calibration.samples import plain
from launch.evaluation.synthetic import RULER_TASKS, ruler_sample
from launch.session import Session

RATES = (0.75, 1, 2, 3, 4)  # bits per element of the codebooks for cq
KEEP = 1200  # tokens of a text that calibration looks at
METHODS = ("cq", "kvquant", "kvtuner", "csr", "aqua_kv")


def _text(
    session: Session, length: int, index: int, books: Sequence[Sequence[int]] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [length], which of them must be predicted as before): a task with its answer, or running text.

    books: tokens of texts that replace the generated sentences, each at least `length` long.
    """
    if index % 3 == 2:
        tokens = _passage(session, length, index, books)
        return np.asarray(tokens, np.int32), np.arange(length) > 0
    task = RULER_TASKS[index % len(RULER_TASKS)]
    sample = ruler_sample(task, length - 8, session.encode, seed=1, index=index)
    prompt = session.begin() + session.encode(sample.context) + session.encode(sample.question)
    answer = session.encode(" " + ", ".join(sample.answers))
    tokens = (prompt + answer)[-length:]
    wanted = np.arange(len(tokens)) >= len(tokens) - len(answer)
    # Sentences in front make all texts equally long, so that one program serves them all.
    more = plain(session, length, index)[1 : 1 + length - len(tokens)]
    tokens = tokens[:1] + more + tokens[1:]
    wanted = np.concatenate([np.zeros(len(more), bool), wanted])
    return np.asarray(tokens, np.int32), wanted


def _passage(session: Session, length: int, index: int, books: Sequence[Sequence[int]]) -> list[int]:
    """`length` tokens of a book, each call a later passage, or of generated sentences."""
    if not books:
        return plain(session, length, index)
    turn = index // 3
    book = books[turn % len(books)]
    first = session.begin()
    start = turn // len(books) * length % max(len(book) - length, 1)
    return first + list(book[start : start + length - len(first)])


def read_books(session: Session, files: Sequence[str], length: int) -> list[list[int]]:
    """Tokens of text files; ValueError names one that is missing or shorter than `length` tokens."""
    out = []
    for file in files:
        try:
            text = pathlib.Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--texts: {file}: {error.strerror}") from None
        out.append(session.encode(text))
        if len(out[-1]) < length:
            raise ValueError(f"--texts: {file} has {len(out[-1])} tokens, --length={length} are needed")
    return out


def arrays(
    method: str,
    session: Session,
    count: int,
    length: int,
    step: Callable[[int], Any],
    files: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The calibration arrays of a codec `method`, from `count` texts of `length` tokens."""
    books = read_books(session, files, length)
    texts = [_text(session, length, i, books) for i in range(count)]
    samples = collect(session.lm, session.model.params, texts, min(KEEP, length // 2))
    step(count)
    if method == "cq":
        return vector_codes(samples, RATES)
    if method == "kvquant":
        return levels(samples)
    if method == "aqua_kv":
        return predictors(samples)
    return precision(samples) if method == "kvtuner" else dictionaries(samples)
