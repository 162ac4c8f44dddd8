"""BART (Lewis et al. 2020): layer norms after each sum, learned positions, tied ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.rows import block_rows, norm_rows
from jaxheads.convert.families.shared import HF_FIXED, HF_IGNORED, activation_key, even_heads_part
from jaxheads.convert.schema import Composite, Key, Part, Schema
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig
from jaxheads.model.encoder_decoder import EncoderDecoderConfig

_OFFSET = 2
"""Rows of the position table before that of the first token."""


def _read_positions(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    scale = fields["d_model"] ** 0.5 if raw.get("scale_embedding", False) else 1.0
    rows = raw.get("max_position_embeddings", 1024)
    return {"context_length": rows, "n_positions": rows + _OFFSET, "embed_scale": scale}


def _write_positions(config: ModelConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.context_length,
        "scale_embedding": config.embed_scale != 1,
    }


def _side(name: str, constants: Mapping[str, Any], ignored: tuple[str, ...]) -> Schema:
    return Schema(
        family_key="model_type",
        used=(
            Key(f"{name}_layers", ("n_layers",)),
            Key(f"{name}_attention_heads", ("n_heads",)),
            Key(f"{name}_ffn_dim", ("d_mlp",)),
            Key("d_model", ("d_model",)),
            Key("vocab_size", ("vocab_size",)),
            activation_key("activation_function", "gelu"),
        ),
        parts=(
            even_heads_part(),
            Part(("max_position_embeddings", "scale_embedding"), _read_positions, _write_positions),
        ),
        constants={
            **constants,
            "family": "bart",
            "ropes": (None,),
            "position_offset": _OFFSET,
            "norm": "layer",
            "norm_bias": True,
            "norm_place": "post",
            "embed_norm": True,
            "final_norm": False,
            "qkv_bias": True,
            "o_bias": True,
            "gated": False,
            "mlp_bias": True,
        },
        fixed={
            **HF_FIXED,
            "is_encoder_decoder": (True,),
            "tie_word_embeddings": (True,),
            # Spelled out by files from before these variants became models of their own.
            "add_final_layer_norm": (False,),
            "normalize_before": (False,),
            "normalize_embedding": (True,),
            "static_position_embeddings": (False,),
            "add_bias_logits": (False, True),
            "extra_pos_embeddings": (_OFFSET,),
        },
        ignored=(
            *(*HF_IGNORED, *ignored, "is_decoder", "classif_dropout", "num_hidden_layers"),
            *("force_bos_token_to_be_generated", "output_past"),
        ),
    )


_MLP = {"mlp/up": "fc1", "mlp/down": "fc2", "mlp_norm": "final_layer_norm"}


def _attention(path: str, name: str) -> dict[str, str]:
    maps = {f"{path}/{head}": f"{name}.{head}_proj" for head in "qkv"}
    return {**maps, f"{path}/o": f"{name}.out_proj", f"{path}_norm": f"{name}_layer_norm"}


def _stack(side: str, cross: bool) -> dict[str, Stored]:
    names = {**_attention("attn", "self_attn"), **_MLP}
    if cross:
        names |= _attention("cross", "encoder_attn")
    return {
        f"{side}/embed/positions": Stored(f"model.{side}.embed_positions.weight", "P D -> P D"),
        **norm_rows(f"{side}/embed/norm", f"model.{side}.layernorm_embedding"),
        **block_rows(f"model.{side}.layers.{{L}}.", names, f"{side}/blocks/"),
    }


BART = Family(
    name="bart",
    formats={
        "huggingface": Format(
            schema=Composite(
                family_key="model_type",
                sides={
                    "encoder": _side("encoder", {"causal": False, "head": "none"}, ("decoder_*",)),
                    "decoder": _side(
                        "decoder", {"cross": True, "unembed_bias": True}, ("encoder_*",)
                    ),
                },
                make=EncoderDecoderConfig,
                written={
                    "model_type": "bart",
                    "architectures": ["BartForConditionalGeneration"],
                    "is_encoder_decoder": True,
                    "tie_word_embeddings": True,
                    "decoder_start_token_id": 2,
                },
            ),
            rows={
                "embed/tokens": Stored("model.shared.weight", "V D -> V D"),
                "unembed/bias": Stored("final_logits_bias", "1 V -> V"),
                **_stack("encoder", cross=False),
                **_stack("decoder", cross=True),
            },
            copies={
                "model.encoder.embed_tokens.weight": "embed/tokens",
                "model.decoder.embed_tokens.weight": "embed/tokens",
                "lm_head.weight": "embed/tokens",
            },
        )
    },
)
