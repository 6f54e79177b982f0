"""Text to token ids and back: SentencePiece models and Hugging Face `tokenizer.json` behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

CONTEXT = 8  # prompt tokens decoded along with the first new one
REPLACEMENT = "\ufffd"  # what a decoder prints for an unfinished UTF-8 sequence


class Tokenizer(Protocol):
    """What generation and evaluation need of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`, after the begin-of-text token if `bos` and the model has one."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special tokens."""


class SentencePieceTokenizer:
    """A `tokenizer.model` file."""

    def __init__(self, path: str | Path, special: dict[str, Any] | None = None) -> None:
        """`special` overrides bos_id, eos_ids, pad_id. Raises ValueError if the file cannot be read."""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a readable SentencePiece model: {_one_line(error)}") from error
        special = special or {}
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int | None = special.get("bos_id", _present(self._model.bos_id()))
        eos = _present(self._model.eos_id())
        self.eos_ids: tuple[int, ...] = special.get("eos_ids") or (() if eos is None else (eos,))
        self.pad_id: int | None = special.get("pad_id", _present(self._model.pad_id()))

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`, after the begin-of-text token if `bos`."""
        return _with_bos(self._model.encode(text), self.bos_id if bos else None)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special tokens."""
        return self._model.decode([int(i) for i in ids if not self._model.is_control(int(i))])


class HFTokenizer:
    """A `tokenizer.json` file."""

    def __init__(self, path: str | Path, special: dict[str, Any] | None = None) -> None:
        """`special` gives bos_id, eos_ids, pad_id. Raises ValueError if the file cannot be read."""
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json: {_one_line(error)}") from error
        special = special or {}
        self.vocab_size: int = self._model.get_vocab_size()
        self.bos_id: int | None = special.get("bos_id")
        self.eos_ids: tuple[int, ...] = special.get("eos_ids") or ()
        self.pad_id: int | None = special.get("pad_id")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of `text`, after the begin-of-text token if `bos`."""
        return _with_bos(self._model.encode(text, add_special_tokens=False).ids, self.bos_id if bos else None)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special tokens."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


class StreamDecoder:
    """Turns ids that arrive one at a time into text, never printing half a character.

    Decoding all ids together must give the same text as the printed pieces joined, so pieces are cut from the
    growing text; text that ends in an unfinished byte sequence is held back until more arrives.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """`prompt`: ids that came before, so that a first token that begins with a space keeps it."""
        self._tokenizer = tokenizer
        self._ids: list[int] = list(prompt[-CONTEXT:])
        self._start = 0  # first id that is decoded again: keeps the work per token constant
        self._shown = len(self._ids)  # ids whose text was returned

    def push(self, token: int) -> str:
        """The text that `token` completes, maybe empty."""
        self._ids.append(int(token))
        return self._emit(final=False)

    def flush(self) -> str:
        """What was held back; an unfinished sequence comes out as replacement characters."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


def load_tokenizer(directory: str | Path, special: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a model directory: `tokenizer.model` if there is one, else `tokenizer.json`.

    Raises ValueError if the directory has neither.
    """
    directory = Path(directory)
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory / "tokenizer.model", special)
    if (directory / "tokenizer.json").is_file():
        return HFTokenizer(directory / "tokenizer.json", special)
    raise ValueError(f"{directory} has no tokenizer; expected tokenizer.model or tokenizer.json")


def _with_bos(ids: list[int], bos_id: int | None) -> list[int]:
    return list(ids) if bos_id is None else [bos_id, *ids]


def _present(token: int) -> int | None:
    return token if token >= 0 else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
