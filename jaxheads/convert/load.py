"""`load`: a name or a path to a model and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxheads.convert.families import find_format
from jaxheads.convert.fill import Progress, fill_parameters
from jaxheads.convert.gguf_file import GGUFFile
from jaxheads.convert.hub import download, parse_id
from jaxheads.convert.native import DESCRIPTION, read_description
from jaxheads.convert.place import DEFAULT_RULES, Placement, by_axes
from jaxheads.convert.readers import Reader
from jaxheads.convert.registry import NAMED_MODELS
from jaxheads.convert.safetensors_files import SafetensorsReader
from jaxheads.convert.schema import read_config
from jaxheads.model.config import DTYPES, ModelConfig
from jaxheads.model.models import Model, build
from jaxheads.model.parameters import check_parameters, flatten, nest, parameter_table
from jaxheads.names import choose, unknown

if TYPE_CHECKING:
    from jaxheads.text import Tokenizer


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str] = DEFAULT_RULES,
    place: Placement | None = None,
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> tuple[Any, Tokenizer]:
    """Loads a model and its tokenizer.

    With a mesh, every device gets its own part of each parameter straight from the file;
    the whole model is never in one place.

    Args:
      name_or_path: a name of `NAMED_MODELS`; a Hugging Face directory (config.json and
        safetensors); a .gguf file; a directory written by `save`; or a model of the
        Hugging Face hub, "org/name" or "org/name:file.gguf", which is downloaded unless
        its cache has it.
      dtype: dtype of the parameters and the activations: "float32", "bfloat16" or
        "float16". Default float32, and for a native checkpoint as it was saved.
      mesh: devices to shard the parameters over, with axes of type Auto; None puts all of
        them on JAX's default device.
      rules: axis of a parameter -> axis of the mesh, see `place.by_axes`.
      place: where each parameter goes, instead of mesh and rules; training jobs give it.
      revision: branch, tag or commit of a model of the hub.
      on_progress: called as (tensors done, tensors in all, name) while weights of other
        formats are read.

    Returns:
      The model (a `Transformer`, an `EncoderDecoder` or a `Clip`, by its family) and the
      tokenizer.

    Raises:
      ValueError: unknown name or path, a package that is not installed, a model of the hub
        that cannot be had, a family or a setting that is not supported, a damaged file,
        tensors that do not fit the config, a parameter that the mesh does not divide, or
        no tokenizer there (`load_model` reads the weights alone). The message names it.
    """
    from jaxheads.text import Tokenizer

    sharding = _sharding(mesh, rules, place)
    path, kind = find_model(name_or_path, dtype, revision)
    # The tokenizer first: it fails soonest, and its scratch memory is free again
    # before the weights come.
    if kind == "gguf":
        with GGUFFile(path) as reader:
            tokenizer = Tokenizer.from_gguf(reader.backend)
            return _convert(reader, kind, dtype, on_progress, sharding), tokenizer
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json; load_model reads the weights alone")
    tokenizer = Tokenizer.from_file(path)
    return _load(path, kind, dtype, on_progress, sharding), tokenizer


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str] = DEFAULT_RULES,
    place: Placement | None = None,
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> Any:
    """Loads a model without its tokenizer; arguments and errors as in `load`."""
    sharding = _sharding(mesh, rules, place)
    path, kind = find_model(name_or_path, dtype, revision)
    return _load(path, kind, dtype, on_progress, sharding)


def load_config(
    name_or_path: str | os.PathLike[str], dtype: str | None = None, revision: str | None = None
) -> tuple[ModelConfig, Tokenizer]:
    """The config and the tokenizer of a causal language model, without its weights.

    Raises:
      ValueError: as `load`, and for a model of another kind.
    """
    from jaxheads.convert.kinds import kind_name
    from jaxheads.text import Tokenizer

    path, kind = find_model(name_or_path, dtype, revision)
    config: Any
    if kind == "gguf":
        with GGUFFile(path) as gguf:
            tokenizer = Tokenizer.from_gguf(gguf.backend)
            config = read_config(find_format(kind, gguf).schema, gguf, dtype or "float32")
    else:
        tokenizer = Tokenizer.from_file(path)
        if kind == "native":
            config = read_description(path)
            config = config if dtype is None else config.replace(dtype=dtype)
        else:
            with SafetensorsReader(path) as files:
                config = read_config(find_format(kind, files).schema, files, dtype or "float32")
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{name_or_path} is a {kind_name(config)}, not a causal language model")
    return config, tokenizer


def _load(
    path: Path,
    kind: str,
    dtype: str | None,
    on_progress: Progress | None,
    sharding: Placement | None,
) -> Model:
    if kind == "native":
        return _restore(path, dtype, sharding)
    with GGUFFile(path) if kind == "gguf" else SafetensorsReader(path) as reader:
        return _convert(reader, kind, dtype, on_progress, sharding)


def _convert(
    reader: Reader,
    kind: str,
    dtype: str | None,
    on_progress: Progress | None,
    sharding: Placement | None,
) -> Model:
    dtype = dtype or "float32"
    fmt = find_format(kind, reader)
    config = read_config(fmt.schema, reader, dtype)
    params = fill_parameters(reader, fmt, config, dtype, on_progress, sharding)
    return build(config, params)


def _restore(directory: Path, dtype: str | None, sharding: Placement | None) -> Model:
    """A native checkpoint, each device its own part."""
    import orbax.checkpoint as ocp

    config = read_description(directory)
    if dtype is not None:
        config = config.replace(dtype=dtype)
    params = (directory / "params").absolute()
    if not params.is_dir():
        raise ValueError(f"{directory} has no params/: the checkpoint is not whole")
    table = parameter_table(config)
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            saved = checkpointer.metadata(params).item_metadata.tree
            check_parameters(config, saved)
            # Into a target: without one, orbax restores onto the devices it was saved from.
            target = {
                path: jax.ShapeDtypeStruct(
                    leaf.shape,
                    dtype or leaf.dtype,
                    sharding=sharding(path, table[path].axes, leaf.shape) if sharding else single,
                )
                for path, leaf in flatten(saved)
            }
            return build(config, checkpointer.restore(params, nest(target)))
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"cannot restore {params}: {error}") from error


def _sharding(
    mesh: jax.sharding.Mesh | None, rules: Mapping[str, str], place: Placement | None
) -> Placement | None:
    if place is not None:
        if mesh is not None or rules is not DEFAULT_RULES:
            raise ValueError("place says where parameters go: give it without mesh and rules")
        return place
    if mesh is not None:
        return by_axes(mesh, rules)
    if rules is not DEFAULT_RULES:
        raise ValueError("rules were given without a mesh that they could shard over")
    return None


def find_model(
    name_or_path: str | os.PathLike[str], dtype: str | None, revision: str | None
) -> tuple[Path, str]:
    """The path of a model, and its kind: "native", "huggingface" or "gguf"."""
    if dtype is not None:
        choose("dtype", dtype, DTYPES)
    name = os.fspath(name_or_path)
    path = NAMED_MODELS[name].locate(name) if name in NAMED_MODELS else Path(name).expanduser()
    hub = None if path.exists() else parse_id(name)
    if hub is not None:
        path = download(*hub, revision=revision)
    elif revision is not None:
        raise ValueError(f"revision {revision!r} is of a model of the hub, but {name!r} is not one")
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
        f"{unknown('model', name, NAMED_MODELS)} There is no such path either: {expected}; "
        "and a model of the Hugging Face hub is org/name"
    )
