"""Gemma 3, text: Gemma 2 with normalised queries and keys, and an encoding for each kind of layer.

Layers with a window rotate with a base of their own and are never scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.gemma2 import (
    GEMMA,
    GEMMA_FIXED,
    GEMMA_IGNORED,
    GEMMA_KEYS,
    GEMMA_ROWS,
    GEMMA_SCALES,
    gguf_scales,
)
from jaxheads.convert.families.llama import hf_schema, llama_like, varied_rows
from jaxheads.convert.families.llama_cpp import gguf_schema, periodic_windows, read_only
from jaxheads.convert.families.qwen3 import QK_NORM_ROWS
from jaxheads.convert.families.rope import (
    gguf_rope_part,
    read_gguf_rope,
    read_rope,
    rope_settings,
    write_rope,
)
from jaxheads.convert.families.shared import (
    FULL,
    SLIDING,
    absent_means,
    layer_windows,
    normal_windows,
    write_layer_windows,
)
from jaxheads.convert.schema import Key, Part
from jaxheads.model.config import ModelConfig
from jaxheads.model.rotary import Rope

_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_PERIOD = 6
_FLAT = {
    FULL: ("rope_theta", "rope_scaling."),
    SLIDING: ("rope_local_base_freq", None),
}
"""The older spelling: of each kind of layer, the key of its base and what begins its scaling."""


def _rope(raw: Mapping[str, Any], kind: str, context_length: int) -> Rope:
    """The encoding of one kind of layer: its keys, respelled as if there were no other kind."""
    base, scaling = _FLAT[kind]
    nested = f"rope_parameters.{kind}."
    keys = {"rope_theta": raw[base]} if base in raw else {}
    for key, value in raw.items():
        if scaling and key.startswith(scaling):
            keys[key] = value
        if key.startswith(nested):
            keys["rope_parameters." + key.removeprefix(nested)] = value
    try:
        return read_rope(rope_settings(keys), _THETA[kind], context_length)
    except ValueError as error:
        raise ValueError(f"of {kind}: {error}") from error


def _by_kind(
    windows: tuple[int, ...], full: Rope, sliding: Rope
) -> dict[str, tuple[int, ...] | tuple[Rope, ...]]:
    ropes = tuple(sliding if window else full for window in windows)
    return {
        "windows": normal_windows(windows),
        "ropes": ropes[:1] if len(set(ropes)) == 1 else ropes,
    }


def _read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    period = raw.get("sliding_window_pattern", _PERIOD)
    windows = layer_windows(raw, fields["n_layers"], lambda layer: (layer + 1) % period != 0)
    full, sliding = (_rope(raw, kind, fields["context_length"]) for kind in _THETA)
    return dict(_by_kind(windows, full, sliding))


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = config.windows or (0,) * config.n_layers
    ropes = config.ropes if len(config.ropes) > 1 else config.ropes * config.n_layers
    found = {kind: Rope(theta) for kind, theta in _THETA.items()}
    for kind in found:
        used = {
            r for r, window in zip(ropes, windows, strict=True) if bool(window) == (kind == SLIDING)
        }
        if None in used or len(used) > 1:
            raise ValueError(f"this format has one rotary encoding for {kind}, got {config.ropes}")
        found[kind] = next((rope for rope in used if rope is not None), found[kind])
    if found[SLIDING].scaling is not None:
        raise ValueError(f"this format scales no rotary encoding of {SLIDING}, got {config.ropes}")
    return {
        **write_rope(found[FULL]),
        "rope_local_base_freq": found[SLIDING].base,
        **write_layer_windows(config),
    }


def _read_gguf(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    windows = periodic_windows("gemma3", size=None, period=_PERIOD)(raw, fields["n_layers"])
    full = read_gguf_rope(raw, "gemma3", fields["context_length"])
    return dict(_by_kind(windows, full, Rope(raw.get("gemma3.rope.freq_base_swa", 10_000.0))))


GEMMA3 = llama_like(
    hf_schema(
        "gemma3_text",
        ("Gemma3ForCausalLM", "Gemma3TextModel"),
        parts=(
            Part(
                keys=(
                    *("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_scaling.*"),
                    *("rope_parameters", f"rope_parameters.{FULL}*", f"rope_parameters.{SLIDING}*"),
                    *("layer_types", "sliding_window", "sliding_window_pattern"),
                ),
                read=_read,
                write=_write,
            ),
            GEMMA_SCALES,
        ),
        used=(
            *GEMMA_KEYS,
            Key("final_logit_softcapping", ("logit_softcap",), default=absent_means(None)),
        ),
        unused=("hidden_act", "mlp_bias"),
        constants={**GEMMA, "qk_norm": "head"},
        # The code has the key of this cap from Gemma 2, and does not read it.
        fixed={**GEMMA_FIXED, "attn_logit_softcapping": (None,)},
        # A copy of the pattern that newer files carry next to the list of layers.
        ignored=(*GEMMA_IGNORED, "_sliding_window_pattern"),
    ),
    gguf_schema(
        "gemma3",
        "gemma3_text",
        parts=(
            Part(
                keys=(
                    *gguf_rope_part("gemma3").keys,
                    *("gemma3.rope.freq_base_swa", "gemma3.attention.sliding_window"),
                    "gemma3.attention.sliding_window_pattern",
                ),
                read=_read_gguf,
                write=read_only,
            ),
            gguf_scales(layers_of_27b=62),
        ),
        used=(Key("final_logit_softcapping", ("logit_softcap",), default=absent_means(None)),),
        constants={**GEMMA, "activation": "gelu_tanh", "qk_norm": "head"},
    ),
    varied_rows(*GEMMA_ROWS, *QK_NORM_ROWS),
    architecture="gemma3",
    norm_shift=1.0,
)
