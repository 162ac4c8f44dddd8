"""The folder of a run: whose it is, and the log of its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxheads.files import check_target, write_json, write_text
from jaxheads.train.config import flatten_config

CONFIG = "config.json"
_ABSENT = object()


def check_claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Refuses a folder that a run may not use; changes nothing.

    Args:
      workdir: the folder.
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
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and holds no run: choose another --workdir")
    check_target(path)


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or finds it again; raises as `check_claim`."""
    check_claim(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG).is_file():
        write_json(workdir / CONFIG, config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _shown(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "absent"


class MetricsLog:
    """metrics.jsonl: one line for each step of each stage."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the log."""
        self.path = path
        path.touch()

    def append(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drops what comes after `step` of a stage: the run goes on from there."""
        kept = [
            row for row in read_metrics(self.path) if row["stage"] != stage or row["step"] <= step
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a killed run left unfinished is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
