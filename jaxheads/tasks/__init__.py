"""Tasks: seeded generators of examples with known answers, found by name."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxheads.names import choose, unknown
from jaxheads.tasks.arithmetic import arithmetic
from jaxheads.tasks.capitals import capitals, contradicted_capitals
from jaxheads.tasks.colored_objects import colored_objects
from jaxheads.tasks.counterfactual import counterfactual_capitals, true_capitals
from jaxheads.tasks.example import Encoded, Example, Tokenizer, contrast, encode, split
from jaxheads.tasks.greater_than import greater_than
from jaxheads.tasks.haystack import needle
from jaxheads.tasks.hops import hops
from jaxheads.tasks.ioi import ioi
from jaxheads.tasks.lookup import lookup
from jaxheads.tasks.pairs import Pairs, encode_pairs, same_length, single_token
from jaxheads.tasks.passkeys import passkeys
from jaxheads.tasks.pronouns import pronouns
from jaxheads.tasks.repeats import repeated_tokens
from jaxheads.tasks.successors import successors

TASKS: Mapping[str, Callable[..., list[Example]]] = MappingProxyType(
    {
        "arithmetic": arithmetic,
        "capitals": capitals,
        "colored_objects": colored_objects,
        "contradicted_capitals": contradicted_capitals,
        "counterfactual_capitals": counterfactual_capitals,
        "greater_than": greater_than,
        "hops": hops,
        "ioi": ioi,
        "lookup": lookup,
        "needle": needle,
        "passkeys": passkeys,
        "pronouns": pronouns,
        "successors": successors,
        "true_capitals": true_capitals,
    }
)
"""Generators by name; each takes `count`, `seed` and options of its own."""


def options(name: str) -> tuple[str, ...]:
    """Names of the options of a task, beyond `count` and `seed`.

    Raises:
      ValueError: there is no such task; the message suggests the nearest.
    """
    parameters = inspect.signature(TASKS[choose("task", name, TASKS)]).parameters
    return tuple(p for p in parameters if p not in ("count", "seed"))


def generate(name: str, count: int, seed: int, **chosen: Any) -> list[Example]:
    """Examples of the task called `name`.

    Args:
      name: a name of `TASKS`.
      count: number of examples.
      seed: the same seed and options give the same examples.
      **chosen: options of that task; see its own docs.

    Raises:
      ValueError: an unknown task or option, with the nearest known ones, or a value
        the task refuses.
    """
    known = options(name)
    for option in chosen:
        if option not in known:
            raise ValueError(unknown(f"option of task {name!r}:", option, known))
    return TASKS[name](count, seed=seed, **chosen)


__all__ = [
    "TASKS",
    "Encoded",
    "Example",
    "Pairs",
    "Tokenizer",
    "arithmetic",
    "capitals",
    "colored_objects",
    "contradicted_capitals",
    "contrast",
    "counterfactual_capitals",
    "encode",
    "encode_pairs",
    "generate",
    "greater_than",
    "hops",
    "ioi",
    "lookup",
    "needle",
    "options",
    "passkeys",
    "pronouns",
    "repeated_tokens",
    "same_length",
    "single_token",
    "split",
    "successors",
    "true_capitals",
]  # fmt: skip
