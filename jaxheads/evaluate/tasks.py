"""Tasks that a context is needed for, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import numpy as np

from jaxheads.evaluate.contexts import ANSWER, Contexts, fitted
from jaxheads.names import choose
from jaxheads.tasks.checks import at_least
from jaxheads.tasks.example import Example
from jaxheads.tasks.haystack import needle
from jaxheads.tasks.hops import hops
from jaxheads.tasks.passkeys import passkeys
from jaxheads.text import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEAD = 16
"""Tokens of a copied span that the context shows, before those to be predicted."""
_CHAINS = 200
"""Of `hops`, what there are names for."""
_KEYS, _WORDS = 5, 5
"""Passkeys of a text, and words of each."""


@dataclass(frozen=True)
class Request:
    """Which rows a task is asked for.

    Attributes:
      tokenizer: of the model.
      vocab_size: of the model.
      length: T, tokens of a context.
      count: B, rows.
      depths: of places in the context; row i has `depths[i % len(depths)]`.
      seed: decides the rows.
      text: read by the task "text".
    """

    tokenizer: Tokenizer
    vocab_size: int
    length: int
    count: int
    depths: Sequence[float] = DEPTHS
    seed: int = 0
    text: str = ""

    def placed(self) -> list[float]:
        """The depth of each row."""
        return [self.depths[i % len(self.depths)] for i in range(self.count)]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      meaning: one line for people.
      build: its rows.
      placed: whether the answer is told at one depth of the context.
    """

    meaning: str
    build: Callable[[Request], Contexts]
    placed: bool = True


def _of_examples(
    name: str, make: Callable[..., Example], most: int, request: Request
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers; `make` takes units, a depth and a seed."""
    seeds = np.random.SeedSequence(request.seed).generate_state(request.count).tolist()
    rows = [
        fitted(partial(make, depth=depth, seed=seed), most, request.tokenizer, request.length, name)
        for depth, seed in zip(request.placed(), seeds, strict=True)
    ]
    return [prompt for prompt, _ in rows], [answer for _, answer in rows]


def _needle(request: Request) -> Contexts:
    def make(units: int, depth: float, seed: int) -> Example:
        return needle(1, seed=seed, sentences=units, depths=[depth])[0]

    rows = _of_examples("needle", make, request.length, request)
    return Contexts.of(*rows, request.placed())


def _passkey(request: Request) -> Contexts:
    """The passkeys of a text stand at random places, so a row's depth is the mean of its rank."""
    asked = [i % _KEYS for i in range(request.count)]

    def make(units: int, depth: float, seed: int) -> Example:
        key = round(depth * (_KEYS + 1)) - 1
        sentences = units + _KEYS - 1
        return passkeys(key + 1, seed=seed, keys=_KEYS, words=_WORDS, sentences=sentences)[key]

    depths = [(key + 1) / (_KEYS + 1) for key in asked]
    placed = replace(request, depths=depths)
    return Contexts.of(*_of_examples("passkey", make, request.length, placed), depths)


def _hops(request: Request) -> Contexts:
    def make(units: int, depth: float, seed: int) -> Example:
        return hops(1, seed=seed, chains=units)[0]

    return Contexts.of(*_of_examples("hops", make, _CHAINS, request))


def _copy(request: Request) -> Contexts:
    """Random tokens of which a span comes again: its first tokens shown, the next predicted."""
    size = request.length - 1 - _LEAD
    span = _LEAD + ANSWER
    if size < span:
        raise ValueError(
            f"length {request.length} is too short for task 'copy', which needs at least "
            f"{1 + _LEAD + span} tokens"
        )
    first = request.tokenizer.bos_id or 0
    rng = np.random.default_rng(request.seed)
    prompts, answers = [], []
    for depth in request.placed():
        # All tokens but the first; with repetition, since a long context has more than there are.
        tokens = rng.integers(0, request.vocab_size - 1, size)
        tokens = (tokens + (tokens >= first)).tolist()
        start = round(depth * (size - span))
        prompts.append([first, *tokens, *tokens[start : start + _LEAD]])
        answers.append(tokens[start + _LEAD : start + span])
    return Contexts.of(prompts, answers, request.placed())


def _text(request: Request) -> Contexts:
    """Plain text, and what follows; rows evenly spaced over the text."""
    ids = request.tokenizer.encode(request.text, add_special_tokens=False)
    size = request.length + ANSWER
    if len(ids) < size:
        raise ValueError(
            f"the text of task 'text' has {len(ids):,} tokens, fewer than a context of "
            f"{request.length} and {ANSWER} that follow"
        )
    starts = np.linspace(0, len(ids) - size, request.count).astype(int)
    rows = [ids[start : start + size] for start in starts]
    return Contexts.of(
        [row[: request.length] for row in rows], [row[request.length :] for row in rows]
    )


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "needle": Task("a fact told once in a long dull text (Wu et al. 2024)", _needle),
        "passkey": Task("one of five passkeys in a long dull text (Xiao et al. 2024)", _passkey),
        "hops": Task(
            "a password told over two facts among many (RULER, Hsieh et al. 2024)",
            _hops,
            placed=False,
        ),
        "copy": Task("a span of random tokens that has begun again", _copy),
        "text": Task("what follows in a plain text", _text, placed=False),
    }
)
"""Tasks by name."""


def contexts_of(task: str, request: Request) -> Contexts:
    """Rows of a task, each of exactly `request.length` tokens.

    Raises:
      ValueError: an unknown task, a number below 1, no depths or one outside [0, 1], a length for
        which the task has no rows.
    """
    choose("task", task, TASKS)
    at_least("count", request.count, 1)
    at_least("length", request.length, 1)
    check_depths(request.depths)
    return TASKS[task].build(request)


def check_depths(depths: Sequence[float]) -> None:
    """Raises ValueError for no depths, or one outside [0, 1]."""
    if not len(depths) or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be one or more numbers from 0 to 1, got {list(depths)}")
