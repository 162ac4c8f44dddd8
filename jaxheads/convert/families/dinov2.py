"""DINOv2 (Oquab et al. 2024): a vision transformer that scales what its branches write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.encoder import class_part
from jaxheads.convert.families.rows import block_rows, norm_rows
from jaxheads.convert.families.shared import (
    ACTIVATION_NAMES,
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    even_heads_part,
)
from jaxheads.convert.families.vit import (
    VISION_CONSTANTS,
    VISION_KEYS,
    embedding_rows,
    image_part,
)
from jaxheads.convert.schema import Key, Part, Schema
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig

_BLOCK = {
    "attn_norm": "norm1",
    "attn/q": "attention.attention.query",
    "attn/k": "attention.attention.key",
    "attn/v": "attention.attention.value",
    "attn/o": "attention.output.dense",
    "mlp_norm": "norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def _width(d_model: int, ratio: float, gated: bool) -> int:
    """F. A gated MLP has two thirds of the width, rounded up to a multiple of eight."""
    width = int(d_model * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _read_mlp(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    ratio, gated = raw.get("mlp_ratio", 4), fields["gated"]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio <= 0:
        raise ValueError(f"mlp_ratio must be a positive number, got {ratio!r}")
    name = raw.get("hidden_act", "gelu")
    if name not in ACTIVATION_NAMES:
        raise ValueError(
            f"hidden_act = {name!r} is not supported (known: {', '.join(ACTIVATION_NAMES)})"
        )
    return {
        "d_mlp": _width(fields["d_model"], ratio, gated),
        # The gated MLP is SwiGLU whatever the activation is said to be.
        "activation": "silu" if gated else ACTIVATION_NAMES[name],
    }


def _write_mlp(config: ModelConfig) -> dict[str, Any]:
    exact = config.d_mlp * (1.5 if config.gated else 1) / config.d_model
    whole = round(exact)
    fits = whole > 0 and _width(config.d_model, whole, config.gated) == config.d_mlp
    keys: dict[str, Any] = {"mlp_ratio": whole if fits else exact}
    if not config.gated:
        names = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
        keys["hidden_act"] = names[config.activation]
    return keys


def _swiglu_rows(config: ModelConfig) -> dict[str, Stored]:
    """Rows of the gated MLP, whose first map is one tensor: what is activated comes first."""
    if not config.gated:
        return {}
    mlp, rows = "encoder.layer.{L}.mlp.", {}
    for part, path in enumerate(("gate", "up")):
        for suffix, name, pattern in (("", "weight", "J D -> D J"), ("_bias", "bias", "J -> J")):
            stored = Stored(f"{mlp}weights_in.{name}", pattern, joint=("F", "F"), part=part)
            rows[f"blocks/mlp/{path}{suffix}"] = stored
    rows["blocks/mlp/down"] = Stored(f"{mlp}weights_out.weight", "D F -> F D")
    rows["blocks/mlp/down_bias"] = Stored(f"{mlp}weights_out.bias", "D -> D")
    return rows


DINOV2 = Family(
    name="dinov2",
    formats={
        "huggingface": Format(
            schema=Schema(
                family_key="model_type",
                used=(
                    *VISION_KEYS,
                    Key("layer_norm_eps", ("norm_eps",), default=absent_means(1e-6)),
                    Key("use_swiglu_ffn", ("gated",), default=absent_means(False)),
                ),
                parts=(
                    even_heads_part(),
                    image_part(prefix=1),
                    Part(("mlp_ratio", "hidden_act"), _read_mlp, _write_mlp),
                    class_part({"none": "Dinov2Model"}),
                ),
                constants={
                    **{key: value for key, value in VISION_CONSTANTS.items() if key != "gated"},
                    **{"family": "dinov2", "head": "none", "vocab_size": 0, "branch_scale": True},
                },
                fixed=HF_FIXED,
                # What is written of a branch is scaled by a tensor, which layerscale_value
                # only fills before training; the rest is of training and of feature maps.
                ignored=(
                    *HF_IGNORED,
                    *("layerscale_value", "drop_path_rate", "use_mask_token", "apply_layernorm"),
                    *("reshape_hidden_states", "out_features", "out_indices", "_out_*"),
                    "stage_names",
                ),
                written={"model_type": "dinov2", "use_mask_token": False},
            ),
            rows={
                **embedding_rows("", "cls_token"),
                **block_rows("encoder.layer.{L}.", _BLOCK),
                "blocks/attn_scale": Stored("encoder.layer.{L}.layer_scale1.lambda1", "D -> D"),
                "blocks/mlp_scale": Stored("encoder.layer.{L}.layer_scale2.lambda1", "D -> D"),
                **norm_rows("final_norm", "layernorm"),
            },
            varied=_swiglu_rows,
            # It stands for patches that are hidden in training.
            ignored=(r"embeddings\.mask_token",),
            refused={
                "classifier.weight": "a classifier of the first token and the mean of the "
                "patches, which is not supported"
            },
        )
    },
)
