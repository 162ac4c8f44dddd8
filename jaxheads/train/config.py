"""Settings of a run: a TOML file into frozen dataclasses, with every key accounted for."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxheads.names import unknown

T = TypeVar("T")
Tree = dict[str, Any]
SMALL = "runlocal"
"""The table of a file whose values replace the others for a short run on a laptop."""

_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def read_config(
    path: str | Path, schema: type[T] | Callable[[Tree], type[T]], *, runlocal: bool = False
) -> T:
    """Reads settings.

    Args:
      path: a TOML file; its tables are the dataclasses inside `schema`, and the table
        [runlocal] holds values for a short run, by the same names. A list in the file
        becomes a tuple.
      schema: a dataclass, or a function that picks one by the file's content and takes the
        keys out of it that the dataclass does not have.
      runlocal: whether to take the values of [runlocal].

    Returns:
      The settings; what the file does not say keeps its default.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not TOML, an unknown key (the nearest known one is named), a missing one
        without a default, or a value of the wrong type. The message starts with the path.
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
    full, short = (_read(schema, _merge(raw, over), str(path)) for over in ({}, small))
    if runlocal and not small:
        raise ValueError(f"{path} has no table [{SMALL}], so there is no short run")
    return short if runlocal else full


def _read(schema: type[T] | Callable[[Tree], type[T]], raw: Tree, path: str) -> T:
    if isinstance(schema, type):
        return _build(schema, raw, path, "")
    try:
        chosen = schema(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _build(chosen, raw, path, "")


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


def _merge(raw: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """A copy of the tables with some values replaced."""
    merged = {k: _merge(v, {}) if isinstance(v, dict) else v for k, v in raw.items()}
    for key, value in over.items():
        table = isinstance(value, dict)
        merged[key] = _merge(merged.get(key) or {}, value) if table else value
    return merged


def _build(schema: type[T], raw: Mapping[str, Any], path: str, prefix: str) -> T:
    hints = typing.get_type_hints(schema)
    known = [field.name for field in dataclasses.fields(schema)]  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            names = [prefix + name for name in known] + ([] if prefix else [SMALL])
            raise ValueError(f"{path}: {unknown('key', prefix + key, names)}")
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        absent = (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
        if absent and field.name not in raw:
            raise ValueError(f"{path}: {prefix + field.name} is missing, and has no default")
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
    if isinstance(value, list):
        return _list(hint, value, path, name)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind in _NAMES]
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    expected = [_NAMES[kind] for kind in kinds] + ["a list"] * (_tuple_of(hint) is not None)
    raise ValueError(f"{path}: {name} must be {' or '.join(expected)}, got {value!r}")


def _list(hint: Any, value: list[Any], path: str, name: str) -> tuple[Any, ...]:
    kinds = _tuple_of(hint)
    if kinds is None:
        raise ValueError(f"{path}: {name} must not be a list, got {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{path}: {name} must be a list of {len(kinds)}, got {value!r}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_value(kind, item, path, f"{name}[{n}]") for n, (kind, item) in pairs)


def _tuple_of(hint: Any) -> tuple[Any, ...] | None:
    """The kinds of the items where a tuple is allowed."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for kind in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(kind) is tuple:
            return typing.get_args(kind)
    return None
