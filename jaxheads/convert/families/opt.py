"""OPT: learned positions that start at row two, ReLU, a bias everywhere or nowhere.

OPT-350m normalises after its branches, which is read; but it also embeds in half of its
width and projects to the whole, which is refused (`word_embed_proj_dim`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    head_part,
    learned_positions_part,
    numbered,
)
from jaxheads.convert.schema import Key, Part, Schema
from jaxheads.convert.table import Family, Format
from jaxheads.model.config import ModelConfig

_OFFSET = 2


def _read_norms(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    before = raw.get("do_layer_norm_before", True)
    last = before and not raw.get("_remove_final_layer_norm", False)
    return {"norm_place": "pre" if before else "post", "final_norm": last}


def _write_norms(config: ModelConfig) -> dict[str, Any]:
    before = config.norm_place == "pre"
    return {
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
    }


_SCHEMA = Schema(
    family_key="model_type",
    used=(
        Key("num_hidden_layers", ("n_layers",)),
        Key("num_attention_heads", ("n_heads",)),
        Key("hidden_size", ("d_model",)),
        Key("ffn_dim", ("d_mlp",)),
        Key("vocab_size", ("vocab_size",)),
        Key("max_position_embeddings", ("context_length",)),
        activation_key("activation_function", "relu"),
        Key("enable_bias", ("qkv_bias", "o_bias", "mlp_bias"), default=absent_means(True)),
        Key("tie_word_embeddings", ("tied",), default=absent_means(True)),
    ),
    parts=(
        head_part("OPTForCausalLM", "OPTModel"),
        even_heads_part(),
        learned_positions_part(_OFFSET),
        Part(("do_layer_norm_before", "_remove_final_layer_norm"), _read_norms, _write_norms),
    ),
    constants={
        "family": "opt",
        "ropes": (None,),
        "norm": "layer",
        "norm_bias": True,
        "norm_eps": 1e-5,
        "gated": False,
    },
    fixed={
        **HF_FIXED,
        "layer_norm_elementwise_affine": (True,),
        "is_encoder_decoder": (False,),
    },
    equal={"word_embed_proj_dim": "d_model"},
    ignored=(*HF_IGNORED, "is_decoder"),
    written={"model_type": "opt"},
)

OPT = Family(
    name="opt",
    formats={
        "huggingface": Format(
            schema=_SCHEMA,
            rows=numbered(
                {
                    "embed/tokens": ("model.decoder.embed_tokens.weight", "V D -> V D"),
                    "embed/positions": ("model.decoder.embed_positions.weight", "P D -> P D"),
                    "blocks/attn_norm/scale": ("{B}self_attn_layer_norm.weight", "D -> D"),
                    "blocks/attn_norm/bias": ("{B}self_attn_layer_norm.bias", "D -> D"),
                    "blocks/attn/q": ("{B}self_attn.q_proj.weight", "(H Dh) D -> D H Dh"),
                    "blocks/attn/k": ("{B}self_attn.k_proj.weight", "(K Dh) D -> D K Dh"),
                    "blocks/attn/v": ("{B}self_attn.v_proj.weight", "(K Dh) D -> D K Dh"),
                    "blocks/attn/o": ("{B}self_attn.out_proj.weight", "D (H Dh) -> H Dh D"),
                    "blocks/attn/q_bias": ("{B}self_attn.q_proj.bias", "(H Dh) -> H Dh"),
                    "blocks/attn/k_bias": ("{B}self_attn.k_proj.bias", "(K Dh) -> K Dh"),
                    "blocks/attn/v_bias": ("{B}self_attn.v_proj.bias", "(K Dh) -> K Dh"),
                    "blocks/attn/o_bias": ("{B}self_attn.out_proj.bias", "D -> D"),
                    "blocks/mlp_norm/scale": ("{B}final_layer_norm.weight", "D -> D"),
                    "blocks/mlp_norm/bias": ("{B}final_layer_norm.bias", "D -> D"),
                    "blocks/mlp/up": ("{B}fc1.weight", "F D -> D F"),
                    "blocks/mlp/up_bias": ("{B}fc1.bias", "F -> F"),
                    "blocks/mlp/down": ("{B}fc2.weight", "D F -> F D"),
                    "blocks/mlp/down_bias": ("{B}fc2.bias", "D -> D"),
                    "final_norm/scale": ("model.decoder.final_layer_norm.weight", "D -> D"),
                    "final_norm/bias": ("model.decoder.final_layer_norm.bias", "D -> D"),
                    "unembed/kernel": ("lm_head.weight", "V D -> V D"),
                },
                "model.decoder.layers.{L}.",
            ),
            copies={"lm_head.weight": "embed/tokens"},
            spellings=(("model.", ""),),
        ),
    },
)
