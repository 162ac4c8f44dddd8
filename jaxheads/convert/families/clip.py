"""CLIP (Radford et al. 2021): a causal text tower and a vision tower, projected and compared."""

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
)
from jaxheads.convert.schema import Composite, Key, Part, Schema
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.clip import ClipConfig
from jaxheads.model.config import Image, ModelConfig

_LEGACY_EOS = 2
"""An end token that older configs name wrongly: the reference then takes the highest id."""


def _read_text(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    eos = raw.get("eos_token_id", _LEGACY_EOS)
    found = {"n_positions": fields["context_length"]}
    if eos == _LEGACY_EOS:
        return found | {"projected": "highest"}
    return found | {"projected": "eos", "eos_id": eos}


def _write_text(config: ModelConfig) -> dict[str, Any]:
    return {"eos_token_id": _LEGACY_EOS if config.projected == "highest" else config.eos_id}


def _read_image(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    side, patch = raw["image_size"], raw["patch_size"]
    image = Image(side, side, patch, raw.get("num_channels", 3), bias=False)
    return {"image": image, "context_length": image.tokens, "n_positions": image.tokens}


def _write_image(config: ModelConfig) -> dict[str, Any]:
    image = config.image
    if image is None or image.height != image.width:
        raise ValueError(f"CLIP looks at square images, the config has {image}")
    return {
        "image_size": image.height,
        "patch_size": image.patch,
        "num_channels": image.channels,
    }


_COMMON = (
    Key("num_hidden_layers", ("n_layers",)),
    Key("num_attention_heads", ("n_heads",)),
    Key("hidden_size", ("d_model",)),
    Key("intermediate_size", ("d_mlp",)),
    Key("layer_norm_eps", ("norm_eps",), default=absent_means(1e-5)),
    activation_key("hidden_act", "quick_gelu"),
)
_CONSTANTS = {
    "family": "clip",
    "ropes": (None,),
    "norm": "layer",
    "norm_bias": True,
    "qkv_bias": True,
    "o_bias": True,
    "gated": False,
    "mlp_bias": True,
    "head": "none",
}
# The projection of the whole model is what counts; the towers repeat it, or a default.
_IGNORED = (*HF_IGNORED, "projection_dim", "is_decoder", "is_encoder_decoder", "_commit_hash")

_TEXT = Schema(
    family_key="model_type",
    used=(
        *_COMMON,
        Key("vocab_size", ("vocab_size",)),
        Key("max_position_embeddings", ("context_length",)),
    ),
    parts=(
        even_heads_part(),
        Part(("eos_token_id",), _read_text, _write_text),
    ),
    constants=_CONSTANTS,
    fixed=HF_FIXED,
    ignored=tuple(key for key in _IGNORED if key != "eos_token_id"),
    written={"model_type": "clip_text_model"},
)
_VISION = Schema(
    family_key="model_type",
    used=_COMMON,
    parts=(
        even_heads_part(),
        Part(("image_size", "patch_size", "num_channels"), _read_image, _write_image),
    ),
    constants={**_CONSTANTS, "vocab_size": 0, "causal": False, "embed_norm": True},
    fixed=HF_FIXED,
    ignored=(*_IGNORED, "tie_word_embeddings"),
    written={"model_type": "clip_vision_model"},
)


_BLOCK = {
    **{f"attn/{head}": f"self_attn.{head}_proj" for head in "qkv"},
    "attn/o": "self_attn.out_proj",
    "attn_norm": "layer_norm1",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
}


def _blocks(side: str) -> dict[str, Stored]:
    return block_rows(f"{side}_model.encoder.layers.{{L}}.", _BLOCK, f"{side}/blocks/")


_TEXT_EMBEDDINGS = "text_model.embeddings."
_VISION_EMBEDDINGS = "vision_model.embeddings."

CLIP = Family(
    name="clip",
    formats={
        "huggingface": Format(
            schema=Composite(
                family_key="model_type",
                sides={"text": _TEXT, "vision": _VISION},
                make=ClipConfig,
                sections={"text": "text_config", "vision": "vision_config"},
                used={"projection_dim": "projection"},
                ignored=(
                    *HF_IGNORED,
                    *("logit_scale_init_value", "text_config_dict", "vision_config_dict"),
                    *("tie_word_embeddings", "_commit_hash", "is_encoder_decoder"),
                ),
                written={"model_type": "clip", "architectures": ["CLIPModel"]},
            ),
            rows={
                "logit_scale": Stored("logit_scale", " -> "),
                "text/embed/tokens": Stored(
                    f"{_TEXT_EMBEDDINGS}token_embedding.weight", "V D -> V D"
                ),
                "text/embed/positions": Stored(
                    f"{_TEXT_EMBEDDINGS}position_embedding.weight", "P D -> P D"
                ),
                **_blocks("text"),
                **norm_rows("text/final_norm", "text_model.final_layer_norm"),
                "text/projection/kernel": Stored("text_projection.weight", "Z D -> D Z"),
                "vision/embed/patches": Stored(
                    f"{_VISION_EMBEDDINGS}patch_embedding.weight", "D C W U -> W U C D"
                ),
                "vision/embed/prefix": Stored((f"{_VISION_EMBEDDINGS}class_embedding",), "D -> D"),
                "vision/embed/positions": Stored(
                    f"{_VISION_EMBEDDINGS}position_embedding.weight", "P D -> P D"
                ),
                # The reference spells it so.
                **norm_rows("vision/embed/norm", "vision_model.pre_layrnorm"),
                **_blocks("vision"),
                **norm_rows("vision/final_norm", "vision_model.post_layernorm"),
                "vision/projection/kernel": Stored("visual_projection.weight", "Z D -> D Z"),
            },
            ignored=(r"(text|vision)_model\.embeddings\.position_ids",),
        )
    },
)
