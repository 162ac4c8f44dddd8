"""Tiny random models of every family, and what transformers computes with them.

A case stores no weights: its json holds the config.json that transformers wrote, the names
and shapes of the tensors beside it, and a seed; `random_tensors` draws the weights anew. Its
npz holds the inputs and the reference values at sampled positions.
`scripts/make_family_reference.py` makes both. This file needs numpy alone, so that the script
runs where there is no jax.

Axes: B rows, P sampled positions, Q sampled queries of patterns, N sampled keys of a query.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent / "fixtures" / "families"

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]

_TABLES = ("position", "wpe", "relative_attention_bias", "cls_token", "class_embedding")
_CONV1D = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class Reference:
    """One case.

    Attributes:
      name: name of the case.
      family: the model type that its config names.
      config: config.json.
      shapes: name of each tensor of the file -> its shape.
      draw: keyword arguments of `random_tensors`.
      inputs: tokens [B,T] and masks [B,T]; or pixels [B,H,W,C].
      indices: sampled positions [B,P], queries [B,Q] and keys [B,Q,N], by prefix and name.
      values: site (with its prefix) -> reference values, float32.
    """

    name: str
    family: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    draw: dict[str, Any]
    inputs: Arrays
    indices: Arrays
    values: Arrays


def cases() -> list[str]:
    """Names of the stored cases."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def reference(case: str) -> Reference:
    """The stored case of that name."""
    about = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / f"{case}.npz") as file:
        stored = {name: file[name] for name in file.files}
    groups: dict[str, Arrays] = {"inputs": {}, "indices": {}, "values": {}}
    for name, array in stored.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    if "pixels" in about:
        groups["inputs"]["pixels"] = random_pixels(**about["pixels"])
    return Reference(
        name=case,
        family=about["config"]["model_type"],
        config=about["config"],
        shapes={name: tuple(shape) for name, shape in about["tensors"].items()},
        draw=about["draw"],
        **groups,
    )


def materialise(case: str, directory: Path, dtype: str = "float32") -> Path:
    """Writes config.json and model.safetensors of a case; returns the directory.

    The weights are numbers of bfloat16, so both dtypes hold the same ones.
    """
    import ml_dtypes
    from safetensors.numpy import save_file

    stored = reference(case)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = random_tensors(stored.shapes, **stored.draw)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.astype(kind) for n, t in tensors.items()}, directory / "model.safetensors")
    config = json.dumps(stored.config | {"dtype": dtype}, indent=1)
    (directory / "config.json").write_text(config, encoding="utf-8")
    return directory


def random_tensors(
    shapes: Shapes, seed: int, *, gain: float = 1.6, norm: float = 1.0, qk_norm: float = 1.6
) -> Arrays:
    """Weights by name, float32 numbers that bfloat16 holds exactly.

    A tensor depends on the seed and its own name and shape only.

    Args:
      shapes: name -> shape.
      seed: of all of them.
      gain: a matrix has standard deviation gain / sqrt(its inputs). Above one, attention
        looks at few keys, so that a wrong position or bias shows.
      norm: mean of the scales of norms; 0 where a family stores them minus one.
      qk_norm: mean of the scales of norms of queries and keys.
    """

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape)
        if any(part in name for part in _TABLES):
            return 0.3 * values
        if name.endswith("bias"):
            return 0.1 * values
        if len(shape) < 2:
            return 0.1 * values + (qk_norm if "q_norm" in name or "k_norm" in name else norm)
        owner = name.split(".")[-2] if "." in name else name
        # GPT-2 stores its matrices as [in, out], everybody else as [out, in].
        inputs = shape[0] if owner in _CONV1D else np.prod(shape[1:])
        return gain * values / np.sqrt(inputs)

    return {name: _as_bfloat16(draw(name, shape)) for name, shape in shapes.items()}


def random_pixels(shape: list[int], seed: int) -> np.ndarray:
    """Images [B,H,W,C], float32, standard normal."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _as_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 with the last 16 bits zero."""
    bits = np.array(values, np.float32).view(np.uint32)
    return np.asarray(bits & np.uint32(0xFFFF0000)).view(np.float32)
