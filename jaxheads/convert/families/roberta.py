"""RoBERTa (Liu et al. 2019): BERT whose positions begin after the row of the padding token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.bert import (
    BERT_CONSTANTS,
    BERT_FIXED,
    BERT_KEYS,
    BERT_REFUSED,
    OLD_NORMS,
    body_rows,
)
from jaxheads.convert.families.encoder import class_part
from jaxheads.convert.families.rows import dense_rows, norm_rows
from jaxheads.convert.families.shared import HF_IGNORED, even_heads_part, has
from jaxheads.convert.schema import Key, Part, Schema, Source
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig


def _head(source: Source) -> str:
    return "mlm" if "lm_head.dense.weight" in source.shapes else "none"


def _read_positions(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    pad, rows = raw.get("pad_token_id", 1), fields["n_positions"]
    if not isinstance(pad, int) or not 0 <= pad < rows - 1:
        raise ValueError(f"pad_token_id must lie in 0..{rows - 2}, got {pad!r}")
    # The head's activation is not a setting: it is gelu whatever the blocks use.
    if fields["head"] == "mlm" and fields["activation"] != "gelu":
        raise ValueError(f"hidden_act must be 'gelu' with this head, got {fields['activation']!r}")
    return {"position_offset": pad + 1, "context_length": rows - pad - 1}


def _write_positions(config: ModelConfig) -> dict[str, Any]:
    return {"pad_token_id": config.position_offset - 1}


ROBERTA = Family(
    name="roberta",
    formats={
        "huggingface": Format(
            schema=Schema(
                family_key="model_type",
                used=(*BERT_KEYS, Key("max_position_embeddings", ("n_positions",))),
                parts=(
                    even_heads_part(),
                    Part(("pad_token_id",), _read_positions, _write_positions),
                    class_part({"mlm": "RobertaForMaskedLM", "none": "RobertaModel"}),
                ),
                constants={**BERT_CONSTANTS, "family": "roberta"},
                inferred={"head": _head, "pooler": has("pooler.dense.weight")},
                fixed=BERT_FIXED,
                ignored=(*(k for k in HF_IGNORED if k != "pad_token_id"), "output_past"),
                written={"model_type": "roberta"},
            ),
            rows={
                **body_rows("roberta."),
                **dense_rows("head/dense", "head/dense_bias", "lm_head.dense"),
                **norm_rows("head/norm", "lm_head.layer_norm"),
                "unembed/bias": Stored("lm_head.bias", "V -> V"),
            },
            ignored=(r"(roberta\.)?embeddings\.(position|token_type)_ids",),
            refused={**BERT_REFUSED, "classifier.dense.weight": BERT_REFUSED["classifier.weight"]},
            copies={
                "lm_head.decoder.weight": "embed/tokens",
                "lm_head.decoder.bias": "unembed/bias",
            },
            spellings=(("roberta.", ""), *OLD_NORMS),
        )
    },
)
