"""SmolLM 3: Llama with layers that do not rotate, by default every fourth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.llama import hf_schema, llama_like
from jaxheads.convert.families.llama_cpp import gguf_schema
from jaxheads.convert.families.rope import gguf_rope_part, rope_part
from jaxheads.convert.families.shared import (
    absent_means,
    normal_windows,
    optional_windows,
    write_layer_windows,
)
from jaxheads.convert.schema import Key, Part
from jaxheads.model.config import ModelConfig
from jaxheads.model.rotary import Rope

_THETA = 2_000_000.0
_ROPE = rope_part(theta=_THETA)
_GGUF_ROPE = gguf_rope_part("smollm3")
_INTERVAL = 4


def _rotates(raw: Mapping[str, Any], n_layers: int) -> list[int]:
    """1 for each layer that rotates, 0 for the others."""
    interval = raw.get("no_rope_layer_interval", _INTERVAL)
    flags = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n_layers)]
    if len(flags) < n_layers or not set(flags) <= {0, 1}:
        raise ValueError(f"no_rope_layers must be {n_layers} times 0 or 1, got {flags!r}")
    return list(flags[:n_layers])


def _ropes(ropes: tuple[Rope | None, ...], flags: list[int]) -> tuple[Rope | None, ...]:
    """The one encoding, for the layers that rotate."""
    return ropes if all(flags) else tuple(ropes[0] if flag else None for flag in flags)


def _read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    flags = _rotates(raw, fields["n_layers"])
    windows = optional_windows(raw, fields["n_layers"], lambda layer: not flags[layer])
    found = _ROPE.read(raw, fields)
    return found | {"ropes": _ropes(found["ropes"], flags), "windows": normal_windows(windows)}


def _write(config: ModelConfig) -> dict[str, Any]:
    ropes = config.ropes if len(config.ropes) > 1 else config.ropes * config.n_layers
    turning = tuple({rope for rope in ropes if rope is not None}) or (Rope(_THETA),)
    return {
        **_ROPE.write(config.replace(ropes=turning)),
        "no_rope_layers": [int(rope is not None) for rope in ropes],
        "use_sliding_window": any(config.windows),
        **write_layer_windows(config),
    }


def _read_gguf(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    flags = _rotates({}, fields["n_layers"])
    return {"ropes": _ropes(_GGUF_ROPE.read(raw, fields)["ropes"], flags)}


SMOLLM3 = llama_like(
    hf_schema(
        "smollm3",
        ("SmolLM3ForCausalLM", "SmolLM3Model"),
        parts=(
            Part(
                keys=(
                    *_ROPE.keys,
                    *("no_rope_layers", "no_rope_layer_interval"),
                    *("layer_types", "sliding_window", "use_sliding_window"),
                ),
                read=_read,
                write=_write,
            ),
        ),
        used=(Key("tie_word_embeddings", ("tied",), default=absent_means(True)),),
        # How products are cut up in training, and a key of Qwen's that its code does not read.
        ignored=("pretraining_tp", "max_window_layers"),
    ),
    gguf_schema(
        "smollm3",
        "smollm3",
        parts=(Part(_GGUF_ROPE.keys, _read_gguf, _GGUF_ROPE.write, _GGUF_ROPE.tensors),),
    ),
    interleaved=True,
)
