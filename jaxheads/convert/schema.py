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

import numpy as np

from jaxheads.model.config import ModelConfig, is_of_type
from jaxheads.model.models import Config

Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """What a schema sees of an open file."""

    where: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...


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
class Part:
    """Keys that only together set fields of the config.

    Attributes:
      keys: glob patterns of the keys that it reads.
      read: (keys of the file, fields known so far) -> further fields. Keys that are null
        are left out. Raises ValueError with what is wrong.
      write: config -> keys.
      tensors: names of small tensors that hold settings; `read` finds those that the file
        has among the keys.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """The policy of one family in one format.

    Attributes:
      family_key: the key that names the family.
      used: keys that set fields.
      parts: groups of keys that set fields together, in the order in which they are read.
      constants: field -> its value, for fields that are the same in the whole family.
      inferred: field -> its value, for fields that follow from which tensors exist.
      fixed: key -> the only values that leave the computation as it is here.
      equal: key -> the config field it must equal.
      required: keys that parts read and that may be null but not absent.
      ignored: glob patterns of keys that do not change the computation.
      written: constants that an export adds.
    """

    family_key: str
    used: tuple[Key, ...]
    parts: tuple[Part, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    inferred: Mapping[str, Callable[[Source], Any]] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Composite:
    """The policy of a family of models that have several stacks.

    Attributes:
      family_key: the key that names the family.
      sides: name of a stack -> its policy.
      make: makes the model's config of one `ModelConfig` per side, given by name.
      sections: side -> the key whose mapping it reads; without it, a side reads the whole
        file, and its policy covers the keys of the others.
      used: keys outside the sections that set the same field of every side.
      ignored: glob patterns of keys outside the sections that change nothing.
      written: constants that an export adds.
    """

    family_key: str
    sides: Mapping[str, Schema]
    make: Callable[..., Config]
    sections: Mapping[str, str] = field(default_factory=dict)
    used: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)


def read_config(schema: Schema | Composite, source: Source, dtype: str) -> Config:
    """The config of the model that a file describes.

    Args:
      schema: the family's policy for the file's format.
      source: the open file.
      dtype: dtype of the activations, the one field that is the user's choice.

    Raises:
      ValueError: one message that names every missing, unknown, contradictory or
        unsupported key with its value.
    """
    if isinstance(schema, Composite):
        return _read_sides(schema, source, dtype)
    return _read_side(schema, source, dtype)


def _read_sides(schema: Composite, source: Source, dtype: str) -> Config:
    sides: dict[str, ModelConfig] = {}
    shared: dict[str, Any] = {}
    if schema.sections:
        known = {schema.family_key, *schema.used, *schema.sections.values()}
        rest = {key: value for key, value in source.config.items() if key not in known}
        problems = _unclassified(Schema(schema.family_key, (), ignored=schema.ignored), rest)
        missing = (*schema.used, *schema.sections.values())
        problems += [f"missing key {key}" for key in missing if source.config.get(key) is None]
        if problems:
            raise ValueError(f"cannot load {source.where}: " + "; ".join(problems))
        shared = {name: source.config[key] for key, name in schema.used.items()}
    for name, side in schema.sides.items():
        view = source
        if name in schema.sections:
            key = schema.sections[name]
            where = f"{source.where} ({key})"
            view = _Section(where, source.config[key], source.shapes, source.read)
        sides[name] = _read_side(side, view, dtype, shared)
    try:
        return schema.make(**sides)
    except ValueError as error:
        raise ValueError(f"cannot load {source.where}: {error}") from error


@dataclass
class _Section:
    """A nested mapping of a file's config, seen as a file."""

    where: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def _read_side(
    schema: Schema, source: Source, dtype: str, shared: Mapping[str, Any] | None = None
) -> ModelConfig:
    raw = flatten_keys(source.config)
    problems = _unclassified(schema, raw) + _changed(schema, raw)
    problems += [f"missing key {key}" for key in schema.required if key not in raw]
    fields: dict[str, Any] = {"dtype": dtype, **schema.constants, **(shared or {})}
    for key in schema.used:
        value, complaint = _value(key, raw, source)
        problems += complaint
        fields |= dict.fromkeys(key.fields, value)
    if not problems:
        fields |= {name: infer(source) for name, infer in schema.inferred.items()}
        present = {key: value for key, value in raw.items() if value is not None}
        settings = [name for part in schema.parts for name in part.tensors]
        present |= {name: source.read(name) for name in settings if name in source.shapes}
        try:
            for part in schema.parts:
                fields |= part.read(present, fields)
            config = ModelConfig(**fields)
        except ValueError as error:
            raise ValueError(f"cannot load {source.where}: {error}") from error
        problems = [
            f"{key} is {raw[key]!r}, expected {getattr(config, name)!r} (= {name})"
            for key, name in schema.equal.items()
            if raw.get(key) is not None and raw[key] != getattr(config, name)
        ]
    if problems:
        raise ValueError(f"cannot load {source.where}: " + "; ".join(problems))
    return config


def write_config(schema: Schema | Composite, config: Config) -> dict[str, Any]:
    """The file's keys for a config: the inverse of `read_config`.

    Raises:
      ValueError: a field holds a value that the format cannot name.
    """
    if isinstance(schema, Schema):
        assert isinstance(config, ModelConfig)
        return _write_side(schema, config)
    out: dict[str, Any] = {}
    for name, side in schema.sides.items():
        one: ModelConfig = getattr(config, name)
        keys = _write_side(side, one)
        if name in schema.sections:
            out[schema.sections[name]] = keys
            out |= {key: getattr(one, field) for key, field in schema.used.items()}
        else:
            out |= keys
    return out | dict(schema.written)


def _write_side(schema: Schema, config: ModelConfig) -> dict[str, Any]:
    out = dict(schema.written)
    for key in schema.used:
        values = [getattr(config, name) for name in key.fields]
        # Several fields are a flag that is set where any of them is, or one number.
        value = any(values) if isinstance(values[0], bool) else values[0]
        if key.values:
            names = {ours: theirs for theirs, ours in key.values.items()}
            if value not in names:
                raise ValueError(
                    f"config.{key.fields[0]} {value!r} has no name in this format; "
                    f"known: {', '.join(names)}"
                )
            value = names[value]
        out[key.name] = value
    for part in schema.parts:
        out |= part.write(config)
    return out


def flatten_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested rope settings joined with dots; every other value is left as it is."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith(("rope_parameters", "rope_scaling")) and isinstance(value, Mapping):
            flat |= flatten_keys({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _unclassified(schema: Schema, raw: Mapping[str, Any]) -> list[str]:
    known = {schema.family_key, *schema.fixed, *schema.equal}
    known |= {name for key in schema.used for name in key.names}
    globs = (*schema.ignored, *(glob for part in schema.parts for glob in part.keys))
    return [
        f"unknown key {key} = {_show(value)}: it might change what the model computes"
        for key, value in raw.items()
        if key not in known and not any(fnmatch.fnmatchcase(key, glob) for glob in globs)
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
    if not is_of_type(value, expected):
        kind = expected.__name__ if isinstance(expected, type) else expected
        return None, [f"{name} must be a value of type {kind}, got {_show(value)}"]
    return (float(value) if expected in (float, float | None) else value), []


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
