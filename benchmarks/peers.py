"""Environments of the peers, beside ours: some need other versions of the same packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".cache"


def environment(name: str, packages: Sequence[str]) -> str:
    """The Python of a peer's environment, made from PyPI if it is not there."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print(f"installing {' and '.join(packages)} in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, *packages], check=True)
        (folder / ".ready").touch()
    return str(python)
