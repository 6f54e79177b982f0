"""What a task asks, and how an answer is scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

MAX_NEW_TOKENS = {
    "niah_multivalue": 90,
    "niah_multiquery": 90,
    "vt": 45,
    "cwe": 100,
    "fwe": 45,
    "niah_single_3": 60,
    "niah_multikey_3": 60,
}
DEFAULT_MAX_NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question on one context. The context is what a policy compresses; the question comes after it."""

    context: str
    question: str  # with the start of the answer, so that the model completes it
    answers: tuple[str, ...]
    max_new_tokens: int
    task: str

    def digest(self) -> str:
        """16 hex digits that change with any field: the identity of the sample in a result store."""
        text = json.dumps(dataclasses.astuple(self), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def max_new_tokens(task: str) -> int:
    """Tokens that the answers of a RULER task need, as the peers allow."""
    return MAX_NEW_TOKENS.get(task, DEFAULT_MAX_NEW_TOKENS)


def string_match(text: str, answers: Sequence[str]) -> float:
    """Share of `answers` that appear in `text`, whatever the case: 0.0 to 1.0 (RULER's string match)."""
    if not answers:
        raise ValueError("a sample without answers cannot be scored")
    lowered = text.lower()
    return sum(a.lower() in lowered for a in answers) / len(answers)
