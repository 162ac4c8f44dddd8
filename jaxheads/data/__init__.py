"""Data for training: sources, packing, prepared rows and batches shared among hosts."""

import os

from jaxheads.data.batches import Batches
from jaxheads.data.corpus import corpus_size, python_docs
from jaxheads.data.disjoint import prove_disjoint
from jaxheads.data.packing import Plan, fill_rows, plan_rows
from jaxheads.data.rows import ArrayRows, FileRows, Rows, prepare
from jaxheads.data.source import Source
from jaxheads.data.sources import open_source
from jaxheads.data.tokenise import Packing, Progress, Report, pack_source


def build(name: str, data_dir: str | os.PathLike[str]) -> None:
    """Downloads and builds a data set that tfds knows, as array_record.

    Args:
      name: as tfds writes it, "NAME" or "NAME/CONFIG".
      data_dir: the folder of all data sets.

    Raises:
      ValueError: an unknown data set or config, or one that needs TensorFlow.
    """
    from jaxheads.data import registered  # tfds takes long to import

    registered.build(name, data_dir)


__all__ = [
    "ArrayRows",
    "Batches",
    "FileRows",
    "Packing",
    "Plan",
    "Progress",
    "Report",
    "Rows",
    "Source",
    "build",
    "corpus_size",
    "fill_rows",
    "open_source",
    "pack_source",
    "plan_rows",
    "prepare",
    "prove_disjoint",
    "python_docs",
]
