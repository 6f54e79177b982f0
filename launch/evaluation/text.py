"""Words and running text for synthetic tasks: made here, so that no book and no download is needed."""

from __future__ import annotations

import random
from collections.abc import Iterator


def _listed(block: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in block.split(separator))


ADJECTIVES = _listed("""
amber ancient autumn bitter blank bold brave bright brisk broad calm careful cheap chilly clean
clever cloudy coarse cold copper crisp crooked curious curly damp dark deep dim distant double dry
dull dusty eager early easy empty faint fair famous fast fierce final firm flat fond foreign fresh
gentle giant glad golden grand gray green hasty heavy hidden hollow honest humble icy idle inner
jolly keen large late lazy level light little lively local lonely long loose loud lucky marble
mellow merry mild misty modest narrow neat noble northern odd olive open pale patient plain polite
proud purple quaint quick quiet rapid rare ready rough round royal rural rusty scarlet secret sharp
shiny short silent silver simple slender slow small smooth soft solid southern spare steady steep
stern still stout strange strong sudden sunny sweet swift tall tame thick thin tidy tiny upper urban
vast vivid warm weary western wide wild wise wooden young
""")

NOUNS = _listed("""
acorn anchor apple apron arrow attic badge bakery ballad banner barley barrel basin basket beacon
bell bench berry bishop blanket boat bottle bridge brook broom bucket button cabin cable camel
candle canvas captain carpet cart castle cedar cellar chapel cherry chimney clerk cliff clock cloth
coach coin collar comet corner cottage cotton cradle crane cricket crown curtain dairy dancer desk
doctor donkey door dove drawer drum eagle engine falcon farmer feather fence ferry fiddle field flag
flute forest fossil fountain garden gate glacier glove goose granite grape hammer harbor harvest hat
hedge helmet heron hill hinge horse hotel island jacket jar jewel journal kettle key kitchen ladder
lantern lemon letter library lily lion mantle maple market meadow mill mirror monk moth mountain
museum needle nest oak ocean office onion orchard otter oven owl paddle painter palace parcel parrot
path pearl pebble pepper piano pigeon pillow planet plough pocket pond portrait prairie puzzle
quarry quilt rabbit raven ribbon river robin rooster rope saddle sailor scarf school shadow shepherd
ship shovel signal sleeve spoon spring stable station stove stream street sugar tailor temple
thimble thunder ticket tower train trumpet tunnel turtle valley velvet village violin wagon walnut
weaver well wheel willow window winter wolf yard
""")

VERBS = _listed("""
admired avoided borrowed carried chased cleaned copied counted covered crossed described drew
examined fetched followed forgot found guarded held ignored kept lifted lost measured mended moved
noticed offered opened painted passed praised reached recalled repaired sold studied surrounded
visited washed watched
""")

PLACES = _listed(
    """
along the shore; at the end of the street; before the first snow; behind the mill; beyond the hills;
by the old gate; during the long summer; for a small fee; from the upper window; in the rain; in the
early morning; near the harbor; on the way to the fair; on market day; under the bridge; until the
lamps were lit; with great care; without a word
""",
    separator=";",
)

FRAMES = (
    "The {a} {n} {v} the {m} {p}.",
    "A {a} {n} {v} one {b} {m} {p}.",
    "Everyone said that the {n} {v} the {b} {m}, and nobody asked why.",
    "When the {n} {v} a {m}, the {a} {o} was already there.",
    "It was a {a} day, and the {n} {v} the {b} {m} {p}.",
    "Nobody knew how the {a} {n} had {v} so many a {m} {p}.",
    "My aunt {v} the {n}, my uncle {w} the {m}, and I slept.",
    "After that the {n} and the {b} {m} {v} each {o} {p}.",
    "If the {a} {n} {v} the {m}, then the {o} must have {w} it too.",
    "There are two kinds of {n}: the {a} and the {b}.",
)

NOISE = "The hill is steep. The lake is calm. The wind is mild. On we walk. Out and home once more."


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless plain sentences; equal generators give equal text."""
    while True:
        yield rng.choice(FRAMES).format(
            a=rng.choice(ADJECTIVES),
            b=rng.choice(ADJECTIVES),
            n=rng.choice(NOUNS),
            m=rng.choice(NOUNS),
            o=rng.choice(NOUNS),
            v=rng.choice(VERBS),
            w=rng.choice(VERBS),
            p=rng.choice(PLACES),
        )


def keys(rng: random.Random) -> Iterator[str]:
    """Every adjective-noun pair once, in random order."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    for index in rng.sample(range(pairs), pairs):
        yield f"{ADJECTIVES[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}"
    raise ValueError(f"the text is too long: it would need more than {pairs} different keys")


def words(rng: random.Random) -> Iterator[str]:
    """Single words without repetition, in random order, then two-word names."""
    single = sorted({*ADJECTIVES, *NOUNS})
    rng.shuffle(single)
    yield from single
    for key in keys(rng):
        yield key.replace("-", " ")
