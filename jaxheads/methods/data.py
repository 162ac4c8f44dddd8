"""What a run learns from, opened by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxheads import tasks
from jaxheads.data import ArrayRows, Packing, Rows, Source, open_source, pack_source, prepare
from jaxheads.methods.method import Data, ImageData, TaskData, TextData
from jaxheads.text import Tokenizer

Scalar = str | int | float | bool


@dataclass(frozen=True)
class DataSettings:
    """Where examples come from.

    Attributes:
      source: what `jaxheads.data.open_source` opens: "task:counterfactual_capitals",
        "corpus:python-docs", "jsonl:PATH", "text:PATH", "tfds:NAME", "images:digits".
      options: of the source, e.g. {count = 160, held_out = 0.25}. A task without a `seed` takes
        that of the run.
      length: T, tokens of a row; None for the longest example of a task, 128 of text.
      train: the split to learn from.
      held_out: the split to measure on.
      data_dir: where tfds data sets are built; None for tfds's own folder.
      limit: most rows of each split; None for all.
      cache: folder in which tokenised text is kept, for texts beyond memory; None keeps it
        there.
    """

    source: str = "task:counterfactual_capitals"
    options: dict[str, Scalar] = field(default_factory=dict)
    length: int | None = None
    train: str = "train"
    held_out: str = "held_out"
    data_dir: str | None = None
    limit: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit must be at least 1 row, got {self.limit}")


def open_splits(settings: DataSettings, seed: int) -> tuple[Source, Source]:
    """The two splits, before anything is tokenised.

    Raises:
      ValueError: as `open_source`.
    """
    options: Mapping[str, Any] = settings.options
    if settings.source.startswith("task:"):
        options = {"seed": seed, **options}
    train, held_out = (
        open_source(settings.source, split, data_dir=settings.data_dir, options=options)
        for split in (settings.train, settings.held_out)
    )
    return train, held_out


def encode_splits(
    settings: DataSettings, splits: tuple[Source, Source], tokenizer: Tokenizer | None
) -> Data:
    """Both splits for a method; images need no tokenizer.

    Raises:
      ValueError: an example longer than `length`, or one without tokens.
    """
    if splits[0].kind == "images":
        sides = [source.images() for source in splits]
        classes = 1 + max(int(labels.max()) for _, labels in sides)
        train, held = (
            ArrayRows(jax.tree.map(lambda leaf: leaf[: settings.limit], side)) for side in sides
        )
        return ImageData(train, held, classes)
    if tokenizer is None:
        raise ValueError(f"{splits[0].name} needs a tokenizer, and the model has none")
    if splits[0].kind == "examples":
        return _examples(settings, splits, tokenizer)
    packing = Packing(length=settings.length or 128, end=tokenizer.eos_id)

    def rows(source: Source) -> Rows:
        if settings.cache is not None:
            found: Rows = prepare(source, tokenizer, packing, Path(settings.cache))
        else:
            found = ArrayRows(pack_source(source, tokenizer, packing)[0])
        if settings.limit is None or settings.limit >= len(found):
            return found
        return ArrayRows(found[np.arange(settings.limit)])

    return TextData(rows(splits[0]), rows(splits[1]), tuple(splits[0].texts()))


def _examples(
    settings: DataSettings, splits: tuple[Source, Source], tokenizer: Tokenizer
) -> TaskData:
    train, held_out = (source.examples()[: settings.limit] for source in splits)
    # One width for both, so that one program serves both.
    width = settings.length or tasks.encode([*train, *held_out], tokenizer).batch.tokens.shape[1]
    batches = [tasks.encode(side, tokenizer, length=width).batch for side in (train, held_out)]
    return TaskData(train, held_out, *batches)
