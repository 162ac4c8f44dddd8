"""The folder of a run: whose it is, who uses it now, and the log of its steps."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from jaxheads.files import check_target, write_json, write_text
from jaxheads.train.config import flatten_config

CONFIG = "config.json"
LOCK = "lock"
_ABSENT = object()


def run_path(workdir: str | os.PathLike[str]) -> Path | epath.Path:
    """The folder of a run: a local one as an absolute path, gs://bucket/run as it is.

    Raises:
      ValueError: an address that has lost a slash, as `pathlib.Path` makes it.
    """
    text = os.fspath(workdir)
    if is_address(text):
        return epath.Path(text)
    if text.startswith(("gs:/", "s3:/")):
        raise ValueError(f"{text!r} has lost a slash: give the address as a string, not as a Path")
    return Path(text).expanduser().absolute()


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as gs://bucket/run, not of this machine's file system."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps a second run out of a folder for the length of a `with` block.

    The system gives the lock free when the process ends, however it ends. The file `lock` stays
    and tells who had it last. Folders at an address cannot be locked and are left alone, and so
    are those on a file system without locks. Call `check_claim` first, since this makes the
    folder; of several processes, only the first calls it.

    A folder that was made here goes again if the run is refused (ValueError) before it has logged
    a step or saved a checkpoint, so that the corrected command may use the same name.

    Raises:
      ValueError: another run holds the folder; the message gives its process and host.
    """
    path = run_path(workdir)
    if is_address(path):
        yield
        return
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOCK, "a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            file.seek(0)
            raise ValueError(
                f"{path} is in use by another run ({file.read().strip() or 'just starting'}): "
                "wait for it, stop it, or choose another --workdir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        except ValueError:
            if made and not _used(Path(path)):
                shutil.rmtree(path, ignore_errors=True)
            raise


def _used(workdir: Path) -> bool:
    """Whether anything was learned in a folder."""
    logged = any(path.stat().st_size for path in workdir.glob("*.jsonl"))
    return logged or any(p.name.isdecimal() for p in workdir.glob("checkpoints/*/*"))


def _lock(file: int) -> bool:
    import fcntl  # not on Windows, which can do everything else here

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def check_claim(workdir: Path | epath.Path, config: Mapping[str, Any]) -> None:
    """Refuses a folder that a run may not use; changes nothing.

    Args:
      workdir: the folder, as `run_path` gives it.
      config: the settings, as JSON holds them.

    Raises:
      ValueError: the folder belongs to a run with other settings (the message names them),
        holds other things, or cannot be made.
    """
    path = workdir / CONFIG
    if path.is_file():
        ours, theirs = flatten_config(config), flatten_config(read_json(path))
        different = [
            f"{key} is {_shown(theirs, key)} there and {_shown(ours, key)} here"
            for key in sorted({*ours, *theirs})
            if ours.get(key, _ABSENT) != theirs.get(key, _ABSENT)
        ]
        if different:
            raise ValueError(
                f"{workdir} holds a run with other settings: {'; '.join(different)}. "
                "Choose another --workdir"
            )
    elif workdir.is_dir() and any(not _ours(other.name) for other in workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and holds no run: choose another --workdir")
    if not is_address(path):
        check_target(Path(path))


def claim(workdir: Path | epath.Path, config: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or finds it again; raises as `check_claim`.

    Of several processes, only the first calls it.
    """
    check_claim(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG
    if path.is_file():
        return
    if is_address(path):
        path.write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
    else:
        write_json(Path(path), config)


def _ours(name: str) -> bool:
    """Whether a file is one that a run killed before it had its config may leave."""
    return name == LOCK or (name.startswith(f".{CONFIG}.") and name.endswith(".tmp"))


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _shown(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "absent"


class MetricsLog:
    """metrics.jsonl: one line for each step of each stage; a local file."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the log, and cuts off a last line that a killed run left unfinished."""
        self.path = path
        path.touch()
        if not path.read_bytes().endswith(b"\n"):
            self._write(read_metrics(path))

    def append(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drops what comes after `step` of a stage: the run goes on from there.

        The new log takes the place of the old one whole, so that a kill loses neither.
        """
        rows = read_metrics(self.path)
        self._write([row for row in rows if row["stage"] != stage or row["step"] <= step])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
