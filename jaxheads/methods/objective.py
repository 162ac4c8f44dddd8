"""What a method fits: the answers of a task's examples, or running text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from jaxheads.data.rows import ArrayRows
from jaxheads.methods.method import Data, TaskData
from jaxheads.model.batch import Batch
from jaxheads.model.transformer import Transformer
from jaxheads.train.losses import language_loss
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.data.rows import Rows


def rows_of(data: Data) -> dict[str, Rows]:
    """The arguments `rows` and `held_out` of `Job.fit`.

    Of text each item is a `Batch`; of a task it is (`Batch`, `Answers`), so that only the answer
    tokens are unembedded.
    """
    if not isinstance(data, TaskData):
        return {"rows": data.train, "held_out": data.held_out}
    sides = {"rows": data.train_batch, "held_out": data.held_out_batch}
    return {name: ArrayRows((batch, batch.answers())) for name, batch in sides.items()}


def fit_loss(model: Transformer, item: Any, **options: Any) -> tuple[jax.Array, Metrics]:
    """`language_loss` of an item of `rows_of`; the options are its own."""
    parts = (item,) if isinstance(item, Batch) else item
    return language_loss(model, *parts, **options)
