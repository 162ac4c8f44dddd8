"""A Hugging Face directory: config.json and safetensors, in one file or in shards.

The format: 8 bytes of header length, a JSON header of dtype, shape and offsets by name, then
the tensors (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxheads.convert.readers import FLOATS, Reader, map_array, read_json, some

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _Place(NamedTuple):
    """Where a tensor lies: its file, and the byte at which it starts."""

    file: BinaryIO
    offset: int


class SafetensorsReader(Reader):
    """A Hugging Face directory: config.json and safetensors, in one file or in shards."""

    def __init__(self, directory: Path) -> None:
        """Opens the directory.

        Raises:
          ValueError: a file is missing, damaged, pickled or outside the directory; or the
            index does not fit the shards. The message names it.
        """
        self.where = str(directory)
        self.config = read_json(directory / "config.json")
        self.shapes, self.dtypes, self._places = {}, {}, {}
        weight_map = _weight_map(directory)
        holds: dict[str, str] = {}  # tensor -> file
        with contextlib.ExitStack() as stack:
            for path in _shards(directory, weight_map):
                start, header = _header(path)
                file = stack.enter_context(path.open("rb"))
                for name, entry in header.items():
                    if name in holds:
                        raise ValueError(
                            f"{directory}: {holds[name]} and {path.name} both hold {name}"
                        )
                    holds[name] = path.name
                    self.shapes[name] = tuple(entry["shape"])
                    self.dtypes[name] = entry["dtype"]
                    self._places[name] = _Place(file, start + entry["data_offsets"][0])
            if weight_map is not None:
                _check_index(directory / _INDEX, weight_map, holds)
            self._stack = stack.pop_all()

    def read(self, name: str) -> np.ndarray:
        """One tensor as a read-only view of its file (BF16 as `ml_dtypes.bfloat16`)."""
        file, offset = self._places[name]
        return map_array(file, offset, self.shapes[name], FLOATS[self.dtypes[name]])

    def readable(self, name: str) -> bool:
        """Whether a tensor is of plain floats; old files also hold buffers of integers."""
        return self.dtypes[name] in FLOATS

    def close(self) -> None:
        """Closes the files; views that were handed out stay valid."""
        self._places.clear()
        self._stack.close()


def _header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors of a file begin, and what its header says of each."""
    from safetensors import SafetensorError, safe_open

    try:
        # Checks the header's length, its JSON, and that the offsets tile the file exactly.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def _weight_map(directory: Path) -> dict[str, str] | None:
    """The index: tensor -> file; None if there is none."""
    path = directory / _INDEX
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    odd = sorted({repr(name) for name in weight_map.values() if not _is_file_name(name)})
    if odd:
        raise ValueError(
            f"{path} names {some(odd)}, expected .safetensors files in the same directory"
        )
    return weight_map


def _is_file_name(name: object) -> bool:
    """Whether this is the name of a safetensors file, with no way out of its directory."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def _shards(directory: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{directory} lacks shards that its index names: {some(missing)}")
        return files
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise ValueError(
            f"{directory} has only pickled weights ({some(pickled)}), which can run any code when "
            f"opened and are never read; save the model as safetensors first"
        )
    raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _check_index(path: Path, weight_map: dict[str, str], holds: dict[str, str]) -> None:
    """Raises ValueError unless the index is exactly what the shards hold."""
    absent = sorted(set(weight_map) - set(holds))
    extra = sorted(set(holds) - set(weight_map))
    moved = sorted(
        f"{name} (in {holds[name]}, not {file})"
        for name, file in weight_map.items()
        if name in holds and holds[name] != file
    )
    if absent or extra or moved:
        raise ValueError(
            f"{path} does not fit its shards: not in any shard: {some(absent) or 'none'}; "
            f"not in the index: {some(extra) or 'none'}; elsewhere: {some(moved) or 'none'}"
        )
