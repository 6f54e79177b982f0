"""The two tokenizers of the embedded checkpoint agree, and streaming never prints half a character."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import checkpoint
from models.tokenizer import HFTokenizer, SentencePieceTokenizer, StreamDecoder

DIRECTORY = checkpoint.EMBEDDED / "kvref-22m"
SPECIAL = {"bos_id": 1, "eos_ids": (2,), "pad_id": 3}
PIECES = SentencePieceTokenizer(DIRECTORY / "tokenizer.model")
HUGGING_FACE = HFTokenizer(DIRECTORY / "tokenizer.json", SPECIAL)
TOKENIZERS = {"sentencepiece": PIECES, "hugging_face": HUGGING_FACE}
TEXTS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom",
    "  two leading spaces, a tab\tand\n\nblank lines \n",
    "One of the special magic numbers for quiet-otter is: 8472913.",
    "naïve café — “quoted” … Ægir, Здравствуй, 日本語, 🦦🧪, e\u0301",
    "3d0c5f4e-9a7b-4d7e-8c1f-0a2b3c4d5e6f",
    "x",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_agree_and_round_trip(text):
    ids = PIECES.encode(text)
    assert ids == HUGGING_FACE.encode(text)
    assert ids[0] == 1
    assert PIECES.encode(text, bos=False) == ids[1:]
    assert PIECES.decode(ids) == HUGGING_FACE.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_ids(name):
    tokenizer = TOKENIZERS[name]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (8192, 1, (2,), 3)
    assert tokenizer.decode([1, *tokenizer.encode("two words", bos=False), 2, 3, 3]) == "two words"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
@settings(deadline=None, max_examples=60)
def test_streaming_equals_decoding_at_once(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streaming_holds_back_an_unfinished_character(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("a🦦", bos=False)
    assert len(ids) == 5  # a letter and four bytes
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "🦦"]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids[:3]] == ["a", "", ""]
    assert set(stream.flush()) == {"\ufffd"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streaming_after_a_prompt(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the prompt and the answer")
    stream = StreamDecoder(tokenizer, ids[:-3])
    found = "".join(stream.push(i) for i in ids[-3:]) + stream.flush()
    assert tokenizer.decode(ids[:-3]) + found == "the prompt and the answer"


def test_a_tokenizer_json_alone_is_enough(tmp_path):
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((checkpoint.EMBEDDED / "kvref-draft-2m" / file).read_bytes())
    model = checkpoint.load(tmp_path)
    assert isinstance(model.tokenizer, HFTokenizer)
    assert model.tokenizer.encode("The day") == PIECES.encode("The day")
    assert model.tokenizer.eos_ids == (2,)


@pytest.mark.parametrize(
    ("settings", "first"),
    [({}, 1), ({"add_bos_token": False}, None), ({"tokenizer_class": "Qwen2Tokenizer"}, None)],
)
def test_begin_of_text_follows_the_tokenizer_config(tmp_path, settings, first):
    for file in ("config.json", "model.safetensors", "tokenizer.model"):
        (tmp_path / file).write_bytes((checkpoint.EMBEDDED / "kvref-draft-2m" / file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids, bare = checkpoint.load(tmp_path).tokenizer.encode("The day"), PIECES.encode("The day", bos=False)
    assert ids == ([first, *bare] if first else bare)


def test_unreadable_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer\.json"):
        HFTokenizer(path)
