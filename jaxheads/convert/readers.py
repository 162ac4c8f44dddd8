"""What every open file of weights looks like: names and shapes at once, arrays when asked for.

Formats that run code when opened (pickled `.bin`, `.pt`, `.pth`) are never read.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import ml_dtypes
import numpy as np

FLOATS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Plain floats, by the name that safetensors and GGUF both give them."""


class Reader:
    """An open file, or directory, of named tensors. Use it as a context manager.

    Attributes:
      where: the path, for messages.
      config: the metadata, by key.
      shapes: shape of every tensor, by name, known without reading any.
      dtypes: the stored type of every tensor, by name, as the format spells it.
    """

    where: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its stored dtype (float32 if it is quantised); threads may share it.

        What is stored plainly is a read-only view of the file: only what is touched is read,
        and dropping the view frees it.
        """
        raise NotImplementedError

    def readable(self, name: str) -> bool:
        """Whether a tensor that the file has is of a type that can be read."""
        return True

    def close(self) -> None:
        """Closes the files."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def map_array(
    file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray:
    """A read-only array that is a part of a file.

    The map is of this array alone, so dropping the array unmaps its pages, and resident
    memory falls again.

    Args:
      file: the open file.
      offset: byte at which the array starts; any, aligned or not.
      shape: the array's shape.
      dtype: its dtype.
    """
    count = math.prod(shape)
    if count == 0:  # a map of length 0 would be of the whole file
        return np.empty(shape, dtype)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count * dtype.itemsize
    pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(pages, dtype, count, offset - start).reshape(shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: the file is missing or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def some(names: list[str], most: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
