"""Edits on disk: one plain safetensors file of the arrays, with their description.

The description is JSON under the metadata key "jaxheads": the format version and, for each
site, the kind of edit with its fields, where an array is named by its tensor. Nothing in
the file is executed when it is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jaxheads.edits.edits import Edits
from jaxheads.edits.kinds import KINDS
from jaxheads.names import choose

FORMAT = 1


def save(edits: Mapping[str, Any], path: str | Path) -> None:
    """Writes edits to `path`, replacing it only once the new file is complete.

    Raises:
      ValueError: an edit that is not a dataclass, or has a static field JSON cannot hold.
      OSError: the place cannot be written.
    """
    path = Path(path)
    tensors: dict[str, Any] = {}
    sites = {site: _encode(edit, site, tensors) for site, edit in edits.items()}
    description = json.dumps({"format": FORMAT, "sites": sites})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, temporary, metadata={"jaxheads": description})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, kinds: Iterable[type] = ()) -> Edits:
    """Reads edits.

    Args:
      path: a file that `save` wrote.
      kinds: classes of the user's own edits in it, found by their names.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, another format version, an unknown kind of edit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no edits at {path}: expected a file written by Edits.save")
    known = {**KINDS, **{kind.__name__: kind for kind in kinds}}
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            if "jaxheads" not in metadata:
                raise ValueError(f"{path} holds no edits: its metadata has no key 'jaxheads'")
            description = json.loads(metadata["jaxheads"])
            if not isinstance(description, dict):
                raise ValueError(f"{path} has a description that is no JSON object")
            if description.get("format") != FORMAT:
                raise ValueError(
                    f"{path} has edits of format {description.get('format')!r}, expected {FORMAT}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable file of edits: {error}") from error
    try:
        sites = description["sites"]
        return Edits({site: _decode(sites[site], tensors, known) for site in sites})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the description in {path} does not fit its contents: {error}") from error


def _encode(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    if value is None:
        return None
    if hasattr(value, "shape"):
        tensors[name] = jnp.asarray(value)
        return {"tensor": name}
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: _encode(getattr(value, field.name), f"{name}.{field.name}", tensors)
            for field in dataclasses.fields(value)
        }
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, tuple):
        return {"items": [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ValueError(
        f"{name} cannot be saved: expected an array, a dataclass edit, a tuple or a plain "
        f"value, got {type(value).__name__}"
    )


def _decode(coded: Any, tensors: Mapping[str, Any], known: Mapping[str, type]) -> Any:
    if coded is None:
        return None
    if "tensor" in coded:
        return tensors[coded["tensor"]]
    if "items" in coded:
        return tuple(_decode(item, tensors, known) for item in coded["items"])
    if "value" in coded:
        return coded["value"]
    kind = known[choose("kind of edit", coded["kind"], known)]
    return kind(**{name: _decode(c, tensors, known) for name, c in coded["fields"].items()})
