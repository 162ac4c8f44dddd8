"""Greater-than: an end year must lie after the start year."""

import numpy as np

from jaxheads.tasks.checks import count_of
from jaxheads.tasks.example import Example

NOUNS = (
    "war", "siege", "reign", "project", "strike", "campaign", "expedition", "voyage", "dynasty",
    "famine", "plague", "rebellion", "trial", "tour", "study", "partnership", "conflict",
    "drought", "revolution", "construction", "investigation", "marriage", "occupation",
    "alliance",
)  # fmt: skip
"""Things that last; each one token of common byte-pair vocabularies."""

_CENTURIES = range(11, 18)
_TENS = range(1, 9)  # some digit is greater and some is smaller


def greater_than(count: int, *, seed: int) -> list[Example]:
    """Spans of years that break off after the century, so that the next digit must be greater.

    "The war lasted from the year 1743 to the year 17" is followed by a digit above 4 and
    not below 4; 4 itself may be either and counts as neither. The task of Hanna et al.
    2023, for tokenizers that write each digit as one token (in the paper the two last
    digits are one). The corrupted prompt starts in the first decade of the century, which
    is compatible with every digit, as the paper's "01" is.

    Args:
      count: number of examples, all different.
      seed: decides nouns and years.

    Returns:
      `count` examples; `answers` are all greater digits and `answer` the next one,
      `wrongs` all smaller ones and `wrong` the one before; `group` is the start year.

    Raises:
      ValueError: `count` below 1 or above the number of different spans.
    """
    shape = (len(NOUNS), len(_CENTURIES), len(_TENS), 10)
    available = int(np.prod(shape))
    count_of(count, available, "choices of noun and year")
    drawn = np.random.default_rng(seed).choice(available, count, replace=False)
    return [
        _example(NOUNS[noun], _CENTURIES[century], _TENS[tens], int(unit))
        for noun, century, tens, unit in zip(*np.unravel_index(drawn, shape), strict=True)
    ]


def _example(noun: str, century: int, tens: int, unit: int) -> Example:
    prompt, corrupted = (
        f"The {noun} lasted from the year {century}{digit}{unit} to the year {century}"
        for digit in (tens, 0)
    )
    return Example(
        prompt=prompt,
        answer=str(tens + 1),
        group=f"{century}{tens}{unit}",
        wrong=str(tens - 1),
        corrupted=corrupted,
        answers=tuple(str(digit) for digit in range(tens + 1, 10)),
        wrongs=tuple(str(digit) for digit in range(tens)),
    )
