"""Indirect object identification: who was given the thing?"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jaxheads.names import choose
from jaxheads.tasks.checks import count_of
from jaxheads.tasks.example import Example

NAMES = (
    "Mary", "John", "James", "Robert", "Michael", "David", "Sarah", "Anna", "Peter", "Paul",
    "Mark", "Tom", "Emma", "Alice",
)  # fmt: skip
_PLACES = ("store", "park", "school", "office", "garden", "station", "library", "hospital")
_OBJECTS = ("drink", "book", "ring", "letter", "ball", "gift", "pen", "key")

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "went": "When {a} and {b} went to the {place}, {s} gave a {object} to",
        "working": "While {a} and {b} were working at the {place}, {s} gave a {object} to",
        "then": "Then, {a} and {b} went to the {place}. {s} decided to give a {object} to",
    }
)
"""Prompts by name: {a} and {b} are the two people, {s} the one who is named twice.

After templates of Wang et al. 2022. Names, places and objects are each one token of
common byte-pair vocabularies, so the prompts of a template are all of one length.
"""

CORRUPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "third": "a third person acts, so neither name is singled out",
        "swap": "the indirect object acts, so the other name becomes the answer",
    }
)
"""What the second mention of the subject is replaced by in `Example.corrupted`."""


def ioi(
    count: int, *, seed: int, template: str = "all", corruption: str = "third"
) -> list[Example]:
    """Sentences with two people of whom one acts; the other must be named next.

    "When Mary and John went to the store, John gave a drink to" is followed by " Mary",
    the indirect object, and not by " John", the subject. The indirect object comes first
    (ABBA) and second (BABA) equally often, and templates take turns, within one example.

    Args:
      count: number of examples, all different.
      seed: decides names, places and objects.
      template: a name of `TEMPLATES`, or "all".
      corruption: a name of `CORRUPTIONS`.

    Returns:
      `count` examples with a wrong answer and a corrupted prompt; `needle` is the
      indirect object's mention, `group` the two people whatever their roles.

    Raises:
      ValueError: an unknown template or corruption, or `count` below 1 or above the
        number of different choices of names, place and object.
    """
    chosen = choose("template", template, ["all", *TEMPLATES])
    choose("corruption", corruption, CORRUPTIONS)
    templates = list(TEMPLATES.values()) if chosen == "all" else [TEMPLATES[chosen]]
    people = len(NAMES)
    shape = (people * (people - 1), len(_PLACES), len(_OBJECTS))
    count_of(count, int(np.prod(shape)), "choices of names, place and object")
    rng = np.random.default_rng(seed)
    drawn = rng.choice(int(np.prod(shape)), count, replace=False)
    # The third person is one of the people but two, counted past both names.
    thirds = rng.integers(people - 2, size=count)
    examples = []
    for i, (pair, place, thing) in enumerate(zip(*np.unravel_index(drawn, shape), strict=True)):
        first, second = divmod(int(pair), people - 1)
        io, subject = NAMES[first], NAMES[second + (second >= first)]
        others = [name for name in NAMES if name not in (io, subject)]
        actor = others[thirds[i]] if corruption == "third" else io
        pattern = templates[i % len(templates)]
        abba = (i // len(templates)) % 2 == 0
        words = {"place": _PLACES[place], "object": _OBJECTS[thing]}
        examples.append(_example(pattern, io, subject, actor, abba, words))
    return examples


def _example(
    pattern: str, io: str, subject: str, actor: str, abba: bool, words: Mapping[str, str]
) -> Example:
    a, b = (io, subject) if abba else (subject, io)
    prompt, corrupted = (pattern.format(a=a, b=b, s=s, **words) for s in (subject, actor))
    start = prompt.index(f" {io} ") + 1
    return Example(
        prompt=prompt,
        answer=f" {io}",
        needle=(start, start + len(io)),
        group="|".join(sorted((io, subject))),
        wrong=f" {subject}",
        corrupted=corrupted,
    )
