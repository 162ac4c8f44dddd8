"""A GGUF file, opened by the `gguf` package after its bounds have been checked.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxheads.convert.readers import FLOATS, Reader, map_array, some

if TYPE_CHECKING:
    from gguf import GGUFReader

_VERSIONS = (2, 3)
_CHUNK = 1 << 24  # bytes of weights that are dequantised at once
_STRING, _ARRAY = 8, 9
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes


class GGUFFile(Reader):
    """A GGUF file. Quantised tensors are dequantised to float32 as they are read.

    Attributes:
      backend: the `gguf.GGUFReader` (opening it walks through the whole vocabulary,
        which takes seconds, so the tokenizer is built from the same one).
    """

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Raises:
          ValueError: it is damaged, not GGUF, one part of several, or holds a type of tensor
            that cannot be dequantised; the message names it.
        """
        from gguf import GGUFReader

        self.where = str(path)
        try:
            _check_bounds(path)
            self.backend: GGUFReader = GGUFReader(path)
        except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
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
        self._check_loadable()
        self._file = path.open("rb")

    def read(self, name: str) -> np.ndarray:
        """One tensor: plain floats as a read-only view of the file, others as float32."""
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        tensor, shape = self._tensors[name], self.shapes[name]
        if tensor.tensor_type.name in FLOATS:
            dtype = FLOATS[tensor.tensor_type.name]
            return map_array(self._file, tensor.data_offset, shape, dtype)
        block, nbytes = GGML_QUANT_SIZES[tensor.tensor_type]
        packed = (math.prod(shape[:-1]), shape[-1] // block * nbytes)
        rows = map_array(self._file, tensor.data_offset, packed, np.dtype(np.uint8))
        out = np.empty((len(rows), shape[-1]), np.float32)
        # In pieces: dequantize holds the whole result twice.
        step = max(1, _CHUNK // (4 * shape[-1]))
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            out[piece] = dequantize(rows[piece], tensor.tensor_type)
        return out.reshape(shape)

    def close(self) -> None:
        """Lets go of the file."""
        self._tensors.clear()
        self._file.close()
        del self.backend

    def _check_loadable(self) -> None:
        """Refuses a part of a split file, and tensors that cannot be dequantised."""
        parts = self.config.get("split.count") or 1
        if parts > 1:
            raise ValueError(
                f"{self.where} is one of {parts} parts of a split GGUF; join them first: "
                f"llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            )
        kinds = {tensor.tensor_type for tensor in self._tensors.values()}
        odd = {kind.name for kind in kinds if kind.name not in FLOATS and not _dequantises(kind)}
        names = [f"{name} ({kind})" for name, kind in self.dtypes.items() if kind in odd]
        if names:
            raise ValueError(f"cannot load {self.where}: cannot dequantise {some(names)}")


def _dequantises(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _contents(field: Any) -> Any:
    from gguf import GGUFValueType

    value = field.contents()
    if field.types and field.types[0] == GGUFValueType.FLOAT32:
        # The decimal that was written: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))
    return value


class _Cursor:
    """A place in the file that never leaves it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, count: int, what: str) -> int:
        """Moves on, and returns where it was."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(f"{what} ends at byte {self.at:,}, the file at {len(self.data):,}")
        return start

    def number(self, kind: str, what: str) -> int:
        """An unsigned integer of the `struct` format "I" or "Q"."""
        start = self.skip(struct.calcsize("<" + kind), what)
        return struct.unpack_from("<" + kind, self.data, start)[0]

    def string(self, what: str) -> str:
        """A string with its length before it."""
        count = self.number("Q", what)
        start = self.skip(count, what)
        return self.data[start : start + count].decode("utf-8")


def _check_bounds(path: Path) -> None:
    """Refuses a file whose header points outside of it.

    `GGUFReader` slices beyond the end in silence: a false length of an array keeps it busy
    until memory is full.
    """
    with path.open("rb") as file:
        first = file.read(8)
        if first[:4] != b"GGUF":
            raise ValueError(f"it begins with {first[:4]!r}, expected b'GGUF'")
        version = int.from_bytes(first[4:], "little")
        if version not in _VERSIONS:
            big = ", which is big-endian" if int.from_bytes(first[4:], "big") in _VERSIONS else ""
            raise ValueError(
                f"it has version {version}{big}, expected {' or '.join(map(str, _VERSIONS))}"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.skip(8, "the version")
            tensors = cursor.number("Q", "the number of tensors")
            keys = cursor.number("Q", "the number of keys")
            alignment = 32
            for _ in range(keys):
                key = cursor.string("a key")
                start = _skip_value(cursor, cursor.number("I", key), key)
                if key == "general.alignment":
                    alignment = struct.unpack_from("<I", data, start)[0]
            places = [_tensor(cursor) for _ in range(tensors)]
            if alignment < 1:
                raise ValueError(f"general.alignment is {alignment}, expected a power of two")
            weights = cursor.at + -cursor.at % alignment
            for name, offset, nbytes in places:
                cursor.at = weights + offset
                cursor.skip(nbytes, f"tensor {name}")


def _skip_value(cursor: _Cursor, kind: int, key: str) -> int:
    """Moves over the value of a key, and returns where it starts."""
    start = cursor.at
    if kind == _STRING:
        cursor.string(key)
    elif kind == _ARRAY:
        inner, count = cursor.number("I", key), cursor.number("Q", key)
        if inner == _STRING:
            for _ in range(count):
                cursor.skip(cursor.number("Q", key), key)
        else:
            cursor.skip(count * _size(inner, key), key)
    else:
        cursor.skip(_size(kind, key), key)
    return start


def _size(kind: int, key: str) -> int:
    if kind not in _SCALARS:
        raise ValueError(f"{key} has a value of the unknown type {kind}")
    return _SCALARS[kind]


def _tensor(cursor: _Cursor) -> tuple[str, int, int]:
    """Name, offset and bytes of the next tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string("the name of a tensor")
    axes = cursor.number("I", name)
    shape = [cursor.number("Q", name) for _ in range(axes)]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not shape or shape[0] % block:
        raise ValueError(f"tensor {name} has rows of {shape[:1]}, expected a multiple of {block}")
    return name, offset, math.prod(shape) // block * nbytes
