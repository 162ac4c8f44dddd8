"""Successors: what comes next in a sequence that everybody knows?"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jaxheads.names import choose
from jaxheads.tasks.checks import at_least, count_of
from jaxheads.tasks.example import Example

SEQUENCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "days": (
            "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
        ),
        "months": (
            "January", "February", "March", "April", "May", "June", "July", "August",
            "September", "October", "November", "December",
        ),
        "numbers": (
            "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
            "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
            "eighteen", "nineteen", "twenty",
        ),
        "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        "ordinals": (
            "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth", "eleventh", "twelfth",
        ),
    }
)  # fmt: skip
"""Sequences by name, five of the eight classes of Gould et al. 2023."""

_CYCLIC = ("days", "months")


def successors(count: int, *, seed: int, sequence: str = "all", shown: int = 3) -> list[Example]:
    """Runs of a known sequence; the next element must follow.

    "In order: Monday, Tuesday, Wednesday," is followed by " Thursday". The corrupted
    prompt is a run of the same sequence that starts elsewhere, and the wrong answer
    follows that. Days and months go round.

    Args:
      count: number of examples, all different.
      seed: decides the runs.
      sequence: a name of `SEQUENCES`, or "all".
      shown: elements shown.

    Returns:
      `count` examples; `group` is the sequence with the answer.

    Raises:
      ValueError: an unknown sequence, `shown` below 1 or too long for a sequence to have
        two different runs, or `count` below 1 or above the number of runs.
    """
    chosen = choose("sequence", sequence, ["all", *SEQUENCES])
    at_least("shown", shown, 1)
    names = list(SEQUENCES) if chosen == "all" else [chosen]
    longest = min(len(SEQUENCES[name]) for name in names) - 2
    if shown > longest:
        raise ValueError(f"shown must be at most {longest} for sequence={sequence!r}, got {shown}")
    runs = [(name, start) for name in names for start in range(_starts(name, shown))]
    count_of(count, len(runs), f"runs of {shown} elements")
    rng = np.random.default_rng(seed)
    drawn = (runs[i] for i in rng.permutation(len(runs))[:count])
    return [_example(rng, name, start, shown) for name, start in drawn]


def _starts(name: str, shown: int) -> int:
    """How many runs of a sequence have a next element."""
    return len(SEQUENCES[name]) - (0 if name in _CYCLIC else shown)


def _example(rng: np.random.Generator, name: str, start: int, shown: int) -> Example:
    starts = _starts(name, shown)
    elsewhere = (start + int(rng.integers(1, starts))) % starts
    prompt, answer = _run(name, start, shown)
    corrupted, wrong = _run(name, elsewhere, shown)
    return Example(prompt, answer, group=f"{name}{answer}", wrong=wrong, corrupted=corrupted)


def _run(name: str, start: int, shown: int) -> tuple[str, str]:
    """A run's prompt and what follows it."""
    elements = SEQUENCES[name]
    *run, following = (elements[(start + i) % len(elements)] for i in range(shown + 1))
    return f"In order: {', '.join(run)},", f" {following}"
