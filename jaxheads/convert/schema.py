"""The metadata policy: which keys of a file's config make a `ModelConfig`.

Every key of a file is one of three: used (it sets fields of the config, in both
directions), ignored (it cannot change what the model computes), or refused. A key
that nobody has classified is refused by name, so a variant that computes something
else is never loaded as if it were the plain model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxheads.model.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """What a schema sees of an open file."""

    where: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Key:
    """A key that sets fields of the config.

    Attributes:
      name: its name in the file; nested keys are joined with a dot.
      fields: the `ModelConfig` fields that it sets. A key with several fields is a
        flag, written as true when any of them is.
      spellings: other names of the same key; all that are present must agree.
      default: the value when the key is absent, computed from the source; None
        when the key is required. A null value counts as absent.
      values: names of the file -> names of ours, for a key that holds a name. The
        last file name of ours is the one that is written.
    """

    name: str
    fields: tuple[str, ...]
    spellings: tuple[str, ...] = ()
    default: Callable[[Source], Any] | None = None
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling."""
        return (self.name, *self.spellings)


@dataclass(frozen=True)
class Schema:
    """The policy of one family in one format.

    Attributes:
      family_key: the key that names the family.
      used: keys that set fields.
      inferred: field -> its value, for fields that follow from which tensors exist.
      fixed: key -> the only values that leave the computation as it is here.
      equal: key -> the config field it must equal.
      ignored: glob patterns of keys that do not change the computation.
      written: constants that an export adds.
    """

    family_key: str
    used: tuple[Key, ...]
    inferred: Mapping[str, Callable[[Source], Any]] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)


def read_config(schema: Schema, source: Source, dtype: str) -> ModelConfig:
    """The `ModelConfig` that a file describes.

    Args:
      schema: the family's policy for the file's format.
      source: the open file.
      dtype: dtype of the activations, the one field that is the user's choice.

    Raises:
      ValueError: one message that names every missing, unknown, contradictory or
        unsupported key with its value.
    """
    raw = flatten_keys(source.config)
    problems = _unclassified(schema, raw) + _changed(schema, raw)
    fields: dict[str, Any] = {"dtype": dtype}
    for key in schema.used:
        value, complaint = _value(key, raw, source)
        problems += complaint
        fields |= dict.fromkeys(key.fields, value)
    if not problems:
        fields |= {name: infer(source) for name, infer in schema.inferred.items()}
        config = ModelConfig(**fields)
        problems = [
            f"{key} is {raw[key]!r}, expected {getattr(config, name)!r} (= {name})"
            for key, name in schema.equal.items()
            if raw.get(key) is not None and raw[key] != getattr(config, name)
        ]
    if problems:
        raise ValueError(f"cannot load {source.where}: " + "; ".join(problems))
    return config


def write_config(schema: Schema, config: ModelConfig) -> dict[str, Any]:
    """The file's keys for a config: the inverse of `read_config`.

    Raises:
      ValueError: a field holds a value that the format cannot name.
    """
    out = dict(schema.written)
    for key in schema.used:
        values = [getattr(config, name) for name in key.fields]
        value = any(values) if len(values) > 1 else values[0]
        if key.values:
            names = {ours: theirs for theirs, ours in key.values.items()}
            if value not in names:
                raise ValueError(
                    f"config.{key.fields[0]} {value!r} has no name in this format; "
                    f"known: {', '.join(names)}"
                )
            value = names[value]
        out[key.name] = value
    return out


def flatten_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested rope settings joined with dots; every other value is left as it is."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _unclassified(schema: Schema, raw: Mapping[str, Any]) -> list[str]:
    known = {schema.family_key, *schema.fixed, *schema.equal}
    known |= {name for key in schema.used for name in key.names}
    return [
        f"unknown key {key} = {_show(value)}: it might change what the model computes"
        for key, value in raw.items()
        if key not in known and not any(fnmatch.fnmatchcase(key, glob) for glob in schema.ignored)
    ]


def _changed(schema: Schema, raw: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} = {_show(raw[key])} is not supported (only {' or '.join(map(_show, allowed))})"
        for key, allowed in schema.fixed.items()
        if raw.get(key) is not None and raw[key] not in allowed
    ]


def _value(key: Key, raw: Mapping[str, Any], source: Source) -> tuple[Any, list[str]]:
    present = {name: raw[name] for name in key.names if raw.get(name) is not None}
    if not present:
        if key.default is None:
            return None, [f"missing key {key.name}"]
        try:
            return key.default(source), []
        except (KeyError, TypeError, ZeroDivisionError):
            return None, [f"missing key {key.name}"]
    name, value = next(iter(present.items()))
    if any(other != value for other in present.values()):
        return None, [" disagrees with ".join(f"{n} = {_show(v)}" for n, v in present.items())]
    if key.values:
        if value not in key.values:
            known = ", ".join(key.values)
            return None, [f"{name} = {_show(value)} is not supported (known: {known})"]
        return key.values[value], []
    expected = next(f.type for f in dataclasses.fields(ModelConfig) if f.name == key.fields[0])
    if not _is(value, expected):
        kind = getattr(expected, "__name__", expected)
        return None, [f"{name} must be a value of type {kind}, got {_show(value)}"]
    return (float(value) if expected is float else value), []


def _is(value: Any, expected: Any) -> bool:
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
