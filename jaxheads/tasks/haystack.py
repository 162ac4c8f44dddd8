"""A needle in a haystack: one odd fact in a long dull text."""

from collections.abc import Sequence

import numpy as np

from jaxheads.tasks.checks import at_least
from jaxheads.tasks.example import Example

_SUBJECTS = (
    "The farmer", "An old captain", "The young teacher", "A quiet neighbor", "The baker",
    "Her brother", "The village doctor", "A tired traveler", "The mayor", "His grandmother",
)  # fmt: skip
_ACTIONS = (
    "walked along the river", "repaired the wooden fence", "watched the clouds drift by",
    "read a letter by the fire", "carried water from the well", "waited for the evening train",
    "swept the narrow street", "picked apples in the orchard", "listened to the rain",
    "counted the boats in the bay",
)  # fmt: skip
_TIMES = (
    "before sunrise", "in the early spring", "after the market closed", "on a cold morning",
    "while the children slept", "near the end of summer", "as the bells rang",
    "during the long winter", "without saying a word", "until it grew dark",
)  # fmt: skip

# A statement that the value completes, and the question for it.
_FACTS = (
    (
        "The secret ingredient of Martha's famous soup is",
        "What is the secret ingredient of Martha's famous soup?",
    ),
    (
        "The password of the castle library is",
        "What is the password of the castle library?",
    ),
    (
        "The name of the smallest ship in the harbor museum is",
        "What is the name of the smallest ship in the harbor museum?",
    ),
)
_ADJECTIVES = (
    "amber", "silver", "golden", "purple", "copper", "green", "blue", "white", "yellow",
    "orange", "scarlet",
)  # fmt: skip
_NOUNS = (
    "lantern", "bridge", "tower", "forest", "mountain", "window", "engine", "mirror", "violin",
    "piano", "bottle", "candle", "diamond", "basket",
)  # fmt: skip


def needle(
    count: int,
    *,
    seed: int,
    sentences: int = 24,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[Example]:
    """Prompts that ask for a fact told once in a long text of template sentences.

    After the set-up of "Retrieval Head" (Wu et al. 2024): the needle stands between two
    sentences at a given depth and the prompt ends with its question form, here
    completed by the words that introduce the value. The values are an adjective and a
    noun, so the answer has the very tokens of its needle.

    Args:
      count: number of examples.
      seed: decides the text, the fact and its value.
      sentences: filler sentences; for SmolLM2 about 12 tokens each.
      depths: places of the fact as a share of the text, 0 before the first sentence
        and 1 after the last; example i has `depths[i % len(depths)]`.

    Returns:
      `count` examples; `needle` is the value in the text, `group` the value.

    Raises:
      ValueError: `count` or `sentences` below 1, no depths, or one outside [0, 1].
    """
    at_least("count", count, 1)
    at_least("sentences", sentences, 1)
    if not len(depths) or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be one or more numbers from 0 to 1, got {list(depths)}")
    rng = np.random.default_rng(seed)
    return [_example(rng, sentences, depths[i % len(depths)]) for i in range(count)]


def _example(rng: np.random.Generator, sentences: int, depth: float) -> Example:
    filler = [sentence(rng) for _ in range(sentences)]
    statement, question = _FACTS[rng.integers(len(_FACTS))]
    value = f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
    place = round(depth * sentences)
    before = " ".join([*filler[:place], statement])
    text = " ".join([f"{before} {value}.", *filler[place:]])
    prompt = (
        f"{text}\n\nBased on the content of the book, Question: {question}\nAnswer: {statement}"
    )
    start = len(before) + 1
    return Example(prompt, f" {value}", needle=(start, start + len(value)), group=value)


def sentence(rng: np.random.Generator) -> str:
    """A plain sentence that tells nothing."""
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_ACTIONS)} {rng.choice(_TIMES)}."
