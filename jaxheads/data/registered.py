"""Data sets that tfds knows by name, read without TensorFlow wherever that is possible."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxheads.data.records import FIELDS, as_text, from_record
from jaxheads.data.source import Kind, Source, digest
from jaxheads.names import choose
from jaxheads.tasks.example import Example

_NotFound = tfds.core.registered.DatasetNotFoundError


def tfds_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None,
    text: str | None,
    prompt: str | None,
    answer: str | None,
) -> Source:
    """A built tfds data set, by random access.

    Args:
      name: as tfds writes it, "NAME", "NAME/CONFIG" or "NAME/CONFIG:VERSION".
      split: one of its splits, or a part of one such as "train[:90%]".
      data_dir: where data sets are built; None is tfds's own folder.
      text: the field that holds the text. Default "text".
      prompt: with `answer`, the fields that hold a question and its answer.
      answer: see `prompt`.

    Raises:
      ValueError: an unknown data set, config, split or field; a data set that needs
        TensorFlow, that is not built in `data_dir`, or that is not stored as array_record.
    """
    if (prompt is None) != (answer is None) or (text is not None and prompt is not None):
        raise ValueError(
            "a tfds data set is read by the option text, or by prompt and answer together; "
            f"got text={text!r}, prompt={prompt!r}, answer={answer!r}"
        )
    builder = _builder(name, data_dir)
    known = sorted(builder.info.splits)
    if not known:
        raise ValueError(
            f"data set {name!r} is not built in {builder.data_dir}. Build it with "
            f"jaxheads.data.build({name!r}, data_dir)"
        )
    choose(f"split of {name!r}:", re.split(r"\[", split, maxsplit=1)[0], known)
    features = sorted(builder.info.features)
    ours = not (text or prompt) and set(FIELDS) <= set(features)
    fields = _fields(name, features, text, prompt, answer)
    data = _data(name, builder, split)
    where = f"tfds:{name} ({split})"

    def get(index: int) -> str | Example:
        record = data[index]
        try:
            if ours:
                return from_record(record)
            found = [as_text(record[field]) for field in fields]
        except ValueError as error:
            raise ValueError(f"item {index} of {where}: {error}") from None
        return found[0] if len(found) == 1 else Example(found[0], found[1])

    kind: Kind = "text" if len(fields) == 1 else "examples"
    info = builder.info
    size = [info.full_name, split, info.dataset_size, len(data), fields]
    marks = [get(index) for index in (0, len(data) - 1)] if len(data) else []
    if not marks:
        raise ValueError(f"{where} is empty")
    label = f"item {{}} of {where}".format
    return Source(where, kind, len(data), get, label, digest([*size, *marks]))


def build(name: str, data_dir: str | os.PathLike[str]) -> None:
    """Downloads and builds a data set that tfds knows, as array_record.

    Raises:
      ValueError: an unknown data set or config, or one that needs TensorFlow.
    """
    builder = _builder(name, data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(_needs(name, error)) from error


def _builder(name: str, data_dir: str | os.PathLike[str] | None, **how: Any) -> Any:
    folder = None if data_dir is None else os.fspath(data_dir)
    base, *config = re.split(r"[/:]", name)
    try:
        known = _class(base)
        configs = list(known.builder_configs) if known else []
        if config and configs and "/" in name:
            choose(f"config of {base!r}:", config[0], configs)
        # Also a data set of unknown name, if its files are there: they describe themselves.
        return tfds.builder(name, data_dir=folder, try_gcs=False, **how)
    except ImportError as error:
        raise ValueError(_needs(name, error)) from error
    except _NotFound:
        raise ValueError(_unknown(base)) from None


def _class(base: str) -> Any:
    try:
        return tfds.builder_cls(base)
    except _NotFound:
        # One module that fails to import hides all that tfds would import after it.
        module = _in_package().get(base)
    if module is None:
        return None
    importlib.import_module(module)
    return tfds.builder_cls(base)


def _data(name: str, builder: Any, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except ImportError as error:
        raise ValueError(_needs(name, error)) from error
    except NotImplementedError as error:
        raise ValueError(
            f"data set {name!r} in {builder.data_dir} is stored as "
            f"{builder.info.file_format.value}, expected array_record. Build it again, in another "
            f"folder, with jaxheads.data.build({name!r}, data_dir)"
        ) from error


def _fields(
    name: str, features: list[str], text: str | None, prompt: str | None, answer: str | None
) -> list[str]:
    if prompt is not None and answer is not None:
        wanted = [prompt, answer]
    elif text is not None:
        wanted = [text]
    elif "text" in features:
        wanted = ["text"]
    elif {"prompt", "answer"} <= set(features):
        wanted = ["prompt", "answer"]
    else:
        raise ValueError(
            f"data set {name!r} has no field 'text'; name one of its fields by the option text, "
            f"or two by prompt and answer: {', '.join(features)}"
        )
    return [choose(f"field of {name!r}:", field, features) for field in wanted]


def _needs(name: str, error: ImportError) -> str:
    told = re.search(r"No module named '(\w+)", str(error))
    missing = told[1] if told else str(error)
    extra = ": pip install 'jaxheads[tensorflow]'" if missing == "tensorflow" else ""
    package = "TensorFlow" if missing == "tensorflow" else f"the package {missing!r}"
    return f"data set {name!r} needs {package}, which is not installed{extra}"


def _unknown(name: str) -> str:
    known = set(tfds.list_builders(with_community_datasets=False)) | set(_in_package())
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"unknown tfds data set {name!r}.{hint} tfds knows {len(known)} by name: "
        "tensorflow_datasets.list_builders()"
    )


def _in_package() -> Mapping[str, str]:
    """Modules of tfds's own builders by the name of the data set, without importing them."""
    root = Path(tfds.__file__).parent
    found = {}
    for path in root.rglob("*.py"):
        if path.name.endswith("_test.py") or "core" in path.relative_to(root).parts:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        for base in re.findall(r"^class ([A-Z]\w*)\([^)]*(?:Builder|Dataset)\w*\b", source, re.M):
            found[tfds.core.naming.camelcase_to_snakecase(base)] = ".".join(parts)
    return found
