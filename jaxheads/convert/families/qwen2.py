"""Qwen 2 and 2.5: Llama with biases of q, k and v, and windows in the last layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.llama import hf_schema, llama_like
from jaxheads.convert.families.llama_cpp import gguf_schema
from jaxheads.convert.families.rope import rope_part
from jaxheads.convert.families.shared import optional_windows, windows_part, write_layer_windows
from jaxheads.model.config import ModelConfig


def _read(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    first = raw.get("max_window_layers", 28)
    return optional_windows(raw, n_layers, lambda layer: layer >= first)


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = config.windows or (0,) * config.n_layers
    # Older versions of transformers know no list of layers, only where windows start.
    first = next((layer for layer, window in enumerate(windows) if window), config.n_layers)
    return {
        "use_sliding_window": any(windows),
        "max_window_layers": first,
        **write_layer_windows(config),
    }


QWEN_WINDOWS = windows_part(
    _read, _write, "layer_types", "max_window_layers", "sliding_window", "use_sliding_window"
)
"""The windows of Qwen 2 and 3."""

QWEN2 = llama_like(
    hf_schema(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        parts=(rope_part(), QWEN_WINDOWS),
        unused=("attention_bias", "mlp_bias"),
        constants={"qkv_bias": True, "o_bias": False, "mlp_bias": False},
        fixed={"use_mrope": (False,), "attention_bias": (True,), "mlp_bias": (False,)},
    ),
    gguf_schema("qwen2", "qwen2"),
)
