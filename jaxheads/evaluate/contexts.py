"""`Contexts`: token ids of long contexts, all equally long, and of the answers that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxheads.tasks.example import Example, Tokenizer
from jaxheads.text import sample_text

ANSWER = 32
"""N, slots of an answer: one for all tasks, so that they share the compiled programs."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """Rows of one task at one length.

    Attributes:
      prompts: int32 [B,T], every token real.
      answers: int32 [B,N], on the left of the slots.
      mask: bool [B,N], True at the answers' tokens.
      depths: float64 [B], where in the context the answer is told, 0 first and 1 last; None where
        it is no one place.
    """

    prompts: np.ndarray
    answers: np.ndarray
    mask: np.ndarray
    depths: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        depths: Sequence[float] | None = None,
    ) -> Contexts:
        """Of ids.

        Raises:
          ValueError: an answer of no tokens, or of more than `ANSWER`.
        """
        sizes = [len(answer) for answer in answers]
        wrong = [size for size in sizes if not 1 <= size <= ANSWER]
        if wrong:
            raise ValueError(f"answers must have 1 to {ANSWER} tokens, got {wrong[0]}")
        ids = np.zeros((len(sizes), ANSWER), np.int32)
        for row, answer in zip(ids, answers, strict=True):
            row[: len(answer)] = answer
        return cls(
            prompts=np.asarray(prompts, np.int32),
            answers=ids,
            mask=np.arange(ANSWER) < np.asarray(sizes)[:, None],
            depths=None if depths is None else np.asarray(depths, np.float64),
        )

    def __len__(self) -> int:
        """B."""
        return len(self.prompts)


def fitted(
    make: Callable[[int], Example], most: int, tokenizer: Tokenizer, length: int, task: str
) -> tuple[list[int], list[int]]:
    """The largest prompt that a context holds, filled up in front to be exactly as long.

    What fills it is the end of a plain text, fewer tokens than one unit of the task has. With
    padding instead, caches of one length would differ in size.

    Args:
      make: an example of so many units (sentences, facts), longer with each.
      most: units that it can have.
      tokenizer: its tokens.
      length: T, tokens.
      task: its name, for the error.

    Returns:
      Ids of the prompt, T of them, and of the answer.

    Raises:
      ValueError: one unit is too long already, or `most` are not long enough.
    """
    shortest = tokenizer.encode(make(1).prompt)
    if len(shortest) > length:
        raise ValueError(
            f"length {length} is too short for task {task!r}, which needs at least "
            f"{len(shortest)} tokens"
        )
    low, high = 1, most + 1
    while high - low > 1:
        # Twice as many until they do not fit: long texts take long to make.
        middle = min(2 * low, high - 1) if high > most else (low + high) // 2
        fits = len(tokenizer.encode(make(middle).prompt)) <= length
        low, high = (middle, high) if fits else (low, middle)
    example = make(low)
    prompt = tokenizer.encode(example.prompt)
    missing = length - len(prompt)
    if low == most and missing > len(prompt) / low:
        raise ValueError(
            f"length {length} is too long for task {task!r}, which has at most {len(prompt)} tokens"
        )
    filler = tokenizer.encode(f"{sample_text().strip()} ", add_special_tokens=False)
    filler = filler * (missing // len(filler) + 1)
    front = filler[len(filler) - missing :]
    return [*front, *prompt], tokenizer.encode(example.answer, add_special_tokens=False)
