"""What a trained method is given and what it hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxheads.edits import Edits
from jaxheads.methods.retrieval_heads import Head
from jaxheads.model.batch import Batch
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Transformer
from jaxheads.tasks import Example

if TYPE_CHECKING:
    from jaxheads.data import Rows
    from jaxheads.text import Tokenizer
    from jaxheads.train.job import Job

ACTS = ("everywhere", "answers", "prompt_end")


@dataclass(frozen=True)
class TaskData:
    """Questions with known answers.

    Attributes:
      train: examples to learn from.
      held_out: examples to measure on; they share no group with the others.
      train_batch: all of `train` as arrays on the host; the answers are the targets.
      held_out_batch: all of `held_out`, of the same width.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    train_batch: Batch
    held_out_batch: Batch


@dataclass(frozen=True)
class TextData:
    """Running text, packed: rows whose items are `Batch`es [N,T] with segments.

    Attributes:
      train: rows to learn from.
      held_out: rows to measure on.
      texts: the documents of `train`, for what counts words or trains a tokenizer.
    """

    train: Rows
    held_out: Rows
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class ImageData:
    """Images of classes.

    Attributes:
      train: rows to learn from; an item is (float32 [N,height,width,C] in -1 to 1, int32 [N]).
      held_out: rows to measure on.
      classes: how many there are.
    """

    train: Rows
    held_out: Rows
    classes: int


Data = TaskData | TextData | ImageData


@dataclass(frozen=True)
class Tuned:
    """A changed model: edits, changed parameters, or both.

    Attributes:
      edits: to be given to the model.
      params: the leaves of the parameter tree that changed, nested as in it.
      heads: the heads concerned, best first; None where the method chooses none.
      trained: number of scalars that were trained.
      acts: where the edits act: at every token ("everywhere"), at the tokens that predict an
        answer's ("answers": the prompt's last and, while generating, every new one), or at the
        prompt's last token only ("prompt_end").
      scores: [L,H], by which the heads were chosen.
      model: a whole new model, of a method that makes one.
      beside: weights of the method's own that are no part of the model, a nested dict; saved as
        beside.safetensors under their paths, such as "head/kernel".
    """

    edits: Edits | None = None
    params: Tree | None = None
    heads: Sequence[Head] | None = None
    trained: int = 0
    acts: str = "everywhere"
    scores: np.ndarray | None = None
    model: Transformer | None = None
    beside: Tree | None = None


class Method(Protocol):
    """A frozen dataclass of settings, with this function.

    It may have others that a run asks for: `create(source, seed) -> (model, tokenizer)`, of a
    method that makes its own model from the training data; `measure(job, model, data, tuned)`
    instead of `jaxheads.methods.measure.measure`; and `examine(model, tokenizer, data, tuned)`,
    whose JSON is kept as examination.json for the report.
    """

    def train(
        self, job: Job, model: Transformer, tokenizer: Tokenizer, data: Any
    ) -> Mapping[str, Tuned]:
        """Trains, by name of the variant: the method's own first, then its controls."""


def placed(tuned: Tuned, batch: Batch) -> Edits | None:
    """The edits of a variant for a batch of prompts followed by answers, at the slots they act.

    Args:
      tuned: the variant.
      batch: numpy arrays; its targets are the answers.
    """
    if tuned.edits is None or tuned.acts == "everywhere":
        return tuned.edits
    predicted = np.asarray(batch.target_mask)
    predicts = np.concatenate([predicted[:, 1:], predicted[:, :1] & False], axis=1)
    if tuned.acts == "prompt_end":
        predicts &= np.cumsum(predicts, axis=1) == 1
    return tuned.edits.when(predicts)
