"""tfds builders of our own data, stored as array_record: no TensorFlow, to build or to read.

    builder = task_builder("ioi", data_dir, count=500, seed=0)
    builder.download_and_prepare()
    builder.as_data_source("train")[0]

Importing this module registers `jaxheads_tasks` and `jaxheads_python_docs` with tfds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxheads import tasks
from jaxheads.data import corpus
from jaxheads.data.division import check_held_out
from jaxheads.data.records import to_record
from jaxheads.data.source import digest
from jaxheads.names import unknown

_VERSION = tfds.core.Version("1.0.0")
Generators = dict[str, Iterator[tuple[str, dict[str, Any]]]]


@dataclass(kw_only=True)
class TaskConfig(tfds.core.BuilderConfig):
    """Which examples a task's data set holds.

    Attributes:
      task: a name of `tasks.TASKS`.
      count: number of examples, both splits together.
      seed: of the examples and of the split.
      held_out: share of the groups that is held out.
      options: further options of that task.
    """

    task: str = ""
    count: int = 0
    seed: int = 0
    held_out: float = 0.25
    options: Mapping[str, Any] = field(default_factory=dict)


class JaxheadsTasks(tfds.core.GeneratorBasedBuilder):
    """Examples of one task, with no group on both sides of the split."""

    VERSION = _VERSION

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Examples of the task {config.task!r} of jaxheads.",
            features=tfds.features.FeaturesDict(
                {
                    **{n: text() for n in ("prompt", "answer", "wrong", "corrupted", "group")},
                    **{n: tfds.features.Sequence(text()) for n in ("answers", "wrongs")},
                    "needle": tfds.features.Tensor(shape=(2,), dtype=np.int32),
                }
            ),
            supervised_keys=("prompt", "answer"),
        )

    def _split_generators(self, dl_manager: Any) -> Generators:
        c = self.builder_config
        examples = tasks.generate(c.task, c.count, c.seed, **c.options)
        train, held_out = tasks.split(examples, c.held_out, c.seed)
        return {"train": self._numbered(train), "held_out": self._numbered(held_out)}

    def _generate_examples(self, examples: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        return self._numbered(examples)

    def _numbered(self, examples: list[tasks.Example]) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((f"{n:08d}", to_record(example)) for n, example in enumerate(examples))


class JaxheadsPythonDocs(tfds.core.GeneratorBasedBuilder):
    """The topics of CPython's own documentation, one document each."""

    VERSION = _VERSION

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Topics of the Python documentation that ship inside CPython.",
            features=tfds.features.FeaturesDict({"title": text(), "text": text()}),
            license="PSF-2.0",
        )

    def _split_generators(self, dl_manager: Any) -> Generators:
        return {split: self._generate_examples(split) for split in ("train", "held_out")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for document in corpus.python_docs(split):
            yield document.title, {"title": document.title, "text": document.text}


def task_builder(
    task: str,
    data_dir: str | os.PathLike[str],
    *,
    count: int,
    seed: int = 0,
    held_out: float = 0.25,
    **options: Any,
) -> JaxheadsTasks:
    """The builder of a task's data set; `download_and_prepare()` builds it.

    Args:
      task: a name of `tasks.TASKS`.
      data_dir: the folder of all data sets.
      count: number of examples, both splits together.
      seed: of the examples and of the split.
      held_out: share of the groups that is held out.
      **options: further options of that task.

    Raises:
      ValueError: an unknown task or option, or a share that is none.
    """
    check_held_out(held_out)
    known = tasks.options(task)
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of task {task!r}:", option, known))
    told = f"{task}-{count}-seed{seed}"
    if options or held_out != 0.25:
        told += "-" + digest([json.dumps(options, sort_keys=True, default=repr), held_out])[:8]
    config = TaskConfig(
        name=told, task=task, count=count, seed=seed, held_out=held_out, options=options
    )
    return JaxheadsTasks(
        config=config, data_dir=os.fspath(data_dir), file_format=tfds.core.FileFormat.ARRAY_RECORD
    )


def python_docs_builder(data_dir: str | os.PathLike[str]) -> JaxheadsPythonDocs:
    """The builder of the corpus; `download_and_prepare()` builds it.

    Its config is called after the version of Python and the corpus's fingerprint, because
    the text differs between versions.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    config = tfds.core.BuilderConfig(name=f"python{version}-{corpus.fingerprint()[:8]}")
    return JaxheadsPythonDocs(
        config=config, data_dir=os.fspath(data_dir), file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
