"""RULER files (arXiv 2404.06654): a folder of `.jsonl`; lines with `input`, `answer_prefix`, `outputs`."""

from __future__ import annotations

import json
import pathlib

from launch.evaluation.samples import Sample, max_new_tokens

QUESTION_MARKS = ("\nWhat ", "\nQuestion: ")


def split_question(text: str) -> tuple[str, str]:
    """(context, question): the question starts at the last line that begins like one.

    ValueError when no line does.
    """
    at = max(text.rfind(mark) for mark in QUESTION_MARKS)
    if at < 0:
        raise ValueError("no line starts with 'What ' or 'Question: '")
    return text[:at], text[at:]


def load_ruler(folder: str, limit: int) -> dict[str, list[Sample]]:
    """Task name -> the first `limit` samples of each file (all when `limit` is 0), tasks sorted by name.

    ValueError names a folder without files, or the line that is not a sample.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise ValueError(f"--tasks=ruler:{folder}: no such folder")
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"--tasks=ruler:{folder}: the folder holds no .jsonl files")
    return {file.stem: _load_file(file, limit) for file in files}


def _load_file(file: pathlib.Path, limit: int) -> list[Sample]:
    samples: list[Sample] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit and len(samples) == limit:
                break
            if line.strip():
                samples.append(_parse(line, f"{file}:{number}", file.stem))
    if not samples:
        raise ValueError(f"{file}: no samples")
    return samples


def _parse(line: str, where: str, task: str) -> Sample:
    try:
        record = json.loads(line)
        text, outputs = record["input"], record["outputs"]
        prefix = record.get("answer_prefix", "")
        context, question = split_question(text)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a RULER sample ({error})") from error
    except KeyError as error:
        raise ValueError(f"{where}: the field {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not (isinstance(outputs, list) and outputs and all(isinstance(o, str) for o in outputs)):
        raise ValueError(f"{where}: outputs must be a list of at least one string")
    return Sample(context, question + prefix, tuple(outputs), max_new_tokens(task), task)
