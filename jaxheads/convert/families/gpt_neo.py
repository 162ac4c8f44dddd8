"""GPT-Neo: GPT-2 with unscaled attention that is local in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.rows import block_rows, norm_rows
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    head_part,
    learned_positions_part,
    windows_part,
)
from jaxheads.convert.schema import Key, Schema, Source
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig

_KINDS = ("global", "local")


def _read_windows(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    layers = list(raw.get("attention_layers", ()))
    if "attention_types" in raw or not layers:
        types = raw.get("attention_types", [[_KINDS, 12]])
        expanded = [kind for kinds, times in types for _ in range(times) for kind in kinds]
        if layers and layers != expanded:
            raise ValueError(
                f"attention_types = {types!r} disagrees with attention_layers = {layers!r}"
            )
        layers = expanded
    window = raw.get("window_size", 256)
    if len(layers) != n_layers or any(kind not in _KINDS for kind in layers):
        raise ValueError(
            f"attention_types must name {n_layers} layers, each global or local, got {layers!r}"
        )
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window_size must be a positive integer, got {window!r}")
    return tuple(window if kind == "local" else 0 for kind in layers)


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    windows = config.windows or (0,) * config.n_layers
    widths = {window for window in windows if window}
    if len(widths) > 1:
        raise ValueError(f"this format has one window size, the config has {config.windows}")
    layers = ["local" if window else "global" for window in windows]
    keys: dict[str, Any] = {"attention_layers": layers, "attention_types": [[layers, 1]]}
    if widths:
        keys["window_size"] = widths.pop()
    return keys


def _four_times_wider(source: Source) -> int:
    return 4 * source.config["hidden_size"]


_SCHEMA = Schema(
    family_key="model_type",
    used=(
        Key("num_layers", ("n_layers",)),
        Key("num_heads", ("n_heads",)),
        Key("hidden_size", ("d_model",)),
        Key("intermediate_size", ("d_mlp",), default=_four_times_wider),
        Key("vocab_size", ("vocab_size",)),
        Key("max_position_embeddings", ("context_length",)),
        Key("layer_norm_epsilon", ("norm_eps",), default=absent_means(1e-5)),
        activation_key("activation_function", "gelu_new"),
        Key("tie_word_embeddings", ("tied",), default=absent_means(True)),
    ),
    parts=(
        head_part("GPTNeoForCausalLM", "GPTNeoModel"),
        even_heads_part(),
        learned_positions_part(),
        windows_part(
            _read_windows, _write_windows, "attention_types", "attention_layers", "window_size"
        ),
    ),
    constants={
        "family": "gpt_neo",
        "ropes": (None,),
        "norm": "layer",
        "norm_bias": True,
        "attn_scale": 1.0,
        "o_bias": True,
        "gated": False,
        "mlp_bias": True,
    },
    fixed={**HF_FIXED, "is_encoder_decoder": (False,)},
    ignored=(*HF_IGNORED, "is_decoder", "resid_dropout", "summary_*"),
    written={"model_type": "gpt_neo"},
)

_BLOCK = {
    "attn_norm": "ln_1",
    **{f"attn/{head}": f"attn.attention.{head}_proj" for head in "qkv"},
    "attn/o": "attn.attention.out_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}

GPT_NEO = Family(
    name="gpt_neo",
    formats={
        "huggingface": Format(
            schema=_SCHEMA,
            rows={
                "embed/tokens": Stored("transformer.wte.weight", "V D -> V D"),
                "embed/positions": Stored("transformer.wpe.weight", "P D -> P D"),
                **block_rows("transformer.h.{L}.", _BLOCK),
                **norm_rows("final_norm", "transformer.ln_f"),
                "unembed/kernel": Stored("lm_head.weight", "V D -> V D"),
            },
            ignored=(r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)",),
            copies={"lm_head.weight": "embed/tokens"},
            spellings=(("transformer.", ""),),
        ),
    },
)
