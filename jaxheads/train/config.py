"""Settings of a run: a TOML file into frozen dataclasses, with every key accounted for."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxheads.names import unknown

T = TypeVar("T")
SMALL = "runlocal"
"""The table of a file whose values replace the others for a short run on a laptop."""

_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def read_config(path: str | Path, schema: type[T], *, runlocal: bool = False) -> T:
    """Reads settings.

    Args:
      path: a TOML file; its tables are the dataclasses inside `schema`, and the table
        [runlocal] holds values for a short run, by the same names.
      schema: a dataclass whose fields have defaults.
      runlocal: whether to take the values of [runlocal].

    Returns:
      The settings; what the file does not say keeps its default.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not TOML, an unknown key (the nearest known one is named), or a value
        of the wrong type. The message starts with the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    small = raw.pop(SMALL, {})
    if not isinstance(small, dict):
        raise ValueError(f"{path}: {SMALL} must be a table, got {small!r}")
    # Both readings are checked, whichever is used: a mistake is found on the first day.
    full = _build(schema, raw, str(path), "")
    short = _build(schema, _merge(raw, small), str(path), "")
    if runlocal and not small:
        raise ValueError(f"{path} has no table [{SMALL}], so there is no short run")
    return short if runlocal else full


def flatten_config(config: Any) -> dict[str, Any]:
    """Settings by dotted name, e.g. {"task.count": 80}."""
    raw = config if isinstance(config, Mapping) else dataclasses.asdict(config)
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in flatten_config(value).items()}
        else:
            flat[key] = value
    return flat


def _merge(raw: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(raw)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(schema: type[T], raw: Mapping[str, Any], path: str, prefix: str) -> T:
    hints = typing.get_type_hints(schema)
    known = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            names = [prefix + name for name in known] + ([] if prefix else [SMALL])
            raise ValueError(f"{path}: {unknown('key', prefix + key, names)}")
    values = {key: _value(hints[key], value, path, prefix + key) for key, value in raw.items()}
    try:
        return schema(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _value(hint: Any, value: Any, path: str, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be a table, got {value!r}")
        return _build(hint, value, path, f"{name}.")
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be a table, got {value!r}")
        inner = typing.get_args(hint)[1]
        return {key: _value(inner, item, path, f"{name}.{key}") for key, item in value.items()}
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind in _NAMES]
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    expected = " or ".join(_NAMES[kind] for kind in kinds)
    raise ValueError(f"{path}: {name} must be {expected}, got {value!r}")
