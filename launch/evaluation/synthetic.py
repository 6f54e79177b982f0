"""The project's own long-context tasks, after RULER (arXiv 2404.06654): same names, same prompt formats.

The embedded checkpoint was trained on RULER's prompt formats, so instructions, needles and questions follow
them to the letter; the haystacks are this project's own text. Every sample is a function of (seed, task,
index, length).
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence

from launch.evaluation import text
from launch.evaluation.samples import Sample, max_new_tokens

Encode = Callable[[str], Sequence[int]]
Build = Callable[[int], Sample]  # filler units -> sample; more units, more tokens

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LONG_LIST = 4096  # tokens from which `cwe` has RULER's full repetition counts and its worked example


def tokens_of(sample: Sample, encode: Encode) -> int:
    """Tokens of one sample from begin-of-text to the end of the longest answer."""
    return 1 + len(encode(sample.context)) + len(encode(sample.question)) + sample.max_new_tokens


def fit(build: Build, length: int, encode: Encode, smallest: int = 0) -> Sample:
    """The largest sample of at most `length` tokens, answer included.

    ValueError when even the smallest is longer.
    """

    def cost(units: int) -> int:
        return tokens_of(build(units), encode)

    base, step = cost(smallest), 32
    if base > length:
        raise ValueError(
            f"length {length} is too short for {build(smallest).task}: its shortest sample has {base} tokens"
        )
    per_unit = max(1.0, (cost(smallest + step) - base) / step)
    units = smallest + int((length - base) / per_unit)
    while (over := cost(units) - length) > 0:
        units = max(smallest, units - max(1, int(over / per_unit)))
    while cost(units + 1) <= length:
        units += 1
    return build(units)


def _insert(filler: list[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """`filler` with each needle put at its depth (0 = before everything, 1 = after everything)."""
    out = list(filler)
    for depth, needle in sorted(needles, reverse=True):
        out.insert(round(depth * len(filler)), needle)
    return out


def _value(rng: random.Random, kind: str) -> str:
    if kind == "number":
        return str(rng.randrange(1_000_000, 10_000_000))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _retrieval(
    task: str,
    rng: random.Random,
    *,
    kind: str = "number",
    haystack: str = "essay",
    asked: int = 1,
    values: int = 1,
    distractors: int = 0,
    depths: Sequence[float] | None = None,
) -> Build:
    """A needle task: `asked` keys with `values` values each among `distractors` other keys.

    haystack: 'essay' (sentences), 'noise' (one repeated line) or 'needles' (more keys, never asked for).
    """
    names = uuids(rng) if haystack == "needles" and kind == "uuid" else text.keys(rng)
    wanted = list(itertools.islice(names, asked))
    pairs = [(key, _value(rng, kind)) for key in wanted for _ in range(values)]
    answers = tuple(value for _, value in pairs)
    pairs += [(key, _value(rng, kind)) for key in itertools.islice(names, distractors)]
    places = [rng.random() for _ in pairs] if depths is None else list(depths)
    needles = [(place, _needle(kind, *pair)) for place, pair in zip(places, pairs)]
    filler_seed = rng.random()

    many = asked * values > 1
    listed = wanted[0] if asked == 1 else f"{', '.join(wanted[:-1])}, and {wanted[-1]}"
    opening = f"Some special magic {kind}s are" if many else f"A special magic {kind} is"
    instruction = (
        f"{opening} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind}{'s' if many else ''} afterwards.\n"
    )
    subject = f"special magic {kind}{'s' if many else ''} for {listed} mentioned in the provided text"
    question = f"\nWhat {'are all' if many else 'is'} the {subject}? The {subject} {'are' if many else 'is'}"

    def build(units: int) -> Sample:
        fill = random.Random(filler_seed)
        if haystack == "noise":
            filler = [text.NOISE] * units
        elif haystack == "needles":
            fresh = uuids(fill) if kind == "uuid" else (k for k in text.keys(fill) if k not in wanted)
            filler = [_needle(kind, key, _value(fill, kind)) for key in itertools.islice(fresh, units)]
        else:
            filler = list(itertools.islice(text.sentences(fill), units))
        glue = " " if haystack == "essay" else "\n"
        context = instruction + glue.join(_insert(filler, needles))
        return Sample(context, question, answers, max_new_tokens(task), task)

    return build


def uuids(rng: random.Random) -> Iterator[str]:
    """Endless random UUIDs."""
    while True:
        yield _value(rng, "uuid")


def _variables(task: str, rng: random.Random) -> Build:
    """Variable tracking: a chain of five assignments, after one short worked example."""

    def chain(letters: int) -> tuple[list[str], str, list[str]]:
        names: list[str] = []
        while len(names) < 5:
            name = "".join(rng.choice(string.ascii_uppercase) for _ in range(letters))
            names += [name] if name not in names else []
        value = str(rng.randrange(10_000, 100_000))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names)]
        return names, value, lines

    def document(lines: list[str], places: list[float], units: int) -> str:
        body = "\n".join(_insert([text.NOISE] * units, list(zip(sorted(places), lines))))
        opening = "Memorize and track the chain(s) of variable assignment hidden in the following text."
        return f"{opening}\n\n{body}"

    def ask(value: str) -> str:
        return (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {value}, they are: "
        )

    shown, shown_value, shown_lines = chain(3)
    example = document(shown_lines, [rng.random() for _ in shown], 15)
    example += ask(shown_value) + " " + " ".join(shown) + "\n\n"
    names, value, lines = chain(5)
    places = [rng.random() for _ in names]

    def build(units: int) -> Sample:
        context = example + document(lines, places, units)
        return Sample(context, ask(value), tuple(names), max_new_tokens(task), task)

    return build


def _common_words(task: str, rng: random.Random, length: int) -> Build:
    """Common words: ten words repeated far more often than the rest of a numbered list."""
    vocabulary = text.words(rng)
    order_seed = rng.random()
    question = "\nQuestion: What are the 10 most common words in the above list?"
    question += " Answer: The top 10 words that appear most often in the list are:"

    def numbered(common: list[str], rare: list[str], often: int, seldom: int, seed: float) -> str:
        items = common * often + rare * seldom
        random.Random(seed).shuffle(items)
        listed = " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            f"Memorize the ones that appear most often.\n{listed}"
        )

    example, often, seldom = "", 10, 1
    if length >= LONG_LIST:
        often, seldom = 30, 3
        shown, others = list(itertools.islice(vocabulary, 10)), list(itertools.islice(vocabulary, 30))
        example = numbered(shown, others, 11, 3, rng.random()) + question + " "
        example += " ".join(f"{i}. {word}" for i, word in enumerate(shown, 1)) + "\n"
    common = list(itertools.islice(vocabulary, 10))
    rare: list[str] = []

    def build(units: int) -> Sample:
        rare.extend(itertools.islice(vocabulary, max(0, units - len(rare))))
        context = example + numbered(common, rare[:units], often, seldom, order_seed)
        return Sample(context, question, tuple(common), max_new_tokens(task), task)

    return build


def _frequent_words(task: str, rng: random.Random) -> Build:
    """Frequent coded words: the k-th of them appears units / k**2 times, the first place being dots."""
    order_seed = rng.random()
    coded: list[str] = []

    def word(rank: int) -> str:
        while len(coded) <= rank:
            new = "".join(rng.choice(string.ascii_lowercase) for _ in range(6))
            coded.extend([new] if new not in coded else [])
        return coded[rank]

    def build(units: int) -> Sample:
        items = ["..."] * units
        for rank in range(2, int(units**0.5) + 1):
            items += [word(rank)] * round(units / rank**2)
        random.Random(order_seed).shuffle(items)
        context = (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(items)}"
        )
        question = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text? "
            "Answer: According to the coded text above, the three most frequently appeared words are:"
        )
        return Sample(context, question, tuple(word(r) for r in (2, 3, 4)), max_new_tokens(task), task)

    return build


_NEEDLES: dict[str, dict] = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {},
    "niah_single_3": {"kind": "uuid"},
    "niah_multikey_1": {"distractors": 3},
    "niah_multikey_2": {"haystack": "needles"},
    "niah_multikey_3": {"haystack": "needles", "kind": "uuid"},
    "niah_multiquery": {"asked": 4},
    "niah_multivalue": {"values": 4},
}
RULER_TASKS = ("cwe", "fwe", *sorted(_NEEDLES), "vt")
_SMALLEST = {"fwe": 64}  # below it the three most frequent words are not distinct


def ruler_sample(task: str, length: int, encode: Encode, seed: int, index: int) -> Sample:
    """Sample `index` of a RULER-like task, at most `length` tokens with its answer. ValueError: too short."""
    rng = random.Random(f"{seed}/{task}/{index}")
    if task == "cwe":
        build = _common_words(task, rng, length)
    elif task == "fwe":
        build = _frequent_words(task, rng)
    elif task == "vt":
        build = _variables(task, rng)
    elif task in _NEEDLES:
        build = _retrieval(task, rng, **_NEEDLES[task])
    else:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(RULER_TASKS)}")
    return fit(build, length, encode, _SMALLEST.get(task, 0))


def needle_sample(depth: float, length: int, encode: Encode, seed: int, index: int) -> Sample:
    """One number hidden `depth` of the way down an essay, 0 to 1. ValueError: too short."""
    rng = random.Random(f"{seed}/needle/{index}")
    return fit(_retrieval("needle", rng, depths=[depth]), length, encode)
