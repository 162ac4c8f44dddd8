"""How good a changed model is: on what it was trained for, and on what it was not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxheads.methods.method import Data, TaskData, Tuned, placed
from jaxheads.metrics import answer_scores
from jaxheads.model.batch import Batch
from jaxheads.model.context import Edit
from jaxheads.model.layout import whole
from jaxheads.model.parameters import flatten, nest
from jaxheads.model.transformer import Transformer
from jaxheads.train.job import Job

Array = jax.Array
Tree = TypeVar("Tree")
METRICS = ("loss", "token_accuracy", "exact")


def apply(model: Transformer, tuned: Tuned) -> Transformer:
    """The model with the parameters of a variant."""
    if tuned.model is not None:
        return tuned.model
    if tuned.params is None:
        return model
    leaves = dict(flatten(model.params)) | dict(flatten(tuned.params))
    return Transformer(model.config, nest(leaves))


def measure(
    job: Job, model: Transformer, data: Data, tuned: Tuned | None = None, batch_size: int = 32
) -> dict[str, float]:
    """Means over the held-out rows.

    Args:
      job: the devices.
      model: the model before training.
      data: whose held-out side is measured.
      tuned: what was changed; None for nothing.
      batch_size: rows at a time, a multiple of what the mesh divides rows by.

    Returns:
      "loss", nats per target token, "token_accuracy", and "exact", the share of rows whose
      answer is right to the last token (not for text).
    """
    tuned = Tuned() if tuned is None else tuned
    if isinstance(data, TaskData):
        batch = data.held_out_batch
        found = rows_scores(job, apply(model, tuned), batch, placed(tuned, batch), batch_size)
        return {name: float(found[name].mean()) for name in METRICS}
    text: Any = data.held_out[np.arange(len(data.held_out))]
    # Running text is one long answer: it has no end of a prompt.
    edits = None if tuned.acts == "prompt_end" else tuned.edits
    found = rows_scores(job, apply(model, tuned), text, edits, batch_size)
    weights = np.asarray(text.target_mask).sum(axis=1)
    counted = weights > 0
    return {
        name: float(np.average(found[name][counted], weights=weights[counted]))
        for name in METRICS[:2]
    }


def readable(tree: Tree) -> Tree:
    """A pytree whose leaves every process can read: those divided over processes as numpy arrays.

    All processes call it.
    """

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)


def in_parts(
    job: Job,
    function: Callable[[Any, Any, Any], Any],
    weights: Any,
    edits: Mapping[str, Edit] | None,
    rows: Any,
    batch_size: int,
) -> Any:
    """A function of all rows, computed for some at a time over the devices of a job.

    Args:
      job: the devices.
      function: from (weights, edits, rows) to a pytree of arrays with a leading axis of rows.
      weights: the same for all rows; placed on the devices.
      edits: for all rows: a mask of slots in them has the N rows too.
      rows: a pytree of numpy arrays with a leading axis of N.
      batch_size: rows at a time, a multiple of what the mesh divides rows by.

    Returns:
      The pytree of the function, numpy arrays [N,...].
    """
    count, (host, hosts) = len(jax.tree.leaves(rows)[0]), job.slice
    share, parts = batch_size // hosts, []
    with job.devices():
        weights = job.place(weights)
        for first in range(0, count, batch_size):
            # The last part repeats the last row, so that all have one shape.
            taken = np.minimum(np.arange(first, first + batch_size), count - 1)
            mine = taken[host * share : (host + 1) * share]
            given = job.send(jax.tree.map(lambda leaf, mine=mine: leaf[mine], rows))
            found = readable(function(weights, _rows_of(edits, taken, count), given))
            left = count - first
            parts.append(jax.tree.map(lambda leaf, n=left: leaf[:n], jax.device_get(found)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def rows_scores(
    job: Job,
    model: Transformer,
    batch: Batch,
    edits: Mapping[str, Edit] | None,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """`jaxheads.metrics.answer_scores` of every row, float32 [N] each.

    Args:
      job: the devices.
      model: the model.
      batch: all rows, numpy arrays [N,T].
      edits: as in `in_parts`, and so is `batch_size`.
      batch_size: the same.
    """
    rows = (batch, None if batch.targets is None else batch.answers())
    found: dict[str, np.ndarray] = in_parts(job, _scores, model, edits, rows, batch_size)
    return found


def _rows_of(edits: Mapping[str, Edit] | None, taken: np.ndarray, rows: int) -> Any:
    """The edits with the masks [1,N,T] of `Edits.when` cut to the rows taken."""

    def cut(path: Any, leaf: Array) -> Array:
        masks = getattr(path[-1], "name", "") == "tokens" and leaf.shape[1] == rows
        return leaf[:, taken] if masks else leaf

    return edits and jax.tree_util.tree_map_with_path(cut, edits)


@jax.jit
def _scores(
    model: Transformer, edits: Mapping[str, Edit] | None, rows: tuple[Batch, Any]
) -> dict[str, Array]:
    scores = answer_scores(model, *rows, edits=edits)
    return {name: whole(values, 0) for name, values in scores.items()}
