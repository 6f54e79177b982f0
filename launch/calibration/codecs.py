"""What codecs are calibrated on: keys, values and their importance on generated retrieval tasks and sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvjax.codecs.calibrate_capture import collect
from kvjax.codecs.calibrate_dictionary import dictionaries
from kvjax.codecs.calibrate_levels import levels
from kvjax.codecs.calibrate_precision import precision
from kvjax.codecs.calibrate_vector import vector_codes
from launch.calibration.samples import plain
from launch.evaluation.synthetic import RULER_TASKS, ruler_sample
from launch.session import Session

RATES = (0.75, 1, 2, 3, 4)  # bits per element of the codebooks for cq
KEEP = 1200  # tokens of a text that calibration looks at
METHODS = ("cq", "kvquant", "kvtuner", "csr")


def _text(session: Session, length: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [length], which of them must be predicted as before): a task with its answer, or sentences."""
    if index % 3 == 2:
        tokens = plain(session, length, index)
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


def arrays(
    method: str, session: Session, count: int, length: int, step: Callable[[int], Any]
) -> dict[str, np.ndarray]:
    """The calibration arrays of a codec `method`, from `count` texts of `length` tokens."""
    texts = [_text(session, length, i) for i in range(count)]
    samples = collect(session.lm, session.model.params, texts, min(KEEP, length // 2))
    step(count)
    if method == "cq":
        return vector_codes(samples, RATES)
    if method == "kvquant":
        return levels(samples)
    return precision(samples) if method == "kvtuner" else dictionaries(samples)
