"""`Source`: an ordered collection of texts or of prompts with answers, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxheads.tasks.example import Example

Image = tuple[np.ndarray, int]
Kind = Literal["text", "examples", "images"]


_HOLDS = {"text": "texts", "examples": "prompts with answers", "images": "images"}


@dataclass(frozen=True)
class Source:
    """Documents of one kind, in a fixed order.

    Attributes:
      name: what was opened and which split, for messages.
      kind: "text" (items are str), "examples" (items are `tasks.Example`) or "images" (items are
        float32 [height,width,C] in -1 to 1 and the number of a class).
      count: number of items.
      get: the item with a number from 0 to count - 1; files are read here, not before.
      label: what to call an item in a message, such as "data.jsonl:17".
      fingerprint: hex digest; equal where the items are.
    """

    name: str
    kind: Kind
    count: int
    get: Callable[[int], str | Example | Image]
    label: Callable[[int], str]
    fingerprint: str

    def __len__(self) -> int:
        """Number of items."""
        return self.count

    def __getitem__(self, index: int) -> str | Example | Image:
        """One item.

        Raises:
          IndexError: the number is not in 0..count-1.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"item {index} of {self.name}, which has {self.count}")
        return self.get(index)

    def __iter__(self) -> Iterator[str | Example | Image]:
        """All items in order."""
        return (self.get(index) for index in range(self.count))

    def texts(self) -> list[str]:
        """All items of a source of texts.

        Raises:
          ValueError: the source holds prompts with answers.
        """
        if self.kind != "text":
            raise ValueError(f"{self.name} holds {_HOLDS[self.kind]}, expected texts")
        return [item for item in self if isinstance(item, str)]

    def examples(self) -> list[Example]:
        """All items of a source of prompts with answers.

        Raises:
          ValueError: the source holds texts.
        """
        if self.kind != "examples":
            raise ValueError(
                f"{self.name} holds {_HOLDS[self.kind]}, expected prompts with answers"
            )
        return [item for item in self if isinstance(item, Example)]

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """All items of a source of images: float32 [N,height,width,C] and int32 [N].

        Raises:
          ValueError: the source holds something else.
        """
        if self.kind != "images":
            raise ValueError(f"{self.name} holds {_HOLDS[self.kind]}, expected images")
        pairs = [item for item in self if isinstance(item, tuple)]
        return np.stack([image for image, _ in pairs]), np.array([n for _, n in pairs], np.int32)


def digest(parts: Iterable[object]) -> str:
    """Hex SHA-256 of the printed parts, each ended by a zero byte."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part!r}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()
