"""`Pairs`: clean and corrupted prompts side by side, with single-token answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from flax import struct

from jaxheads.model.batch import Array, Batch, pack
from jaxheads.tasks.example import Example, Tokenizer

NO_TOKEN = -1
"""Fills `Pairs.answers` and `Pairs.wrong` where a row has fewer than the longest."""


@struct.dataclass
class Pairs:
    """Pairs of prompts that differ in the decisive word, as arrays on the host.

    Attributes:
      clean: the prompts, without answers; [B,T].
      corrupted: their corrupted counterparts, padded alike; [B,T].
      answers: int32 [B,A], token ids of the right answers to the clean prompts, the main
        one first, then -1.
      wrong: int32 [B,W], token ids of the wrong answers, the main one first, then -1.
      answer_slot: int32 [B], the last real slot, whose logits predict the answer.
    """

    clean: Batch
    corrupted: Batch
    answers: Array
    wrong: Array
    answer_slot: Array


def encode_pairs(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    side: str = "left",
    length: int | None = None,
) -> Pairs:
    """Tokenises clean and corrupted prompts into two rectangles.

    With padding on the left the answer slot is the last one in every row.

    Args:
      examples: B examples with a corrupted prompt and a wrong answer; `single_token` keeps
        those that this function takes.
      tokenizer: turns text into token ids.
      side: the side that is padded, "left" or "right".
      length: T; default the longest prompt. Fix it to keep one compiled program.

    Raises:
      ValueError: no examples; an example without corrupted prompt or wrong answer; a pair
        of different lengths; an answer that is not a single token; a token that is both a
        right and a wrong answer; an unknown side; a prompt longer than `length`.
    """
    if not examples:
        raise ValueError("no examples to encode: expected at least one")
    _check_pairs(examples)
    for index, example in enumerate(examples):
        problem = _problem(example, tokenizer)
        if problem is not None:
            raise ValueError(f"{problem} (example {index})")
    clean = pack([tokenizer.encode(e.prompt) for e in examples], side=side, length=length)
    corrupted = pack([tokenizer.encode(_other(e)) for e in examples], side=side, length=length)
    mask = np.asarray(clean.mask)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return Pairs(
        clean=clean,
        corrupted=corrupted,
        answers=_ids([_right(e) for e in examples], tokenizer),
        wrong=_ids([_wrong(e) for e in examples], tokenizer),
        answer_slot=last.astype(np.int32),
    )


def single_token(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Example]:
    """The examples whose answers are single tokens and whose pair has equal lengths.

    Generators know no tokenizer; this keeps what `encode_pairs` takes, in the same order.

    Raises:
      ValueError: an example has no corrupted prompt or no wrong answer; or none can be
        kept, with the reason of the first.
    """
    _check_pairs(examples)
    problems = [_problem(example, tokenizer) for example in examples]
    kept = [e for e, problem in zip(examples, problems, strict=True) if problem is None]
    if examples and not kept:
        raise ValueError(f"none of {len(examples)} examples can be kept; the first: {problems[0]}")
    return kept


def same_length(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Example]:
    """The examples whose prompts have the most common number of tokens.

    They need no padding, so a slot is the same place in the prompt for all that share a
    template. Of two numbers equally common, the smaller one counts.
    """
    lengths = [len(tokenizer.encode(example.prompt)) for example in examples]
    counts = Counter(lengths)
    chosen = min(counts, key=lambda length: (-counts[length], length), default=0)
    return [e for e, length in zip(examples, lengths, strict=True) if length == chosen]


def _check_pairs(examples: Sequence[Example]) -> None:
    """What no tokenizer can change: an example has both halves of a pair."""
    for index, example in enumerate(examples):
        for name, part in (
            ("corrupted prompt", example.corrupted),
            ("wrong answer", example.wrong),
        ):
            if part is None:
                raise ValueError(f"example {index} has no {name}: {example.prompt!r}")


def _problem(example: Example, tokenizer: Tokenizer) -> str | None:
    """Why an example cannot be a pair, or None if it can."""
    clean, corrupted = (tokenizer.encode(text) for text in (example.prompt, _other(example)))
    if len(clean) != len(corrupted):
        return (
            f"clean and corrupted prompt differ in length, {len(clean)} and {len(corrupted)} "
            f"tokens: {example.prompt!r} and {_other(example)!r}"
        )
    if not clean:
        return "the prompt has no tokens: ''"
    right: set[int] = set()
    wrong: set[int] = set()
    for found, texts in ((right, _right(example)), (wrong, _wrong(example))):
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                return f"answer {text!r} must be a single token, got {len(ids)}: {ids}"
            found.update(ids)
    shared = right & wrong
    if shared:
        return (
            f"token {min(shared)} is both a right and a wrong answer: "
            f"{_right(example)} and {_wrong(example)}"
        )
    return None


def _other(example: Example) -> str:
    return example.corrupted or ""


def _right(example: Example) -> tuple[str, ...]:
    """All right answers, the main one first."""
    return (example.answer, *(text for text in example.answers if text != example.answer))


def _wrong(example: Example) -> tuple[str, ...]:
    """All wrong answers, the main one first."""
    main = example.wrong or ""
    return (main, *(text for text in example.wrongs if text != main))


def _ids(answers: Sequence[Sequence[str]], tokenizer: Tokenizer) -> np.ndarray:
    """Token ids [B,N] of single-token answers, -1 where a row has no more."""
    ids = np.full((len(answers), max(map(len, answers))), NO_TOKEN, np.int32)
    for row, texts in enumerate(answers):
        for column, text in enumerate(texts):
            (ids[row, column],) = tokenizer.encode(text, add_special_tokens=False)
    return ids
