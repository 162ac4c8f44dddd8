"""`open_source`: data by a short name, checked before any long work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaxheads import tasks
from jaxheads.data import corpus
from jaxheads.data.division import SPLITS, check_held_out
from jaxheads.data.files import jsonl_source, text_source
from jaxheads.data.source import Source, digest
from jaxheads.names import choose, unknown

KINDS = ("corpus", "task", "tfds", "text", "jsonl", "images")
CORPORA = (corpus.NAME,)
_OPTIONS = {
    "corpus": (),
    "tfds": ("text", "prompt", "answer"),
    "text": ("held_out", "unit"),
    "jsonl": ("held_out",),
    "images": ("held_out", "seed"),
}


def open_source(
    spec: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Source:
    """Opens texts, prompts with answers, or images of classes.

    | spec | what it is | options |
    |---|---|---|
    | `corpus:python-docs` | the documentation inside CPython | |
    | `task:NAME` | examples of a task, divided by group | `count` (60), `seed` (0), `held_out` (0.25), those of the task |
    | `tfds:NAME[/CONFIG]` | a data set built by tfds as array_record | `text`, or `prompt` and `answer`: names of fields |
    | `text:PATH` | one text per file; PATH may be a glob pattern | `held_out` (0.1), `unit` ("file"; "block": between blank lines) |
    | `jsonl:PATH` | one object per line, with `text` or with `prompt` and `answer` | `held_out` (0.1) |
    | `images:digits` | 1,797 handwritten digits of 8 x 8 pixels, with scikit-learn | `held_out` (0.2), `seed` (0) |

    Args:
      spec: "KIND:WHICH", one of the above.
      split: "train", "held_out" or "all"; for tfds, one of the data set's own.
      data_dir: where tfds data sets are built; None is tfds's own folder.
      options: of that kind of source.

    Raises:
      ValueError: an unknown kind, name, option or split (the nearest are suggested); a value
        that an option refuses; and, with the file and the line or byte, everything that is
        wrong in a file.
    """  # noqa: E501  (a table's rows cannot be broken)
    kind, colon, which = spec.partition(":")
    if not colon or not which:
        raise ValueError(
            f"data source {spec!r} is not of the form KIND:WHICH with a KIND of {', '.join(KINDS)}"
        )
    choose("kind of data source", kind, KINDS)
    chosen = dict(options or {})
    if kind == "task":
        return _task(which, split, **chosen)
    for option in chosen:
        if option not in _OPTIONS[kind]:
            raise ValueError(unknown(f"option of {kind!r} sources:", option, _OPTIONS[kind]))
    if kind == "tfds":
        from jaxheads.data.registered import tfds_source  # tfds takes long to import

        fields = {name: chosen.get(name) for name in _OPTIONS["tfds"]}
        return tfds_source(which, split, data_dir=data_dir, **fields)
    choose("split", split, SPLITS)
    if kind == "corpus":
        return _corpus(choose("corpus", which, CORPORA), split)
    if kind == "images":
        from jaxheads.data.images import open_images

        return open_images(which, split, **chosen)
    held_out = chosen.get("held_out", 0.1)
    check_held_out(held_out)
    if kind == "text":
        return text_source(which, split, held_out=held_out, unit=chosen.get("unit", "file"))
    return jsonl_source(which, split, held_out=held_out)


def _corpus(name: str, split: str) -> Source:
    documents = corpus.python_docs(split)
    return Source(
        name=f"corpus:{name} ({split})",
        kind="text",
        count=len(documents),
        get=lambda index: documents[index].text,
        label=lambda index: f"topic {documents[index].title!r}",
        fingerprint=digest(["corpus", name, split, corpus.fingerprint()]),
    )


def _task(
    name: str,
    split: str,
    *,
    count: int = 60,
    seed: int = 0,
    held_out: float = 0.25,
    **options: Any,
) -> Source:
    tasks.options(name)  # an unknown task is the first thing to say
    choose("split", split, SPLITS)
    check_held_out(held_out)
    examples = tasks.generate(name, count, seed, **options)
    if split != "all":
        train, held = tasks.split(examples, held_out, seed)
        examples = train if split == "train" else held
    return Source(
        name=f"task:{name} ({split})",
        kind="examples",
        count=len(examples),
        get=lambda index: examples[index],
        label=lambda index: f"example {index} of task {name!r}",
        fingerprint=digest(["task", *examples]),
    )
