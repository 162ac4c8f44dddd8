"""A small real text that every machine has: the language reference inside CPython.

`pydoc_data.topics` holds what `help("assert")` prints: parts of the Python documentation (PSF
licence), about 0.4 MB of plain text. It differs between versions of Python; `fingerprint` says
whether two machines have the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pydoc_data import topics as pydoc_topics

from jaxheads.data.division import in_split

NAME = "python-docs"
HELD_OUT = 0.15
"""Share of the topics that is held out; about a tenth of the text."""
REPEATED = 60
"""Characters from which a paragraph counts as the same text when it comes again."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
      title: the topic's name, such as "assert".
      text: its text, without paragraphs that a longer topic has too.
    """

    title: str
    text: str


@dataclass(frozen=True)
class CorpusSize:
    """What a split holds: documents, characters, and bytes of UTF-8."""

    documents: int
    characters: int
    bytes: int


def python_docs(split: str = "all") -> list[Document]:
    """The documents of a split, ordered by title.

    Some topics are chapters that contain other topics whole. A paragraph of 60 characters or
    more is therefore kept only in the longest topic that has it, and a topic of which no such
    paragraph is left is left out: the two splits share none.

    Args:
      split: "train", "held_out" or "all". The side is decided by the title, so a topic is on
        the same side in every version of Python.

    Raises:
      ValueError: an unknown split.
    """
    return [d for d in _documents() if in_split(f"{NAME}/{d.title}", split, HELD_OUT)]


def corpus_size(split: str = "all") -> CorpusSize:
    """How large a split is on this Python.

    Raises:
      ValueError: an unknown split.
    """
    texts = [document.text for document in python_docs(split)]
    size = sum(len(text.encode()) for text in texts)
    return CorpusSize(len(texts), sum(map(len, texts)), size)


def fingerprint() -> str:
    """Hex SHA-256 of all titles and texts; equal where the corpus is."""
    digest = hashlib.sha256()
    for document in _documents():
        digest.update(f"{document.title}\0{document.text}\0".encode())
    return digest.hexdigest()


def paragraphs(text: str) -> list[str]:
    """The pieces of a text between blank lines, as they stand."""
    return [piece for piece in re.split(r"\n[ \t]*\n", text) if piece.strip()]


def same_text(paragraph: str) -> str:
    """A paragraph without its line breaks and indentation, for comparison."""
    return " ".join(paragraph.split())


@cache
def _documents() -> Sequence[Document]:
    topics: dict[str, str] = pydoc_topics.topics
    seen: set[str] = set()
    kept = []
    for title in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        pieces = [(piece, same_text(piece)) for piece in paragraphs(topics[title])]
        left = [piece for piece, plain in pieces if plain not in seen]
        new = {plain for _, plain in pieces if len(plain) >= REPEATED}
        if new - seen:
            kept.append(Document(title, "\n\n".join(left).rstrip() + "\n"))
        seen |= new
    return tuple(sorted(kept, key=lambda document: document.title))
