"""Open files of weights: names and shapes at once, arrays when asked for.

Formats that run code when opened (pickled `.bin`, `.pt`, `.pth`) are never read.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHUNK = 1 << 24  # bytes of weights that are dequantised at once


class Reader:
    """An open file, or directory, of named tensors. Use it as a context manager.

    Attributes:
      where: the path, for messages.
      config: the metadata, by key.
      shapes: shape of every tensor, by name, known without reading any.
      dtypes: the stored type of every tensor, by name, as the format spells it.
    """

    where: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in its stored dtype (float32 if it is quantised)."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the files."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SafetensorsReader(Reader):
    """A Hugging Face directory: config.json and safetensors, in one file or in shards."""

    def __init__(self, directory: Path) -> None:
        """Opens the directory.

        Raises:
          ValueError: a file is missing, damaged, pickled, or of a dtype that is not a
            plain float; the message names it.
        """
        from safetensors import SafetensorError, safe_open

        self.where = str(directory)
        self.config = read_json(directory / "config.json")
        weight_map = _weight_map(directory)
        self.shapes, self.dtypes, self._files = {}, {}, {}
        self._stack = contextlib.ExitStack()
        with self._stack:
            for file in _shards(directory, weight_map):
                try:
                    opened = self._stack.enter_context(safe_open(file, framework="np"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(
                        f"{file} is not a readable safetensors file: {error}"
                    ) from error
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    tensor = opened.get_slice(name)
                    self.shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = tensor.get_dtype()
                    self._files[name] = opened
            _check_index(directory, weight_map, self.shapes)
            odd = [f"{name} ({kind})" for name, kind in self.dtypes.items() if kind not in _FLOATS]
            if odd:
                raise ValueError(
                    f"cannot load {self.where}: tensors that are not plain floats: "
                    f"{some(odd)}; known types: {', '.join(_FLOATS)}"
                )
            self._stack = self._stack.pop_all()

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in its stored dtype (bfloat16 as `ml_dtypes.bfloat16`)."""
        return self._files[name].get_tensor(name)

    def close(self) -> None:
        """Closes the files."""
        self._files.clear()
        self._stack.close()


class GGUFFile(Reader):
    """A GGUF file. Quantised tensors are dequantised to float32 as they are read.

    Attributes:
      backend: the `gguf.GGUFReader` (opening it walks through the whole vocabulary,
        which takes seconds, so the tokenizer is built from the same one).
    """

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Raises:
          ValueError: it is damaged or not GGUF.
        """
        from gguf import GGUFReader

        self.where = str(path)
        try:
            self.backend: GGUFReader = GGUFReader(path)
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise ValueError(f"{path} is not a readable GGUF file: {error}") from error
        self.config = {
            name: None if name.startswith("tokenizer.") else _contents(field)
            for name, field in self.backend.fields.items()
        }
        self._tensors = {tensor.name: tensor for tensor in self.backend.tensors}
        self.dtypes = {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}
        # GGUF writes dimensions innermost first.
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, dequantised to float32."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        rows = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
        out = np.empty((len(rows), self.shapes[name][-1]), np.float32)
        # In pieces: dequantize holds the whole result twice.
        step = max(1, _CHUNK // out[0].nbytes)
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            try:
                out[piece] = dequantize(rows[piece], tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(f"{self.where}: cannot dequantise {name}: {error}") from error
        return out.reshape(self.shapes[name])

    def close(self) -> None:
        """Lets go of the mapped file."""
        self._tensors.clear()
        del self.backend


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: the file is missing or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def some(names: list[str], most: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _weight_map(directory: Path) -> dict[str, str] | None:
    if not (directory / _INDEX).exists():
        return None
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{directory / _INDEX} has no weight_map")
    return weight_map


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


def _check_index(
    directory: Path, weight_map: dict[str, str] | None, shapes: dict[str, tuple[int, ...]]
) -> None:
    if weight_map is None:
        return
    absent = sorted(set(weight_map) - set(shapes))
    extra = sorted(set(shapes) - set(weight_map))
    if absent or extra:
        raise ValueError(
            f"{directory / _INDEX} does not fit its shards: "
            f"not in any shard: {some(absent) or 'none'}; not in the index: {some(extra) or 'none'}"
        )


def _contents(field: Any) -> Any:
    from gguf import GGUFValueType

    value = field.contents()
    if field.types and field.types[0] == GGUFValueType.FLOAT32:
        # The decimal that was written: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))
    return value
