"""The generator of long-context tasks: lengths, determinism, and that every answer can be found."""

import collections
import hashlib
import re

import pytest

from launch.evaluation.samples import max_new_tokens
from launch.evaluation.synthetic import (
    DEPTHS,
    RULER_TASKS,
    needle_sample,
    ruler_sample,
    tokens_of,
)


def encode(text):
    """A tokenizer that needs no file: words, numbers in threes, single marks, line ends."""
    return [hash_token(t) for t in re.findall(r"\n|[A-Za-z]{1,5}|\d{1,3}|[^\sA-Za-z\d]", text)]


def hash_token(token):
    return int.from_bytes(hashlib.sha256(token.encode()).digest()[:2], "big")


def sample(task, length=2048, seed=0, index=0):
    return ruler_sample(task, length, encode, seed, index)


def test_there_are_the_eleven_tasks_of_the_reference_data():
    assert RULER_TASKS == (
        "cwe", "fwe", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery",
        "niah_multivalue", "niah_single_1", "niah_single_2", "niah_single_3", "vt",
    )  # fmt: skip


@pytest.mark.parametrize("task", RULER_TASKS)
@pytest.mark.parametrize("length", [1024, 5000])
def test_samples_fill_the_length_and_never_exceed_it(task, length):
    for index in range(2):
        tokens = tokens_of(sample(task, length, index=index), encode)
        assert length - 80 <= tokens <= length  # one uuid needle is the longest unit


@pytest.mark.parametrize("task", RULER_TASKS)
def test_samples_are_a_function_of_seed_and_index(task):
    first = sample(task)
    assert sample(task) == first
    assert sample(task, seed=1).answers != first.answers
    assert sample(task, index=1).answers != first.answers
    assert first.max_new_tokens == max_new_tokens(task)


def test_samples_do_not_change_from_version_to_version():
    digests = "".join(sample(task, 1024, seed=3).digest() for task in RULER_TASKS)
    assert hashlib.sha256(digests.encode()).hexdigest()[:16] == "e011bac1e7882782"


def needles(text):
    return re.findall(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.", text)


@pytest.mark.parametrize(
    ("task", "asked", "values", "keys_in_text"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 1, 1, 4),
        ("niah_multiquery", 4, 1, 4),
        ("niah_multivalue", 1, 4, 1),
    ],
)
def test_needles_hold_exactly_the_answers_of_the_keys_asked_for(task, asked, values, keys_in_text):
    s = sample(task)
    found = collections.defaultdict(list)
    for key, value in needles(s.context):
        found[key].append(value)
    assert len(found) == keys_in_text
    wanted = [key for key in found if key in s.question]
    assert len(wanted) == asked
    assert sorted(v for key in wanted for v in found[key]) == sorted(s.answers)
    assert len(s.answers) == asked * values


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_has_one_line_for_the_key_asked_for(task):
    s = sample(task)
    found = needles(s.context)
    assert len(found) > 20
    assert len({key for key, _ in found}) == len(found)
    assert [value for key, value in found if key in s.question] == list(s.answers)


def test_variables_are_a_chain_from_the_value_asked_for():
    s = sample("vt")
    value = re.search(r"assigned the value (\d+) in the text above", s.question)[1]
    document = s.context.rsplit("Memorize", 1)[1]
    chain = re.findall(r"VAR (\S+) = (?:VAR )?(\S+)", document)
    assert [name for name, _ in chain] == list(s.answers)
    assert [source for _, source in chain] == [value, *s.answers[:-1]]
    assert s.context.count("they are: ") == 1  # the worked example


@pytest.mark.parametrize("length", [1024, 4096])
def test_common_words_outnumber_all_others(length):
    s = sample("cwe", length)
    listed = s.context.rsplit("Memorize the ones that appear most often.\n", 1)[1]
    counts = collections.Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", listed))
    top = counts.most_common(11)
    assert {word for word, _ in top[:10]} == set(s.answers)
    assert top[9][1] == 10 * top[10][1]
    assert ("Answer:" in s.context) == (length >= 4096)


def test_frequent_words_are_the_three_most_frequent_after_the_dots():
    s = sample("fwe")
    counts = collections.Counter(s.context.split("coded words. ")[-1].split())
    (dots, _), *words = counts.most_common(5)
    assert dots == "..."
    assert tuple(w for w, _ in words[:3]) == s.answers
    assert words[2][1] > words[3][1]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_needle_lies_at_its_depth(depth):
    s = needle_sample(depth, 2048, encode, seed=0, index=0)
    body = s.context.split("\n", 1)[1]
    at = body.index("One of the special magic")
    end = len(body) - len(re.search(r"One of the special magic.*?\.", body)[0])
    assert abs(at / end - depth) < 0.03
    assert tokens_of(s, encode) <= 2048


def test_depths_differ_only_in_the_place_of_the_needle():
    first, last = (needle_sample(d, 1024, encode, seed=0, index=0) for d in (0.0, 1.0))
    assert first.answers == last.answers
    assert first.question == last.question


@pytest.mark.parametrize("task", RULER_TASKS)
def test_a_length_that_cannot_hold_the_task_is_an_error(task):
    with pytest.raises(
        ValueError, match=rf"length 60 is too short for {task}: its shortest sample has \d+ tokens"
    ):
        sample(task, 60)


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="unknown task 'qa_1'; the tasks are cwe, fwe"):
        sample("qa_1")
