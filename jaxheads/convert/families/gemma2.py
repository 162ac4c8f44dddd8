"""Gemma 2: norms on both sides of a branch, soft caps, windows in every other layer.

Scales of norms are stored minus one, embeddings are multiplied with sqrt(D). llama.cpp adds the
one before it stores the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.llama import (
    GGUF_BLOCK,
    HF_BLOCK,
    hf_schema,
    llama_like,
    varied_rows,
)
from jaxheads.convert.families.llama_cpp import gguf_schema, periodic_windows, read_only
from jaxheads.convert.families.rope import gguf_rope_part, rope_part
from jaxheads.convert.families.shared import (
    absent_means,
    activation_key,
    layer_windows,
    same_as,
    windows_part,
    write_layer_windows,
)
from jaxheads.convert.schema import Key, Part
from jaxheads.model.config import ModelConfig

GEMMA = {
    "norm_plus_one": True,
    "norm_place": "sandwich",
    "mlp_bias": False,
}
"""Fields of every Gemma from the second on."""

GEMMA_ROWS = (
    (
        "blocks/attn_post_norm/scale",
        HF_BLOCK + "post_attention_layernorm.weight",
        GGUF_BLOCK + "post_attention_norm.weight",
        "D -> D",
    ),
    (
        "blocks/mlp_norm/scale",
        HF_BLOCK + "pre_feedforward_layernorm.weight",
        GGUF_BLOCK + "ffn_norm.weight",
        "D -> D",
    ),
    (
        "blocks/mlp_post_norm/scale",
        HF_BLOCK + "post_feedforward_layernorm.weight",
        GGUF_BLOCK + "post_ffw_norm.weight",
        "D -> D",
    ),
)

GEMMA_KEYS = (
    Key("head_dim", ("head_dim",), default=absent_means(256)),
    activation_key("hidden_activation", "gelu_pytorch_tanh"),
    Key("tie_word_embeddings", ("tied",), default=absent_means(True)),
)

GEMMA_FIXED = {
    "use_bidirectional_attention": (False,),
    # A key of the first Gemma, which the code of the later ones does not read.
    "hidden_act": ("gelu_pytorch_tanh",),
}

GEMMA_IGNORED = ("cache_implementation", "sliding_window_size")


def _read_scales(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    features = raw.get("query_pre_attn_scalar", 256)
    if isinstance(features, bool) or not isinstance(features, (int, float)) or features <= 0:
        raise ValueError(f"query_pre_attn_scalar must be a positive number, got {features!r}")
    return _scales(features, fields)


def _scales(features: float, fields: Mapping[str, Any]) -> dict[str, Any]:
    plain = features == fields["head_dim"]
    return {
        "attn_scale": None if plain else features**-0.5,
        "embed_scale": fields["d_model"] ** 0.5,
    }


def _write_scales(config: ModelConfig) -> dict[str, Any]:
    scale = config.attn_scale
    features = config.head_dim if scale is None else round(scale**-2)
    expected = _scales(features, {"head_dim": config.head_dim, "d_model": config.d_model})
    if expected != {"attn_scale": scale, "embed_scale": config.embed_scale}:
        raise ValueError(
            f"this format needs attn_scale to be a whole number to the power of -0.5 and "
            f"embed_scale to be {expected['embed_scale']}, got {scale} and {config.embed_scale}"
        )
    return {"query_pre_attn_scalar": features}


GEMMA_SCALES = Part(("query_pre_attn_scalar",), _read_scales, _write_scales)
"""Factors of embeddings and attention logits."""


def gguf_scales(layers_of_27b: int) -> Part:
    """The same of a GGUF file, which names none: llama.cpp knows the 27B models by their depth."""

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        wide = fields["n_layers"] == layers_of_27b
        features = fields["d_model"] // fields["n_heads"] if wide else fields["head_dim"]
        return _scales(features, fields)

    return Part((), read, read_only)


def _read_windows(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    return layer_windows(raw, n_layers, lambda layer: layer % 2 == 0)


GEMMA2 = llama_like(
    hf_schema(
        "gemma2",
        ("Gemma2ForCausalLM", "Gemma2Model"),
        parts=(
            rope_part(),
            windows_part(_read_windows, write_layer_windows, "layer_types", "sliding_window"),
            GEMMA_SCALES,
        ),
        used=(
            *GEMMA_KEYS,
            # Null means no cap, but an absent key would mean a cap that is not in the file.
            Key(
                "attn_logit_softcapping",
                ("attn_softcap",),
                default=same_as("attn_logit_softcapping"),
            ),
            Key(
                "final_logit_softcapping",
                ("logit_softcap",),
                default=same_as("final_logit_softcapping"),
            ),
        ),
        unused=("hidden_act", "mlp_bias"),
        constants=GEMMA,
        fixed=GEMMA_FIXED,
        ignored=GEMMA_IGNORED,
    ),
    gguf_schema(
        "gemma2",
        "gemma2",
        parts=(
            gguf_rope_part("gemma2"),
            windows_part(
                periodic_windows("gemma2", size=4096, period=2),
                read_only,
                *("gemma2.attention.sliding_window", "gemma2.attention.sliding_window_pattern"),
            ),
            gguf_scales(layers_of_27b=46),
        ),
        used=(
            Key("attn_logit_softcapping", ("attn_softcap",), default=absent_means(50.0)),
            Key("final_logit_softcapping", ("logit_softcap",), default=absent_means(30.0)),
        ),
        constants={**GEMMA, "activation": "gelu_tanh"},
    ),
    varied_rows(*GEMMA_ROWS),
    norm_shift=1.0,
)
