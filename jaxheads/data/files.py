"""Sources in the user's own files: texts, and JSON Lines of texts or of prompts with answers."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxheads.data.corpus import paragraphs
from jaxheads.data.division import in_split
from jaxheads.data.source import Source, digest
from jaxheads.names import choose
from jaxheads.tasks.example import Example

UNITS = ("file", "block")


def text_source(pattern: str, split: str, *, held_out: float, unit: str) -> Source:
    """Texts from files.

    Args:
      pattern: a path, or a glob pattern ("**" reaches into subfolders).
      split: "train", "held_out" or "all"; sides are decided by the text.
      held_out: expected share of the documents that is held out.
      unit: what a document is: a "file", or a "block" between blank lines.

    Raises:
      ValueError: no file, a folder, a file that is empty or not UTF-8 (with the byte), an
        unknown unit, or a split that no document falls into.
    """
    choose("unit of text", unit, UNITS)
    kept: list[tuple[Path, int]] = []
    marks: list[str] = []
    seen = 0
    for path in _paths(pattern):
        for number, text in enumerate(_units(path, unit)):
            seen += 1
            if in_split(text, split, held_out):
                kept.append((path, number))
                marks.append(_hash(text))
    _not_empty(f"text:{pattern}", split, len(kept), seen)
    # Files are read again when an item is asked for; the last one is kept for its next block.
    read = lru_cache(maxsize=1)(_units)

    def get(index: int) -> str:
        path, number = kept[index]
        return read(path, unit)[number]

    def label(index: int) -> str:
        path, number = kept[index]
        return str(path) if unit == "file" else f"{path} block {number + 1}"

    return Source(
        f"text:{pattern} ({split})", "text", len(kept), get, label, digest(["text", *marks])
    )


def jsonl_source(path: str, split: str, *, held_out: float) -> Source:
    """One JSON object per line, all of one kind.

    The first line decides the kind: an object with `text` is a text; one with `prompt` and
    `answer` is an example, which may also have `wrong`, `corrupted`, `group`, `answers` and
    `wrongs`. Fields of other names are ignored.

    Args:
      path: the file.
      split: "train", "held_out" or "all"; sides are decided by the text, or by the group
        (where there is none, the prompt).
      held_out: expected share that is held out.

    Raises:
      ValueError: no such file, an empty one, one that is not UTF-8; a line that is blank or
        no JSON object, or in which a field is missing, empty or of another type (with file
        and line); or a split that no line falls into.
    """
    file = _file(Path(path))
    starts: list[tuple[int, int]] = []
    marks: list[str] = []
    position, kind, lines = 0, "", 0
    with file.open("rb") as stream:
        for lines, raw in enumerate(stream, start=1):
            fields = _object(file, lines, raw, position)
            kind = kind or ("text" if "text" in fields else "examples")
            item = _item(file, lines, fields, kind)
            key = item if isinstance(item, str) else item.group or item.prompt
            if in_split(key, split, held_out):
                starts.append((position, lines))
                marks.append(_hash(repr(item)))
            position += len(raw)
    if not lines:
        raise ValueError(f"{file} is empty, expected one JSON object per line")
    _not_empty(f"jsonl:{path}", split, len(starts), lines)

    def get(index: int) -> str | Example:
        start, number = starts[index]
        with file.open("rb") as stream:
            stream.seek(start)
            return _item(file, number, _object(file, number, stream.readline(), start), kind)

    return Source(
        name=f"jsonl:{path} ({split})",
        kind="text" if kind == "text" else "examples",
        count=len(starts),
        get=get,
        label=lambda index: f"{file}:{starts[index][1]}",
        fingerprint=digest(["jsonl", *marks]),
    )


def _paths(pattern: str) -> list[Path]:
    if glob.has_magic(pattern) and not Path(pattern).exists():
        found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not found:
            raise ValueError(f"no file matches {pattern!r}")
        return [Path(path) for path in found]
    return [_file(Path(pattern))]


def _file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file (or a pattern: {path}/*.txt)")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _units(path: Path, unit: str) -> list[str]:
    raw = path.read_bytes()
    text = _utf8(raw, f"{path}", 0)
    if not text.strip():
        raise ValueError(f"{path} is empty, expected text")
    return [text] if unit == "file" else paragraphs(text)


def _utf8(raw: bytes, where: str, start: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8: byte {start + error.start} of the file ({error.reason})"
        ) from None


def _object(file: Path, number: int, raw: bytes, start: int) -> dict[str, Any]:
    where = f"{file}:{number}"
    text = _utf8(raw, where, start)
    if not text.strip():
        raise ValueError(f"{where}: the line is empty, expected a JSON object")
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ValueError(f"{where}: not JSON: {reason}{column}") from None
    if "\\ud" in text.lower() and not _encodes(value):
        raise ValueError(f"{where}: holds half of a surrogate pair, which is no character")
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _item(file: Path, number: int, fields: Mapping[str, Any], kind: str) -> str | Example:
    where = f"{file}:{number}"
    needed = ("text",) if kind == "text" else ("prompt", "answer")
    for name in needed:
        if name not in fields:
            alone = " (or text)" if kind == "examples" and number == 1 else ""
            raise ValueError(
                f"{where}: no field {name!r}{alone}; it has {', '.join(fields) or 'none'}"
            )
        if not isinstance(fields[name], str) or not fields[name]:
            raise ValueError(
                f"{where}: {name} must be a text that is not empty, got {fields[name]!r}"
            )
    if kind == "text":
        return str(fields["text"])
    for name in ("wrong", "corrupted", "group"):
        if not isinstance(fields.get(name), str | None):
            raise ValueError(f"{where}: {name} must be a text, got {fields[name]!r}")
    several = {name: fields.get(name) or [] for name in ("answers", "wrongs")}
    for name, values in several.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}: {name} must be a list of texts, got {values!r}")
    try:
        return Example(
            prompt=fields["prompt"],
            answer=fields["answer"],
            group=fields.get("group") or "",
            wrong=fields.get("wrong"),
            corrupted=fields.get("corrupted"),
            answers=tuple(several["answers"]),
            wrongs=tuple(several["wrongs"]),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _encodes(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _not_empty(name: str, split: str, kept: int, of: int) -> None:
    if not kept:
        raise ValueError(
            f"split {split!r} of {name} is empty: none of its {of} documents falls into it. "
            "Use split 'all', another held_out, or more documents"
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
