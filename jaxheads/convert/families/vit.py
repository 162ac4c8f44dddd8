"""ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021): encoders of image patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.encoder import ENCODER_CONSTANTS, class_part
from jaxheads.convert.families.rows import block_rows, dense_rows, norm_rows
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    has,
)
from jaxheads.convert.schema import Key, Part, Schema, Source
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import Image, ModelConfig

VISION_KEYS = (
    Key("num_hidden_layers", ("n_layers",)),
    Key("num_attention_heads", ("n_heads",)),
    Key("hidden_size", ("d_model",)),
    Key("qkv_bias", ("qkv_bias",), default=absent_means(True)),
)
VISION_CONSTANTS = {k: v for k, v in ENCODER_CONSTANTS.items() if k != "qkv_bias"} | {"tied": False}

_LABELS = ("id2label", "label2id", "num_labels")
_BLOCK = {
    "attn_norm": "layernorm_before",
    "attn/q": "attention.attention.query",
    "attn/k": "attention.attention.key",
    "attn/v": "attention.attention.value",
    "attn/o": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}


def image_part(prefix: int) -> Part:
    """The part that sets `image` and the positions of its patches.

    Args:
      prefix: learned tokens before the patches.
    """

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        height, width = _pair(raw, "image_size")
        patch, other = _pair(raw, "patch_size")
        if patch != other:
            raise ValueError(f"patch_size must be square, got {patch} x {other}")
        image = Image(height, width, patch, channels=raw.get("num_channels", 3), prefix=prefix)
        tokens = image.tokens
        return {"image": image, "context_length": tokens, "n_positions": tokens}

    def write(config: ModelConfig) -> dict[str, Any]:
        image = config.image
        if image is None:
            raise ValueError("this family is of vision models, config.image is None")
        size = [image.height, image.width]
        return {
            "image_size": size[0] if size[0] == size[1] else size,
            "patch_size": image.patch,
            "num_channels": image.channels,
        }

    return Part(("image_size", "patch_size", "num_channels"), read, write)


def _pair(raw: Mapping[str, Any], key: str) -> tuple[int, int]:
    if key not in raw:
        raise ValueError(f"missing key {key}")
    value = raw[key]
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(f"{key} must be a positive integer or two, got {value!r}")
    return pair


def embedding_rows(prefix: str, *tokens: str) -> dict[str, Stored]:
    """Rows of the patch embedding, the learned tokens and the positions."""
    embeddings = f"{prefix}embeddings."
    patches = f"{embeddings}patch_embeddings.projection"
    return {
        "embed/patches": Stored(f"{patches}.weight", "D C W U -> W U C D"),
        "embed/patch_bias": Stored(f"{patches}.bias", "D -> D"),
        "embed/prefix": Stored(tuple(f"{embeddings}{name}" for name in tokens), "1 1 D -> D"),
        "embed/positions": Stored(f"{embeddings}position_embeddings", "1 P D -> P D"),
    }


def _classes(source: Source) -> int:
    return source.shapes["classifier.weight"][0] if "classifier.weight" in source.shapes else 0


def _head(source: Source) -> str:
    return "classes" if _classes(source) else "none"


def _read_labels(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    classes = fields["vocab_size"]
    for key in _LABELS:
        if classes and key in raw:
            count = raw[key] if key == "num_labels" else len(raw[key])
            if count != classes:
                raise ValueError(f"{key} counts {count} classes, classifier.weight {classes}")
    return {}


def _write_labels(config: ModelConfig) -> dict[str, Any]:
    # transformers reads the number of classes off the names that they have.
    names = [f"LABEL_{index}" for index in range(config.vocab_size)]
    if not names:
        return {}
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _family(name: str, kind: str, tokens: tuple[str, ...], refused: dict[str, str]) -> Family:
    prefix = f"{name}."
    schema = Schema(
        family_key="model_type",
        used=(
            *VISION_KEYS,
            Key("intermediate_size", ("d_mlp",)),
            Key("layer_norm_eps", ("norm_eps",), default=absent_means(1e-12)),
            activation_key("hidden_act", "gelu"),
        ),
        parts=(
            even_heads_part(),
            image_part(prefix=len(tokens)),
            Part(_LABELS, _read_labels, _write_labels),
            class_part({"classes": f"{kind}ForImageClassification", "none": f"{kind}Model"}),
        ),
        constants={**VISION_CONSTANTS, "family": name},
        inferred={"head": _head, "vocab_size": _classes, "pooler": has("pooler.dense.weight")},
        fixed={**HF_FIXED, "pooler_act": ("tanh",)},
        equal={"pooler_output_size": "d_model"},
        # encoder_stride is of the head that predicts masked patches.
        ignored=(*(key for key in HF_IGNORED if key not in _LABELS), "encoder_stride"),
        written={"model_type": name},
    )
    rows = {
        **embedding_rows(prefix, *tokens),
        **block_rows(f"{prefix}encoder.layer.{{L}}.", _BLOCK),
        **norm_rows("final_norm", f"{prefix}layernorm"),
        **dense_rows("pooler/kernel", "pooler/bias", f"{prefix}pooler.dense"),
        "unembed/kernel": Stored("classifier.weight", "V D -> V D"),
        "unembed/bias": Stored("classifier.bias", "V -> V"),
    }
    table = Format(
        schema=schema,
        rows=rows,
        ignored=(rf"({name}\.)?embeddings\.mask_token",),
        refused={"decoder.0.weight": "it predicts masked patches, which is not supported"}
        | refused,
        spellings=((prefix, ""),),
    )
    return Family(name=name, formats={"huggingface": table})


VIT = _family("vit", "ViT", ("cls_token",), {})
DEIT = _family(
    "deit",
    "DeiT",
    ("cls_token", "distillation_token"),
    {
        "cls_classifier.weight": "DeiTForImageClassificationWithTeacher has two classifiers, "
        "which is not supported"
    },
)
