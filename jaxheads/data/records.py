"""`tasks.Example` to the fields of a stored record, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxheads.tasks.example import Example

FIELDS = ("prompt", "answer", "wrong", "corrupted", "group", "answers", "wrongs", "needle")
"""Names of a record's fields. A text that an example does not have is "", a needle (-1, -1)."""


def to_record(example: Example) -> dict[str, Any]:
    """The fields of an example, none of them None."""
    return {
        "prompt": example.prompt,
        "answer": example.answer,
        "wrong": example.wrong or "",
        "corrupted": example.corrupted or "",
        "group": example.group,
        "answers": list(example.answers),
        "wrongs": list(example.wrongs),
        "needle": list(example.needle or (-1, -1)),
    }


def from_record(record: Mapping[str, Any]) -> Example:
    """The example that `to_record` stored; texts may come as bytes of UTF-8."""
    start, end = (int(place) for place in record["needle"])
    return Example(
        prompt=as_text(record["prompt"]),
        answer=as_text(record["answer"]),
        needle=None if start < 0 else (start, end),
        group=as_text(record["group"]),
        wrong=as_text(record["wrong"]) or None,
        corrupted=as_text(record["corrupted"]) or None,
        answers=tuple(as_text(value) for value in record["answers"]),
        wrongs=tuple(as_text(value) for value in record["wrongs"]),
    )


def as_text(value: Any) -> str:
    """A text that may be stored as bytes.

    Raises:
      ValueError: bytes that are not UTF-8 (a UnicodeDecodeError), or no text at all.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return str(value)
    raise ValueError(f"expected a text, got {type(value).__name__}")
