"""Choosing one of a known set of names, with an error a reader can act on."""

import difflib
from collections.abc import Iterable


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns `name` if it is one of `known`.

    Raises:
      ValueError: `name` is not known; the message names the kind, suggests the
        nearest known names and lists them all.
    """
    known = list(known)
    if name in known:
        return name
    raise ValueError(unknown(kind, name, known))


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not one of `known`."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."
