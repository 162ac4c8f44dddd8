"""Capitals in plain sentences: recalled, and contradicted by what was said before."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jaxheads.names import choose
from jaxheads.tasks.checks import count_of
from jaxheads.tasks.example import Example
from jaxheads.tasks.geography import CAPITALS

COUNTRIES = (
    "Australia", "Austria", "Belgium", "Bulgaria", "Canada", "China", "Cuba", "Denmark", "Egypt",
    "Finland", "France", "Germany", "Greece", "Hungary", "Iran", "Iraq", "Ireland", "Italy",
    "Jamaica", "Japan", "Kenya", "Norway", "Peru", "Poland", "Portugal", "Russia", "Spain",
    "Sweden", "Switzerland",
)  # fmt: skip
"""Countries that are, like their capitals, one token of common byte-pair vocabularies."""

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "capital": "The capital of {country} is",
        "city": "The capital city of {country} is",
        "name": "The name of the capital of {country} is",
    }
)
"""Prompts by name."""

BLOCKS = 6
"""Countries are dealt into this many blocks; a pair of prompts stays within one."""

_PAIRS = tuple(
    (country, other, block)
    for block in range(BLOCKS)
    for country in COUNTRIES[block::BLOCKS]
    for other in COUNTRIES[block::BLOCKS]
    if country != other
)


def capitals(count: int, *, seed: int, template: str = "all") -> list[Example]:
    """Sentences that a country's capital completes, known from training alone.

    "The capital of France is" is followed by " Paris". The corrupted prompt names another
    country, whose capital is the wrong answer.

    Args:
      count: number of examples, all different.
      seed: decides countries and, with template "all", templates.
      template: a name of `TEMPLATES`, or "all".

    Returns:
      `count` examples; `group` is the block of both countries.

    Raises:
      ValueError: an unknown template, or `count` below 1 or above the number of prompts.
    """
    chosen = choose("template", template, ["all", *TEMPLATES])
    templates = list(TEMPLATES.values()) if chosen == "all" else [TEMPLATES[chosen]]
    prompts = [(text, i) for text in templates for i in range(len(COUNTRIES))]
    count_of(count, len(prompts), "choices of template and country")
    rng = np.random.default_rng(seed)
    examples = []
    for drawn in rng.permutation(len(prompts))[:count]:
        text, i = prompts[drawn]
        country, block = COUNTRIES[i], i % BLOCKS
        others = [other for other in COUNTRIES[block::BLOCKS] if other != country]
        other = others[rng.integers(len(others))]
        examples.append(
            Example(
                prompt=text.format(country=country),
                answer=f" {CAPITALS[country]}",
                group=_group(block),
                wrong=f" {CAPITALS[other]}",
                corrupted=text.format(country=other),
            )
        )
    return examples


def contradicted_capitals(count: int, *, seed: int) -> list[Example]:
    """A false capital is stated, then asked for: what was read against what is known.

    "The capital of Poland is London. The capital of Poland is", after Yu et al. 2023. The
    answer is the city in context, the wrong answer the memorised one. In the corrupted
    prompt the sentence before is true, so both agree on the wrong answer.

    Args:
      count: number of examples, all with different pairs of country and city.
      seed: decides the pairs and their order.

    Returns:
      `count` examples; `needle` is the stated city, `group` the block of the country and
      of the stated city's country.

    Raises:
      ValueError: `count` below 1 or above the number of pairs.
    """
    count_of(count, len(_PAIRS), "pairs of country and stated capital")
    examples = []
    for drawn in np.random.default_rng(seed).permutation(len(_PAIRS))[:count]:
        country, other, block = _PAIRS[drawn]
        asked = TEMPLATES["capital"].format(country=country)
        stated, known = CAPITALS[other], CAPITALS[country]
        start = len(asked) + 1
        examples.append(
            Example(
                prompt=f"{asked} {stated}. {asked}",
                answer=f" {stated}",
                needle=(start, start + len(stated)),
                group=_group(block),
                wrong=f" {known}",
                corrupted=f"{asked} {known}. {asked}",
            )
        )
    return examples


def _group(block: int) -> str:
    return f"block-{block:02d}"
