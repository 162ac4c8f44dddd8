"""Scores of heads in JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def load_scores(path: Path, method: str) -> np.ndarray:
    """Reads the scores of a method.

    Args:
      path: a list [L][K]; an object with it as "values", as `jaxheads train` writes scores.json; or
        one with lists by method as "scores", as `jaxheads cache --json` writes.
      method: whose scores, in a file of several.

    Returns:
      float64 [L,K].

    Raises:
      OSError: the file cannot be read.
      ValueError: it holds something else; the message names it.
    """
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("scores"), dict):
        known = found["scores"]
        if method not in known:
            raise ValueError(f"{path} has no scores of {method!r}, only of {', '.join(known)}")
        found = known[method]
    if isinstance(found, dict):
        found = found.get("values")
    try:
        scores = np.asarray(found, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: scores must be a list [L][K] of numbers: {error}") from error
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(
            f"{path}: scores must be a list [L][K] of finite numbers, got shape "
            f"{list(scores.shape)}"
        )
    return scores
