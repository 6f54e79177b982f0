"""RULER files and scores, on hand-made lines and outputs."""

import json

import pytest

from launch.evaluation.ruler import load_ruler, split_question
from launch.evaluation.samples import Sample, string_match


def line(text="some text\nWhat is it?", prefix=" It is", outputs=("42",)):
    return json.dumps({"input": text, "answer_prefix": prefix, "outputs": list(outputs), "length": 7})


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("The values are 111, 222.", ["111", "222"], 1.0),
        ("The values are 111, 2 22.", ["111", "222", "333", "444"], 0.25),
        ("ALPHA beta", ["alpha", "Beta"], 1.0),
        ("", ["x"], 0.0),
        ("1112", ["111"], 1.0),  # contained, as RULER counts
    ],
)
def test_string_match_is_the_share_of_answers_contained(text, answers, score):
    assert string_match(text, answers) == score


def test_string_match_without_answers_is_an_error():
    with pytest.raises(ValueError, match="without answers"):
        string_match("text", [])


def test_the_question_starts_at_the_last_line_that_begins_like_one():
    text = "a\nWhat is b?\nfiller\nQuestion: c\nWhat is d?"
    assert split_question(text) == ("a\nWhat is b?\nfiller\nQuestion: c", "\nWhat is d?")
    assert split_question("a\nQuestion: What is b?") == ("a", "\nQuestion: What is b?")
    with pytest.raises(ValueError, match="no line starts"):
        split_question("What is first does not count")


def test_load_ruler_reads_every_file_up_to_the_limit(tmp_path):
    (tmp_path / "vt.jsonl").write_text("\n".join(line(outputs=[str(i)]) for i in range(3)) + "\n\n")
    (tmp_path / "qa.jsonl").write_text(line() + "\n")
    (tmp_path / "notes.txt").write_text("not a task")
    found = load_ruler(str(tmp_path), 2)
    assert list(found) == ["qa", "vt"]
    assert found["qa"] == [Sample("some text", "\nWhat is it? It is", ("42",), 24, "qa")]
    assert [s.answers for s in found["vt"]] == [("0",), ("1",)]
    assert found["vt"][0].max_new_tokens == 45
    assert len(load_ruler(str(tmp_path), 0)["vt"]) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"vt.jsonl:1: not a RULER sample"),
        ("[1]", r"vt.jsonl:1: not a RULER sample"),
        (line() + "\n" + '{"input": "a\\nWhat b"}', r"vt.jsonl:2: the field 'outputs' is missing"),
        (line(text="no question here"), r"vt.jsonl:1: no line starts"),
        (line(outputs=()), r"vt.jsonl:1: outputs must be a list"),
        ("", r"vt.jsonl: no samples"),
    ],
)
def test_load_ruler_names_the_line_it_cannot_use(tmp_path, content, message):
    (tmp_path / "vt.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_ruler(str(tmp_path), 0)


def test_load_ruler_names_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_ruler(str(tmp_path / "absent"), 0)
    with pytest.raises(ValueError, match=r"no \.jsonl files"):
        load_ruler(str(tmp_path), 0)


def test_the_digest_changes_with_every_field():
    base = Sample("c", "q", ("a",), 5, "t")
    others = [
        Sample("d", "q", ("a",), 5, "t"),
        Sample("c", "r", ("a",), 5, "t"),
        Sample("c", "q", ("b",), 5, "t"),
        Sample("c", "q", ("a",), 6, "t"),
        Sample("c", "q", ("a",), 5, "u"),
    ]
    assert len({s.digest() for s in [base, *others]}) == 6
    assert base.digest() == Sample("c", "q", ("a",), 5, "t").digest()
