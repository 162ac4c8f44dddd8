"""Sources to token sequences, and to packed rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxheads.data.packing import Plan, fill_rows, plan_rows
from jaxheads.data.source import Source
from jaxheads.model.batch import Batch
from jaxheads.tasks.example import Example, Tokenizer

Progress = Callable[[int, int], None]
"""Told (done, total) after every document."""


@dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Attributes:
      length: T, tokens of a row.
      end: id put after each text or answer, such as the tokenizer's `eos_id`; None for none.
        After an answer it is a target too.
      one_per_row: one document (or piece of a long text) per row, instead of packed rows.
      drop_long: leave out prompts with answers that are longer than a row, and count them,
        instead of refusing them. Long texts are cut, never dropped.
    """

    length: int
    end: int | None = None
    one_per_row: bool = False
    drop_long: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError on a length below 2 (nothing could be predicted) or an id below 0."""
        if self.length < 2:
            raise ValueError(f"length of a row must be at least 2, got {self.length}")
        if self.end is not None and self.end < 0:
            raise ValueError(f"end must be a token id or None, got {self.end}")


@dataclass(frozen=True)
class Report:
    """What packing did.

    Attributes:
      documents: documents of the source.
      dropped: those left out: texts without tokens, examples longer than a row.
      pieces: segments in all rows together; more than the documents where texts were cut.
      tokens: tokens in all rows.
      targets: tokens that are predicted and counted.
      rows: N.
      length: T.
      efficiency: share of the N*T slots that hold a token.
    """

    documents: int
    dropped: int
    pieces: int
    tokens: int
    targets: int
    rows: int
    length: int
    efficiency: float


def encode_source(
    source: Source, tokenizer: Tokenizer, packing: Packing, progress: Progress | None = None
) -> Iterator[tuple[np.ndarray, int] | None]:
    """Token ids of every document.

    A text gets the special tokens that the tokenizer adds. Prompt and answer are tokenised
    apart, as in `tasks.encode`; only the prompt gets special tokens.

    Args:
      source: the documents.
      tokenizer: turns text into token ids.
      packing: its `length`, `end` and `drop_long` are used.
      progress: told how far it is.

    Yields:
      (int32 [n], place of the first target), or None for a document that is left out: a text
      without tokens, or a long example with `drop_long`.

    Raises:
      ValueError: by name, an example longer than a row, or whose prompt or answer has no tokens.
    """
    tail = [] if packing.end is None else [packing.end]
    for index, item in enumerate(source):
        if isinstance(item, tuple):
            raise ValueError(f"{source.name} holds images, expected texts or prompts with answers")
        if isinstance(item, Example):
            parts = {
                "prompt": tokenizer.encode(item.prompt),
                "answer": tokenizer.encode(item.answer, add_special_tokens=False),
            }
            for part, found in parts.items():
                if not found:
                    raise ValueError(f"{source.label(index)}: the {part} has no tokens")
            first, ids = len(parts["prompt"]), [*parts["prompt"], *parts["answer"], *tail]
        else:
            first, text = 0, tokenizer.encode(item)
            ids = [*text, *tail] if text else []
        if progress is not None:
            progress(index + 1, len(source))
        left_out = not ids
        if isinstance(item, Example) and len(ids) > packing.length:
            left_out = packing.drop_long
            if not left_out:
                raise ValueError(
                    f"{source.label(index)} has {len(ids)} tokens with its answer, a sequence "
                    f"longer than a row of {packing.length}; a larger length takes it, "
                    "drop_long leaves it out"
                )
        yield None if left_out else (np.asarray(ids, np.int32), first)


def pack_source(
    source: Source, tokenizer: Tokenizer, packing: Packing, progress: Progress | None = None
) -> tuple[Batch, Report]:
    """Tokenises and packs a source that fits into memory.

    Args:
      source: the documents.
      tokenizer: turns text into token ids.
      packing: how documents become rows.
      progress: told how far it is.

    Returns:
      A `Batch` of numpy arrays [N,T] with `segments`; for prompts with answers `targets` is
      True at the answers, for texts it is None (every token after the first of a segment).

    Raises:
      ValueError: an example longer than a row or without tokens, or nothing left.
    """
    encoded = list(encode_source(source, tokenizer, packing, progress))
    kept = [document for document in encoded if document is not None]
    plan = plan_of(source, np.array([len(ids) for ids, _ in kept], np.int64), packing)
    tokens = np.concatenate([ids for ids, _ in kept])
    targets = None
    if source.kind == "examples":
        targets = np.concatenate([np.arange(len(ids)) >= first for ids, first in kept])
    (batch,) = fill_rows(plan, tokens, targets, block=plan.rows)
    counted = int(np.asarray(batch.target_mask).sum())
    return batch, report_of(plan, len(source), len(source) - len(kept), counted)


def plan_of(source: Source, sizes: np.ndarray, packing: Packing) -> Plan:
    """The plan of what was not left out.

    Raises:
      ValueError: everything was.
    """
    if not len(sizes):
        raise ValueError(
            f"nothing is left of {source.name}: each of its {len(source)} documents has no tokens "
            f"or more than a row's {packing.length}"
        )
    return plan_rows(sizes, packing.length, one_per_row=packing.one_per_row)


def report_of(plan: Plan, documents: int, dropped: int, targets: int) -> Report:
    """The figures of a plan."""
    tokens = int(plan.size.sum())
    return Report(
        documents, dropped, len(plan.size), tokens, targets, plan.rows, plan.length, plan.efficiency
    )
