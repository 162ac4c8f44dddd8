"""New tokens as text: where stop strings cut it, and what of it can be shown already.

Special tokens are not text: they are left out, and a stop string cannot name one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

PART_OF_CHARACTER = "\ufffd"
"""What a tokenizer makes of bytes that are not a whole character (yet)."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        ...


class Ending(NamedTuple):
    """Where a row ends for a stop string.

    Attributes:
      length: tokens up to and with the one that completes the string.
      text: what stands before the string.
    """

    length: int
    text: str


def check_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> None:
    """Raises ValueError for stop strings that would cut everywhere or never."""
    for stop in stops:
        if not stop:
            raise ValueError("a stop string is empty: expected at least one character")
        ids = tokenizer.encode(stop, add_special_tokens=False)
        special = [i for i in ids if tokenizer.decode([i]) and not _text(tokenizer, [i])]
        if special:
            raise ValueError(
                f"stop string {stop!r} holds a special token, which is not text: stop at its id, "
                f"{special[0]}"
            )


def find_stop(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> Ending | None:
    """Where a stop string in the text of tokens ends it, or None if none occurs.

    The text is searched, so it does not matter how the string is divided into tokens, nor
    whether it begins or ends within one. Of several strings the one that begins first
    counts.
    """
    text = _text(tokenizer, ids)
    found = [(at, len(stop)) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return None
    begin, size = min(found)
    needed = text[: begin + size]
    lengths = range(1, len(ids) + 1)
    length = next(n for n in lengths if _text(tokenizer, ids[:n]).startswith(needed))
    return Ending(length, text[:begin])


def text_so_far(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> str:
    """The beginning of a text under way that no later token can change or cut.

    Held back are bytes of an unfinished character, and an end that may be the beginning of
    a stop string.
    """
    text = _text(tokenizer, ids).rstrip(PART_OF_CHARACTER)
    longest = max((len(stop) for stop in stops), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return text[:-size]
    return text


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special=True)
