"""Successor heads: attending to "Monday", they write "Tuesday".

Source: Gould et al. (2024), "Successor Heads: Recurring, Interpretable Attention Heads In The
Wild". The score is read off the weights: what a head writes if it attends to a token alone,
W_U W_OV MLP0(W_E), with the output of the first MLP standing for the token. A token counts if,
of the members of its succession, its successor gets the highest logit.

Known numbers: Pythia-1.4B has a successor head, 12.0, which scores 8 times as much as the runner
up. SmolLM2-135M-Instruct has none: its best head, 23.3, scores .19.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.circuits.token_circuits import (
    check_logits,
    check_token_row,
    ov_logits,
    token_stream,
)
from jaxheads.circuits.weights import Layer, layers
from jaxheads.model.transformer import Transformer
from jaxheads.tasks.example import Tokenizer

Array = jax.Array

SUCCESSION: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "numbers": tuple(str(number) for number in range(200)),
        "number words": (
            *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
            *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
            *("eighteen", "nineteen", "twenty"),
        ),
        "ordinal words": (
            *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
            *("ninth", "tenth", "eleventh", "twelfth"),
        ),
        "days": (*("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),),
        "day prefixes": ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
        "months": (
            *("January", "February", "March", "April", "May", "June", "July", "August"),
            *("September", "October", "November", "December"),
        ),
        "month prefixes": (
            *("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
        ),
        "letters": tuple("abcdefghijklmnopqrstuvwxyz"),
    }
)
"""The eight classes, each in its order. Nothing follows the last member."""


@dataclass(frozen=True)
class SuccessorScores:
    """How often each head's arg-max is the successor.

    Attributes:
      scores: float32 [L,H], share of all tokens that have a successor.
      by_class: float32 [L,H] for each class of which the tokenizer has two successive members.
      counts: tokens that have a successor, for each class.
      control: float32 [N,L,H], the same with the members of each succession in random order,
        N draws.
    """

    scores: np.ndarray
    by_class: dict[str, np.ndarray]
    counts: dict[str, int]
    control: np.ndarray


@dataclass(frozen=True)
class Successions:
    """Successions as tokens. A spelling of a class, e.g. " monday", " tuesday", ..., is one.

    Attributes:
      tokens: int32 [N], the members of all successions.
      group: int32 [N], the succession of each.
      pairs: int32 [P,2], indices into `tokens` of a member and its successor.
      classes: the class of each pair.
    """

    tokens: np.ndarray
    group: np.ndarray
    pairs: np.ndarray
    classes: tuple[str, ...]


def successor_scores(
    model: Transformer,
    tokenizer: Tokenizer,
    classes: Mapping[str, Sequence[str]] = SUCCESSION,
    *,
    draws: int = 5,
    seed: int = 0,
) -> SuccessorScores:
    """Scores every head, from the weights and without a prompt.

    Each class is spelled with and without a space in front, and as given, in lower case,
    capitalised and in capitals. Members that are not one token are left out.

    Args:
      model: a language model that normalises what attention reads.
      tokenizer: turns words into token ids.
      classes: words in their order, by the name of the class.
      draws: random orders of the control, at least 1.
      seed: of the random orders.

    Raises:
      ValueError: a model whose heads are not linear maps, or without an unembedding; a class of
        fewer than two words or with a word twice; no two successive words that are one token
        each; `draws` below 1.
    """
    check_logits(model)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    found = successions(tokenizer, classes)
    tokens = check_token_row(model, "tokens of the classes", found.tokens)
    best = np.asarray(_best_in_group(model, tokens, found.group))
    hits = _hits(best, found.pairs)
    of_class = np.array(found.classes)
    names = dict.fromkeys(found.classes)
    rng = np.random.default_rng(seed)
    control = [
        _hits(best, _shuffled(found.group, rng)[found.pairs]).mean(-1, dtype=np.float32)
        for _ in range(draws)
    ]
    return SuccessorScores(
        scores=hits.mean(-1, dtype=np.float32),
        by_class={n: hits[..., of_class == n].mean(-1, dtype=np.float32) for n in names},
        counts={name: found.classes.count(name) for name in names},
        control=np.stack(control),
    )


def successions(
    tokenizer: Tokenizer, classes: Mapping[str, Sequence[str]] = SUCCESSION
) -> Successions:
    """The members of classes that are single tokens, in every spelling.

    Args:
      tokenizer: turns words into token ids.
      classes: words in their order, by the name of the class.

    Raises:
      ValueError: as `successor_scores`.
    """
    tokens: list[int] = []
    group: list[int] = []
    pairs: list[tuple[int, int]] = []
    of_class: list[str] = []
    for name, words in classes.items():
        if len(words) < 2 or len(set(words)) < len(words):
            raise ValueError(
                f"class {name!r} must have at least two words, each once, got {list(words)!r}"
            )
        for places, ids in _spellings(tokenizer, words):
            first = len(tokens)
            steps = [i for i in range(len(places) - 1) if places[i + 1] == places[i] + 1]
            pairs += [(first + i, first + i + 1) for i in steps]
            of_class += [name] * len(steps)
            group += [group[-1] + 1 if group else 0] * len(ids)
            tokens += ids
    if not pairs:
        raise ValueError(
            f"none of the classes {', '.join(classes)} has two successive words that are one "
            "token each"
        )
    as_rows = np.array(pairs, np.int32)
    return Successions(np.array(tokens), np.array(group, np.int32), as_rows, tuple(of_class))


def _spellings(tokenizer: Tokenizer, words: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """For each spelling: places in the class of the words that are one token; their ids."""
    seen: set[tuple[int, ...]] = set()
    for space in ("", " "):
        for case in (str, str.lower, str.capitalize, str.upper):
            encoded = [
                tokenizer.encode(space + case(word), add_special_tokens=False) for word in words
            ]
            ids = [row[0] if len(row) == 1 else -1 for row in encoded]
            # A token for several words is the unknown one.
            places = [i for i, token in enumerate(ids) if token >= 0 and ids.count(token) == 1]
            kept = [ids[place] for place in places]
            successive = any(b - a == 1 for a, b in pairwise(places))
            if successive and tuple(kept) not in seen:
                seen.add(tuple(kept))
                yield places, kept


@jax.jit
def _best_in_group(model: Transformer, tokens: Array, group: Array) -> Array:
    """int32 [L,H,N]: the index of the token of the same group with the highest logit."""
    x = token_stream(model, tokens, "mlp0")
    together = group[:, None] == group

    def of_layer(layer: Layer) -> Array:
        logits = ov_logits(model, layer, x, tokens)
        return jnp.argmax(jnp.where(together, logits, -jnp.inf), axis=-1).astype(jnp.int32)

    return jax.lax.map(of_layer, layers(model))


def _hits(best: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """bool [L,H,P]: whether the best token of the pair's first is its second."""
    return best[..., pairs[:, 0]] == pairs[:, 1]


def _shuffled(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int [N]: each index sent to one of its group, at random."""
    by_group = np.argsort(group, kind="stable")
    shuffled = np.empty_like(by_group)
    shuffled[by_group] = np.lexsort((rng.random(len(group)), group))
    return shuffled
