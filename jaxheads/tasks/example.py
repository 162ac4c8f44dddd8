"""`Example`: a prompt, its answer and where the answer stands; `encode`: tokens of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from flax import struct

from jaxheads.model.batch import Array, Batch, pack


class Tokenizer(Protocol):
    """What the tasks need of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and each token's start and end in characters; (0, 0) if added."""


@dataclass(frozen=True)
class Example:
    """One question with a known answer.

    Attributes:
      prompt: what the model reads.
      answer: what should follow, with its leading space where it has one.
      needle: start and end, in characters of `prompt`, of the place the answer is to
        be copied from; None where there is none.
      group: what train and held-out sides must not share; see `split`. Empty: only
        the prompt itself.
      wrong: the contrasting answer, for differences of logits.
      corrupted: the prompt with the decisive word replaced, of the same length in
        tokens, for patching.
      answers: every right answer where there are several, `answer` among them; empty:
        only `answer`.
      wrongs: every wrong answer where there are several, `wrong` among them; empty:
        only `wrong`.

    Raises:
      ValueError: `answers` leaves out `answer`, or `wrongs` leaves out `wrong`.
    """

    prompt: str
    answer: str
    needle: tuple[int, int] | None = None
    group: str = ""
    wrong: str | None = None
    corrupted: str | None = None
    answers: tuple[str, ...] = ()
    wrongs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, one, several in (
            ("answer", self.answer, self.answers),
            ("wrong", self.wrong, self.wrongs),
        ):
            if several and one not in several:
                raise ValueError(f"{name}s {several} must hold {name}, which is {one!r}")


@struct.dataclass
class Encoded:
    """Examples as arrays, on the host.

    Attributes:
      batch: prompts followed by answers; `targets` is True at the answer tokens.
      needle: bool [B,T], True at the tokens of each example's needle.
      answer_start: int32 [B], the slot of each first answer token.
    """

    batch: Batch
    needle: Array
    answer_start: Array


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    side: str = "right",
    length: int | None = None,
) -> Encoded:
    """Tokenises examples into one rectangle.

    Prompt and answer are tokenised apart and then joined, so that the model sees at
    the answer exactly the tokens it would see while generating after the prompt. Only
    the prompt gets the special tokens that the tokenizer adds, if any.

    Args:
      examples: B examples.
      tokenizer: turns text into token ids and their places in the text.
      side: the side that is padded, "right" or "left".
      length: T; default the longest example. Fix it to keep one compiled program.

    Raises:
      ValueError: no examples; a prompt or an answer without tokens; a needle outside
        its prompt or without tokens; an unknown side; an example longer than `length`.
    """
    if not examples:
        raise ValueError("no examples to encode: expected at least one")
    rows, targets, needles, prompt_lengths = [], [], [], []
    for index, example in enumerate(examples):
        prompt, spans = tokenizer.encode_with_offsets(example.prompt)
        answer = tokenizer.encode(example.answer, add_special_tokens=False)
        for part, text, ids in (
            ("prompt", example.prompt, prompt),
            ("answer", example.answer, answer),
        ):
            if not ids:
                raise ValueError(f"the {part} of example {index} has no tokens: {text!r}")
        rows.append([*prompt, *answer])
        targets.append([False] * len(prompt) + [True] * len(answer))
        needles.append([*_inside(example, index, spans), *[False] * len(answer)])
        prompt_lengths.append(len(prompt))
    batch = pack(rows, targets, side=side, length=length)
    # Packed a second time with the needle as "targets": both masks are padded alike.
    needle = pack(rows, needles, side=side, length=length).targets
    first = np.asarray(batch.mask).argmax(axis=1)
    return Encoded(batch, np.asarray(needle), (first + prompt_lengths).astype(np.int32))


def _inside(example: Example, index: int, spans: Sequence[tuple[int, int]]) -> list[bool]:
    if example.needle is None:
        return [False] * len(spans)
    start, end = example.needle
    if not 0 <= start < end <= len(example.prompt):
        raise ValueError(
            f"needle {example.needle} of example {index} is not a span of characters of its "
            f"prompt: expected 0 <= start < end <= {len(example.prompt)}"
        )
    inside = [a < end and start < b for a, b in spans]
    if not any(inside):
        raise ValueError(f"no token of example {index} stands in its needle {example.needle}")
    return inside


def contrast(examples: Sequence[Example], tokenizer: Tokenizer) -> np.ndarray:
    """First tokens of the right and of the wrong answers, for differences of logits.

    Args:
      examples: B examples that have a `wrong` answer.
      tokenizer: turns text into token ids.

    Returns:
      int32 [B,2]: the right answer's first token, the wrong answer's first token.

    Raises:
      ValueError: an example has no wrong answer, an answer has no tokens, or both
        answers begin with the same token.
    """
    pairs = []
    for index, example in enumerate(examples):
        if example.wrong is None:
            raise ValueError(f"example {index} has no wrong answer: {example.prompt!r}")
        right, wrong = (_first(tokenizer, text, index) for text in (example.answer, example.wrong))
        if right == wrong:
            raise ValueError(
                f"answers {example.answer!r} and {example.wrong!r} of example {index} begin "
                "with the same token, so their first logits cannot differ"
            )
        pairs.append((right, wrong))
    return np.asarray(pairs, np.int32).reshape(-1, 2)


def _first(tokenizer: Tokenizer, answer: str, index: int) -> int:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if not ids:
        raise ValueError(f"an answer of example {index} has no tokens: {answer!r}")
    return ids[0]


def split(
    examples: Sequence[Example], held_out: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Divides examples into a train and a held-out side with no group on both.

    Args:
      examples: the examples; their order is kept within each side.
      held_out: the share of the groups that is held out, between 0 and 1. At least
        one group falls on each side.
      seed: decides which groups are held out.

    Returns:
      The train side and the held-out side.

    Raises:
      ValueError: `held_out` is not between 0 and 1, or there are fewer than 2 groups.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie strictly between 0 and 1, got {held_out}")
    # An example without a group shares nothing but its own prompt.
    keys = [example.group or example.prompt for example in examples]
    groups = sorted(set(keys))
    if len(groups) < 2:
        raise ValueError(f"need at least 2 groups to hold one out, got {len(groups)}")
    wanted = min(max(round(held_out * len(groups)), 1), len(groups) - 1)
    chosen = {groups[i] for i in np.random.default_rng(seed).permutation(len(groups))[:wanted]}
    train = [example for key, example in zip(keys, examples, strict=True) if key not in chosen]
    held = [example for key, example in zip(keys, examples, strict=True) if key in chosen]
    return train, held
