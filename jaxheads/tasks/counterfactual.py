"""Imagined capitals, a task for tuning heads, and real ones, to see what tuning broke."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jaxheads.names import choose
from jaxheads.tasks.checks import count_of
from jaxheads.tasks.example import Example
from jaxheads.tasks.geography import CAPITALS, CITIES

BLOCKS = 12
"""Countries and cities are dealt into this many blocks, which share neither."""

_COUNTRIES = tuple(CAPITALS)

QUESTIONS: Mapping[str, str] = MappingProxyType(
    {
        "direct": "What is the capital of {country}?",
        "paraphrase": "Which city is the seat of government of {country}?",
        "two_hop": "Which city would a visitor to the capital of {country} arrive in?",
        "two_facts": "What is the capital of {country}?",
    }
)
"""Questions by kind.

`direct` repeats the words of the imagined fact, `paraphrase` says the same in others,
`two_hop` needs the fact to find out about something else. In these three the only city
of the prompt is the answer; `two_facts` imagines the capitals of two countries, so that
the right one must be found.
"""


def counterfactual_capitals(count: int, *, seed: int, kind: str = "direct") -> list[Example]:
    """Questions that must be answered from an imagined fact, against what is true.

    The prompt is `Q: Imagine that {edited fact}. {question} A:`, the template with
    which LoFiT (Yin et al. 2024) tunes on MQuAKE. The answer is a city that is nobody's
    capital; the wrong answer is the true capital or, with two facts, the other
    country's imagined one.

    Examples of different groups share neither country nor imagined city, whatever the
    seed, so `split` leaves only unseen ones on the held-out side.

    Args:
      count: number of examples, all with different pairs of country and city.
      seed: decides the pairs and their order.
      kind: "direct", "paraphrase", "two_hop" or "two_facts"; see `QUESTIONS`.

    Returns:
      `count` examples; `needle` is the imagined city in the prompt, `group` the block.

    Raises:
      ValueError: an unknown kind, or `count` below 1 or above the number of pairs.
    """
    question = QUESTIONS[choose("kind", kind, QUESTIONS)]
    pairs = [
        (country, city, block)
        for block in range(BLOCKS)
        for country in _COUNTRIES[block::BLOCKS]
        for city in CITIES[block::BLOCKS]
    ]
    count_of(count, len(pairs), "pairs of country and imagined capital")
    rng = np.random.default_rng(seed)
    examples = []
    for index, pair in enumerate(rng.permutation(len(pairs))[:count]):
        country, city, block = pairs[pair]
        other = _other(country, city, block, rng) if kind == "two_facts" else None
        examples.append(
            _imagined(country, city, block, question, other, asked_first=index % 2 == 0)
        )
    return examples


def true_capitals(count: int, *, seed: int, kind: str = "direct") -> list[Example]:
    """The same questions with nothing imagined: the neighbouring task, to measure damage.

    Args:
      count: number of examples, all about different countries.
      seed: decides the countries and their order.
      kind: as for `counterfactual_capitals`; "two_facts" asks what "direct" asks.

    Returns:
      `count` examples `Q: {question} A:` without needle; `group` as for
      `counterfactual_capitals`.

    Raises:
      ValueError: an unknown kind, or `count` below 1 or above the number of countries.
    """
    question = QUESTIONS[choose("kind", kind, QUESTIONS)]
    count_of(count, len(_COUNTRIES), "countries")
    order = np.random.default_rng(seed).permutation(len(_COUNTRIES))[:count]
    return [
        Example(
            prompt=f"Q: {question.format(country=_named(_COUNTRIES[i]))} A:",
            answer=f" {CAPITALS[_COUNTRIES[i]]}",
            group=_group(i % BLOCKS),
        )
        for i in order
    ]


def _other(country: str, city: str, block: int, rng: np.random.Generator) -> tuple[str, str]:
    """Another country and another city of the same block, so blocks stay apart."""
    countries = [c for c in _COUNTRIES[block::BLOCKS] if c != country]
    cities = [c for c in CITIES[block::BLOCKS] if c != city]
    return countries[rng.integers(len(countries))], cities[rng.integers(len(cities))]


def _imagined(
    country: str,
    city: str,
    block: int,
    question: str,
    other: tuple[str, str] | None,
    asked_first: bool,
) -> Example:
    fact = _fact(country, city)
    facts = [fact]
    if other is not None:
        facts.insert(1 if asked_first else 0, _fact(*other))
    imagined = f"Q: Imagine that {' and that '.join(facts)}."
    end = imagined.index(fact) + len(fact)
    return Example(
        prompt=f"{imagined} {question.format(country=_named(country))} A:",
        answer=f" {city}",
        needle=(end - len(city), end),
        group=_group(block),
        wrong=f" {CAPITALS[country] if other is None else other[1]}",
    )


def _fact(country: str, city: str) -> str:
    return f"the capital of {_named(country)} is {city}"


def _named(country: str) -> str:
    """The country as it stands inside a sentence."""
    return f"the {country}" if country == "Philippines" else country


def _group(block: int) -> str:
    return f"block-{block:02d}"
