"""Mistral: Llama with a sliding window in every layer.

llama.cpp has no architecture of its own for it: its GGUF files are Llama's, which name no window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.llama import hf_schema, llama_like
from jaxheads.convert.families.rope import rope_part
from jaxheads.convert.families.shared import layer_windows, windows_part
from jaxheads.model.config import ModelConfig


def _read(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    return layer_windows(raw, n_layers, lambda layer: "sliding_window" in raw)


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = set(config.windows)
    if len(windows) > 1:
        raise ValueError(f"this format has one window in all layers, got {config.windows}")
    return {"sliding_window": next(iter(windows), 0) or None}


MISTRAL = llama_like(
    dataclasses.replace(
        hf_schema(
            "mistral",
            ("MistralForCausalLM", "MistralModel"),
            parts=(rope_part(), windows_part(_read, _write, "sliding_window")),
            unused=("attention_bias", "mlp_bias"),
            # Some files carry Llama's keys, which Mistral's code does not read.
            fixed={"attention_bias": (False,), "mlp_bias": (False,)},
        ),
        # Null says that there is none; what absence means has changed between versions.
        required=("sliding_window",),
    ),
    gguf=None,
)
