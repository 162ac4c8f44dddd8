"""What heads specialise in: tokens and kinds of tokens at which they are on more than elsewhere.

The lift of a token at a head is P(on | token) / P(on). Of a token that is seen a few times it is
far from 1 by chance, and the highest of thousands of tokens is further yet. So the same numbers
are given for shuffled tokens: their identities are permuted over all places, which keeps how often
each occurs and how often each head is on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxheads.routing.view import Lift, Speciality

CATEGORIES = (
    "first of a text",
    "2nd to 16th of a text",
    "later in a text",
    "starts with a space",
    "letters, no space before",
    "capitalised",
    "digits",
    "punctuation",
    "blank",
)
"""Kinds of tokens, told from their place and their characters alone. They overlap."""


def lifts(on: np.ndarray, ids: np.ndarray, minimum: int) -> tuple[np.ndarray, ...]:
    """Lift of every token that occurs often enough.

    Args:
      on: bool [N,R], whether each of R heads is on at each place; each somewhere.
      ids: int [N], the token at each place.
      minimum: least occurrences.

    Returns:
      The ids [U], their counts [U], and the lifts, float64 [U,R].
    """
    order = np.argsort(ids, kind="stable")
    found, first, counts = np.unique(ids[order], return_index=True, return_counts=True)
    together = np.add.reduceat(on[order], first, axis=0, dtype=np.int64)
    kept = counts >= minimum
    share = together[kept] / counts[kept, None]
    return found[kept], counts[kept], share / on.mean(axis=0)


def specialities(
    on: np.ndarray,
    ids: np.ndarray,
    names: Sequence[str],
    heads: Sequence[tuple[int, int]],
    shuffles: Sequence[np.ndarray],
    *,
    minimum: int,
    best: int,
) -> tuple[Speciality, ...]:
    """The tokens with the highest lift at each head; among equals, the more frequent first.

    Args:
      on: bool [N,R], whether each of R heads is on at each place; each somewhere.
      ids: int [N], the token at each place.
      names: the text of token i, for all ids.
      heads: (layer, head) of the R.
      shuffles: permutations [N].
      minimum: least occurrences of a token.
      best: how many tokens.

    Returns:
      One for each head; none where no token occurs often enough.
    """
    tokens, counts, lift = lifts(on, ids, minimum)
    if not len(tokens):
        return ()
    highest = [lifts(on[order], ids, minimum)[2].max(axis=0) for order in shuffles]
    found = []
    for column, (layer, head) in enumerate(heads):
        top = np.lexsort((-counts, -lift[:, column]))[:best]
        listed = tuple(Lift(names[tokens[i]], int(counts[i]), float(lift[i, column])) for i in top)
        shuffled = tuple(float(most[column]) for most in highest)
        found.append(Speciality(int(layer), int(head), listed, shuffled))
    return tuple(found)


def members(names: Sequence[str], ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """bool [N,C], which tokens are of which of `CATEGORIES`.

    Args:
      names: the text of token i, for all ids.
      ids: int [N], the token at each place.
      positions: int [N], from 0 at the first token of a text.
    """
    kinds = np.array([_kinds(name) for name in names], bool).reshape(len(names), 6)
    place = np.digitize(positions, (1, 16))[:, None] == np.arange(3)
    return np.concatenate([place, kinds[ids]], axis=1)


def _kinds(name: str) -> tuple[bool, ...]:
    """The last six of `CATEGORIES`, of a token's text."""
    text = name.strip()
    letters = text[:1].isalpha()
    return (
        name.startswith(" ") and bool(text),
        letters and not name[:1].isspace(),
        text[:1].isupper(),
        text.isdecimal(),
        bool(text) and not any(c.isalnum() for c in text),
        not text,
    )


def category_loads(
    on: np.ndarray, kinds: np.ndarray, shuffles: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """How often heads are on at kinds of tokens.

    Args:
      on: bool [N,R].
      kinds: bool [N,C].
      shuffles: permutations [N].

    Returns:
      The share of each kind's tokens at which each head is on, float64 [C,R]; and the greatest
      difference from the share of all tokens, at any head in any shuffle, [C]. NaN for a kind
      without tokens.
    """
    loads = _shares(on, kinds)
    if not on.shape[1]:
        return loads, np.zeros(len(loads))
    off = [np.abs(_shares(on[order], kinds) - on.mean(axis=0)).max(axis=1) for order in shuffles]
    return loads, np.max(off, axis=0)


def _shares(on: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    none = np.full(on.shape[1], np.nan)
    return np.stack([on[kind].mean(axis=0) if kind.any() else none for kind in kinds.T])
