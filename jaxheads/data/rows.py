"""`Rows`: what batches are drawn from; in memory, or prepared once in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxheads.data.packing import fill_rows
from jaxheads.data.source import Source, digest
from jaxheads.data.tokenise import (
    Packing,
    Progress,
    Report,
    encode_source,
    plan_of,
    report_of,
)
from jaxheads.files import write_json
from jaxheads.model.batch import Batch
from jaxheads.text import Tokenizer

_FORMAT = 1
_REPORT = "report.json"


class Rows(Protocol):
    """N rows by number."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, indices: np.ndarray) -> Any:
        """The rows with these numbers [B]: a pytree of numpy arrays with leading axis B."""


class ArrayRows:
    """Rows of a pytree of arrays in memory."""

    def __init__(self, tree: Any) -> None:
        """Takes a pytree of arrays with a common leading axis of N rows.

        Raises:
          ValueError: no arrays, or arrays whose leading axes differ.
        """
        self.tree = jax.tree.map(np.asarray, tree)
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(self.tree)}
        if len(sizes) != 1 or None in sizes:
            shapes = [leaf.shape for leaf in jax.tree.leaves(self.tree)]
            raise ValueError(f"rows need arrays with one common leading axis, got shapes {shapes}")

    def __len__(self) -> int:
        """N."""
        return int(jax.tree.leaves(self.tree)[0].shape[0])

    def __getitem__(self, indices: np.ndarray) -> Any:
        """The rows with these numbers."""
        return jax.tree.map(lambda leaf: leaf[indices], self.tree)


class FileRows:
    """Packed rows in a folder that `prepare` wrote; only the rows asked for are read.

    Attributes:
      folder: where they are.
      report: what packing did.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a folder.

        Raises:
          ValueError: it is not a folder of prepared rows, or one of its files is damaged.
        """
        self.folder = Path(folder)
        try:
            told = json.loads((self.folder / _REPORT).read_text(encoding="utf-8"))
            self.report = Report(**told["report"])
            arrays = {
                name: np.load(self.folder / f"{name}.npy", mmap_mode="r")
                for name in ("tokens", "segments", *(["targets"] if told["targets"] else []))
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder} does not hold whole prepared rows ({error}): delete it and prepare "
                "them again"
            ) from error
        shape = (self.report.rows, self.report.length)
        for name, array in arrays.items():
            if array.shape != shape:
                raise ValueError(
                    f"{self.folder / name}.npy has shape {array.shape}, expected {shape}: delete "
                    "the folder and prepare the rows again"
                )
        self._tokens, self._segments = arrays["tokens"], arrays["segments"]
        self._targets = arrays.get("targets")

    def __len__(self) -> int:
        """N."""
        return self.report.rows

    def __getitem__(self, indices: np.ndarray) -> Batch:
        """The rows with these numbers [B], as a `Batch` of numpy arrays [B,T]."""
        segments = self._segments[indices].astype(np.int32)
        targets = None if self._targets is None else np.asarray(self._targets[indices])
        return Batch(self._tokens[indices].astype(np.int32), segments > 0, targets, segments)


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    packing: Packing,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> FileRows:
    """Tokenises and packs a source once; whoever asks again gets what is there.

    The rows lie in a subfolder of `folder` named by what they depend on: the source's
    documents, the tokenizer and the packing. It is written under another name and renamed, so
    it is whole or absent; of two processes that prepare at once, the first to end wins, and
    both read the same. Tokens pass through the disk: memory holds one document and the sizes.

    Args:
      source: the documents.
      tokenizer: turns text into token ids.
      packing: how documents become rows.
      folder: where prepared data is kept; made if it is not there.
      progress: told how far the tokenising is; not called if nothing is to be done.

    Raises:
      ValueError: an example longer than a row or without tokens, nothing left, or prepared rows
        that are damaged.
      OSError: the folder cannot be written, the disk is full.
    """
    ready = Path(folder) / fingerprint(source, tokenizer, packing)[:16]
    if ready.is_dir():
        return FileRows(ready)
    with _whole(ready) as partial:
        _write(source, tokenizer, packing, partial, progress)
    return FileRows(ready)


def fingerprint(source: Source, tokenizer: Tokenizer, packing: Packing) -> str:
    """Hex SHA-256 of all that prepared rows depend on."""
    known = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
    return digest([_FORMAT, source.kind, source.fingerprint, known, packing])


def _write(
    source: Source,
    tokenizer: Tokenizer,
    packing: Packing,
    folder: Path,
    progress: Progress | None,
) -> None:
    stream = folder / "stream.bin"
    sizes, firsts = [], []
    with stream.open("wb") as out:
        for document in encode_source(source, tokenizer, packing, progress):
            if document is not None:
                ids, first = document
                out.write(ids.tobytes())
                sizes.append(len(ids))
                firsts.append(first)
    plan = plan_of(source, np.asarray(sizes, np.int64), packing)
    tokens = np.memmap(stream, np.int32, "r")
    targets = None
    if source.kind == "examples":
        ends = np.cumsum(sizes)
        targets = np.zeros(len(tokens), bool)
        for first, size, end in zip(firsts, sizes, ends, strict=True):
            targets[end - size + first : end] = True
    shape = (plan.rows, plan.length)
    small = np.uint16 if int(tokens.max()) < 2**16 else np.int32
    names = {"tokens": small, "segments": np.uint16 if packing.length < 2**16 else np.int32}
    kinds = names | ({"targets": np.bool_} if targets is not None else {})
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
        for name, kind in kinds.items()
    }
    written = counted = 0
    for batch in fill_rows(plan, tokens, targets):
        here = slice(written, written + len(batch.tokens))
        for name, array in arrays.items():
            array[here] = getattr(batch, name)
        written = here.stop
        counted += int(np.asarray(batch.target_mask).sum())
    for array in arrays.values():
        array.flush()
    report = report_of(plan, len(source), len(source) - len(sizes), counted)
    told = {"source": source.name, "targets": targets is not None, "report": asdict(report)}
    write_json(folder / _REPORT, told)
    del tokens
    stream.unlink()


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, renamed to `folder` in the end, or removed on an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same rows
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
