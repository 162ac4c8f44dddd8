"""`load`: a name or a path to a model and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxheads.convert.families import find_format
from jaxheads.convert.fill import Progress, fill_parameters
from jaxheads.convert.native import DESCRIPTION, restore
from jaxheads.convert.readers import GGUFFile, Reader, SafetensorsReader
from jaxheads.convert.registry import NAMED_MODELS
from jaxheads.convert.schema import read_config
from jaxheads.model.config import DTYPES
from jaxheads.names import choose, unknown

if TYPE_CHECKING:
    from jaxheads.model.transformer import Transformer
    from jaxheads.text import Tokenizer


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    on_progress: Progress | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
      name_or_path: a name of `NAMED_MODELS`; a Hugging Face directory (config.json and
        safetensors); a .gguf file; or a directory written by `save`.
      dtype: dtype of the parameters and the activations: "float32", "bfloat16" or
        "float16". Default float32, and for a native checkpoint as it was saved.
      on_progress: called as (tensors done, tensors in all, name) while weights of other
        formats are read.

    Returns:
      The model and the tokenizer.

    Raises:
      ValueError: unknown name or path, a package that is not installed, a family or a
        setting that is not supported, tensors that do not fit the config, or no
        tokenizer there (`load_model` reads the weights alone). The message names it.
    """
    path, kind = _find(name_or_path, dtype)
    from jaxheads.text import Tokenizer

    # The tokenizer first: it fails soonest, and its scratch memory is free again
    # before the weights come.
    if kind == "gguf":
        with GGUFFile(path) as reader:
            tokenizer = Tokenizer.from_gguf(reader.backend)
            return _convert(reader, kind, dtype, on_progress), tokenizer
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json; load_model reads the weights alone")
    tokenizer = Tokenizer.from_file(path)
    return load_model(path, dtype=dtype, on_progress=on_progress), tokenizer


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    on_progress: Progress | None = None,
) -> Transformer:
    """Loads a model without its tokenizer; arguments and errors as in `load`."""
    path, kind = _find(name_or_path, dtype)
    if kind == "native":
        from jaxheads.model.transformer import Transformer

        return Transformer(*restore(path, dtype))
    with GGUFFile(path) if kind == "gguf" else SafetensorsReader(path) as reader:
        return _convert(reader, kind, dtype, on_progress)


def _convert(
    reader: Reader, kind: str, dtype: str | None, on_progress: Progress | None
) -> Transformer:
    from jaxheads.model.transformer import Transformer

    dtype = dtype or "float32"
    fmt = find_format(kind, reader)
    config = read_config(fmt.schema, reader, dtype)
    return Transformer(config, fill_parameters(reader, fmt, config, dtype, on_progress))


def _find(name_or_path: str | os.PathLike[str], dtype: str | None) -> tuple[Path, str]:
    """The path of a model, and its kind: "native", "huggingface" or "gguf"."""
    if dtype is not None:
        choose("dtype", dtype, DTYPES)
    name = os.fspath(name_or_path)
    path = NAMED_MODELS[name].locate(name) if name in NAMED_MODELS else Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path, "gguf"
    if (path / DESCRIPTION).is_file():
        return path, "native"
    if (path / "config.json").is_file():
        return path, "huggingface"
    expected = (
        "a path may be a Hugging Face directory (config.json and safetensors), a .gguf file, "
        f"or a native checkpoint ({DESCRIPTION})"
    )
    if path.exists():
        raise ValueError(f"{path} is no model that can be loaded: {expected}")
    raise ValueError(
        f"{unknown('model', name, NAMED_MODELS)} There is no such path either: {expected}"
    )
