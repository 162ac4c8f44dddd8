"""Writing a directory whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def fresh_directory(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well.

    It stands next to the target, so that the last step is one rename. If the block
    fails, it is removed and the target is as it was.

    Args:
      target: the directory to write; its parents are created.
      overwrite: whether a target that is there and not empty may be replaced.

    Yields:
      The temporary directory.

    Raises:
      ValueError: on entry, before any work: the target is a file, is not empty, or
        its folder cannot be written to.
    """
    target = Path(target).absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a directory to write to")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} exists and is not empty; choose another directory or empty it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield temporary
        old = temporary.with_name(temporary.name + ".old")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
