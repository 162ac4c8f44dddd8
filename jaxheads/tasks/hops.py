"""Looking up over several facts: a password that is said to be another person's."""

from __future__ import annotations

import itertools

import numpy as np

from jaxheads.tasks.checks import at_least
from jaxheads.tasks.example import Example

_FIRST = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack",
    "Karen", "Leo", "Maria", "Nathan", "Olivia", "Peter", "Rachel", "Samuel", "Tina", "Victor",
)  # fmt: skip
_LAST = (
    "Adams", "Baker", "Carter", "Davis", "Evans", "Fisher", "Gray", "Harris", "Jones", "King",
    "Lewis", "Moore", "Nelson", "Parker", "Reed", "Scott", "Taylor", "Walker", "White", "Young",
)  # fmt: skip
_ADJECTIVES = (
    "amber", "silver", "golden", "purple", "copper", "green", "blue", "white", "yellow",
    "orange", "scarlet",
)  # fmt: skip
_NOUNS = (
    "lantern", "bridge", "tower", "forest", "mountain", "window", "engine", "mirror", "violin",
    "piano", "bottle", "candle", "diamond", "basket",
)  # fmt: skip
_PEOPLE = tuple(f"{first} {last}" for first, last in itertools.product(_FIRST, _LAST))
_VALUES = tuple(f"{one} {other}" for one, other in itertools.product(_ADJECTIVES, _NOUNS))


def hops(count: int, *, seed: int, chains: int = 8, hops: int = 2) -> list[Example]:
    """Prompts that ask for a password that is told over several facts.

    After variable tracking of RULER (Hsieh et al. 2024), in words: of each chain all people but the
    last have the password of the next one, and the facts of all chains are shuffled. So the answer
    is found only by following the facts, whatever their order.

    Args:
      count: number of examples.
      seed: decides everything.
      chains: passwords in the text, one of which is asked for.
      hops: facts of a chain; 1 is a plain lookup.

    Returns:
      `count` examples; `needle` is the value in the text, `wrong` that of another chain, None where
      there is one chain; `group` is the value.

    Raises:
      ValueError: a number below 1, or more people than there are names.
    """
    at_least("count", count, 1)
    at_least("chains", chains, 1)
    at_least("hops", hops, 1)
    if chains * hops > len(_PEOPLE):
        raise ValueError(
            f"{chains} chains of {hops} hops need {chains * hops} people, but there are only "
            f"{len(_PEOPLE)} names"
        )
    rng = np.random.default_rng(seed)
    return [_example(rng, chains, hops) for _ in range(count)]


def _example(rng: np.random.Generator, chains: int, hops: int) -> Example:
    people = rng.choice(_PEOPLE, (chains, hops), replace=False)
    # The value asked for is told once; others may come again in long texts.
    value, *rest = rng.permutation(_VALUES)
    values = [value, *(rest[i % len(rest)] for i in range(chains - 1))]
    facts = [
        f"{_password(one)} that of {other}."
        for chain in people
        for one, other in itertools.pairwise(chain)
    ]
    told = f"{_password(people[0, -1])} {value}."
    facts += [f"{_password(x[-1])} {y}." for x, y in zip(people[1:], values[1:], strict=True)]
    facts = [str(fact) for fact in rng.permutation([told, *facts])]
    asked = people[0, 0]
    prompt = (
        f"{' '.join(facts)}\n\nQuestion: What is the password of {asked}?\n"
        f"Answer: {_password(asked)}"
    )
    start = prompt.index(told) + len(told) - len(value) - 1
    return Example(
        prompt,
        f" {value}",
        needle=(start, start + len(value)),
        group=str(value),
        wrong=f" {values[1]}" if chains > 1 else None,
    )


def _password(person: str) -> str:
    return f"The password of {person} is"
