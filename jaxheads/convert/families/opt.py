"""OPT: learned positions that start at row two, ReLU, a bias everywhere or nowhere.

OPT-350m normalises after its branches, which is read; but it also embeds in half of its
width and projects to the whole, which is refused (`word_embed_proj_dim`).
"""

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
)
from jaxheads.convert.schema import Key, Part, Schema
from jaxheads.convert.table import Family, Format, Stored
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

_BLOCK = {
    "attn_norm": "self_attn_layer_norm",
    **{f"attn/{head}": f"self_attn.{head}_proj" for head in "qkv"},
    "attn/o": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp/up": "fc1",
    "mlp/down": "fc2",
}

OPT = Family(
    name="opt",
    formats={
        "huggingface": Format(
            schema=_SCHEMA,
            rows={
                "embed/tokens": Stored("model.decoder.embed_tokens.weight", "V D -> V D"),
                "embed/positions": Stored("model.decoder.embed_positions.weight", "P D -> P D"),
                **block_rows("model.decoder.layers.{L}.", _BLOCK),
                **norm_rows("final_norm", "model.decoder.final_layer_norm"),
                "unembed/kernel": Stored("lm_head.weight", "V D -> V D"),
            },
            copies={"lm_head.weight": "embed/tokens"},
            spellings=(("model.", ""),),
        ),
    },
)
