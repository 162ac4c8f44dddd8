"""Writing a directory whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def fresh_directory(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well.

    It stands next to the target, so that the last step is one rename. If the block
    fails, it is removed and the target is as it was. Of several processes all enter and
    leave together, in the same directory, which the first makes and renames.

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
    temporary = target.with_name(f".{target.name}.{_number():08x}")
    first = jax.process_index() == 0
    try:
        if first:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
    except OSError as error:
        raise ValueError(f"cannot write to {target.parent}: {error.strerror}") from error
    _meet(f"made {temporary.name}")
    try:
        yield temporary
        _meet(f"wrote {temporary.name}")
        if first:
            old = temporary.with_name(temporary.name + ".old")
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        _meet(f"renamed {temporary.name}")
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def _number() -> int:
    """A random number, the same in all processes."""
    number = secrets.randbits(31)
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return number


def _meet(where: str) -> None:
    """Waits for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
