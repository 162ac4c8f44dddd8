"""A run whose folder is an address, such as gs://bucket/run: written here, kept there.

Objects of a bucket cannot be appended to or renamed. So the small files of a run (log, results,
what was trained) are written to a temporary folder of this machine and copied. Checkpoints do not
pass through here: orbax writes them to the address itself.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxheads.train.workdir import is_address, run_path

EVERY = 30.0
"""Seconds between copies of the log: what a `kill -9` can cost of it."""


@contextlib.contextmanager
def mirrored(workdir: str | os.PathLike[str], *, sends: bool = True) -> Iterator[Path]:
    """The folder in which this process writes the files of a run.

    Args:
      workdir: of the run. A local one is used as it is. For an address it is a temporary folder
        that begins with the files lying there (not its folders), and is copied there when the
        block ends, however it ends.
      sends: whether this process is the one that copies.

    Yields:
      A local folder.
    """
    path = run_path(workdir)
    if not is_address(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="jaxheads-") as name:
        local = Path(name)
        fetch(path, local)
        try:
            yield local
        finally:
            if sends:
                send(local, path)


def fetch(there: Any, local: Path) -> None:
    """Copies the files of a folder at an address, not those of its subfolders."""
    if there.is_dir():
        for file in there.iterdir():
            if file.is_file():
                (local / file.name).write_bytes(file.read_bytes())


def send(local: Path, there: Any, pattern: str = "**/*") -> None:
    """Copies the files of a local folder that match to an address."""
    for file in sorted(local.glob(pattern)):
        if file.is_file():
            target = there / file.relative_to(local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


class Sender:
    """A writer that copies the logs to the address of the run every now and then."""

    def __init__(
        self, local: Path, workdir: Any, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Copies nothing yet.

        Args:
          local: the folder in which the logs are written.
          workdir: the address, as `run_path` gives it.
          clock: seconds.
        """
        self._local, self._there, self._clock = local, workdir, clock
        self._last = clock()

    def append(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Copies the logs if the last time is long ago."""
        if self._clock() - self._last >= EVERY:
            self.close()

    def rewind(self, stage: str, step: int) -> None:
        """Nothing: the logs themselves are rewound."""

    def close(self) -> None:
        """Copies the logs."""
        send(self._local, self._there, "*.jsonl")
        self._last = self._clock()
