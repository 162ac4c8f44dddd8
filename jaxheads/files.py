"""Single files: checked before the work, complete or absent after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_target(path: Path | None) -> None:
    """Refuses a file that could not be written.

    Raises:
      ValueError: it is a folder, or lies in something that is not a writable folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a directory, expected a file to write")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {parent} is not a folder that can be written to")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON by renaming a complete file into place.

    Raises:
      ValueError: NaN or infinity in the value, which JSON cannot hold.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Writes text by renaming a complete file into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
