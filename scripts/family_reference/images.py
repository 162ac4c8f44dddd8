"""Vision models, and CLIP with its two towers."""

from __future__ import annotations

from typing import Any

from family_reference.case import Case, Stack

_PIXELS = (2, 40, 40, 3)
_SHAPE: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 40,
    "patch_size": 8,
    "layer_norm_eps": 2e-3,
}


def _vit(path: str) -> Stack:
    return Stack(
        f"{path}layers",
        "input:layernorm_after",
        attention="attention",
        o="attention.o_proj",
        final=f"{path}layernorm",
        side="",
    )


_DINO = Stack(
    "encoder.layer",
    "input:norm2",
    attention="attention",
    o="attention.o_proj",
    final="layernorm",
    side="",
)


def _dinov2(name: str, **settings: Any) -> Case:
    shape = {key: size for key, size in _SHAPE.items() if key != "intermediate_size"}
    shape |= {"mlp_ratio": 2, "layerscale_value": 0.5}
    return Case(name, "Dinov2Model", "Dinov2Config", shape | settings, (_DINO,), pixels=_PIXELS)


def _clip_tower(name: str, final: str, side: str, end: int = 0) -> Stack:
    return Stack(
        f"{name}_model.encoder.layers",
        "input:layer_norm2",
        o="self_attn.out_proj",
        final=f"{name}_model.{final}",
        prefix=f"{name}.",
        side=side,
        length=77,
        end=end,
    )


def _clip(name: str, end: int, **text: Any) -> Case:
    """CLIP whose text rows end in the token `end`."""
    return Case(
        name,
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": _TEXT | text,
            "vision_config": _SHAPE | {"num_hidden_layers": 2, "hidden_size": 40},
            "projection_dim": 28,
        },
        (
            _clip_tower("text", "final_layer_norm", "right", end),
            _clip_tower("vision", "post_layernorm", ""),
        ),
        pixels=_PIXELS,
        outputs={"text_embeds": "text_projection", "image_embeds": "visual_projection"},
    )


_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-3,
}

IMAGES = (
    Case(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        _SHAPE | {"num_labels": 7},
        (_vit("vit."),),
        pixels=_PIXELS,
    ),
    Case(
        "vit_backbone",
        "ViTModel",
        "ViTConfig",
        _SHAPE | {"qkv_bias": False, "num_channels": 2},
        (_vit(""),),
        pixels=(2, 40, 40, 2),
        outputs={"pooled": "pooler"},
    ),
    Case(
        "deit",
        "DeiTForImageClassification",
        "DeiTConfig",
        _SHAPE | {"num_labels": 7},
        (_vit("deit."),),
        pixels=_PIXELS,
    ),
    _dinov2("dinov2"),
    _dinov2("dinov2_swiglu", use_swiglu_ffn=True),
    # An end of 2 in the config is that of the first release: the largest id ends a row.
    _clip("clip", 96, eos_token_id=2),
    _clip("clip_eos", 50, eos_token_id=50, hidden_act="gelu"),
)
