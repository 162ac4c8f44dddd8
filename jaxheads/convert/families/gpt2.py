"""GPT-2: learned positions, layer norms with biases, queries, keys and values in one tensor.

Hugging Face stores its matrices as [in, out] (`Conv1D`), llama.cpp as [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.llama_cpp import gguf_layer_norm_block, gguf_schema
from jaxheads.convert.families.rows import norm_rows
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    head_part,
    learned_positions_part,
)
from jaxheads.convert.schema import Key, Part, Schema, Source
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig

_B = "transformer.h.{L}."
_QKV = ("H", "H", "H")


def _scale(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"attn_scale": None if raw.get("scale_attn_weights", True) else 1.0}


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    if config.attn_scale not in (None, 1.0):
        raise ValueError(f"config.attn_scale {config.attn_scale} has no name in this format")
    return {"scale_attn_weights": config.attn_scale is None}


def _four_times_wider(source: Source) -> int:
    return 4 * source.config["n_embd"]


_SCHEMA = Schema(
    family_key="model_type",
    used=(
        Key("n_layer", ("n_layers",)),
        Key("n_head", ("n_heads",)),
        Key("n_embd", ("d_model",)),
        Key("n_inner", ("d_mlp",), default=_four_times_wider),
        Key("vocab_size", ("vocab_size",)),
        Key("n_positions", ("context_length",)),
        Key("layer_norm_epsilon", ("norm_eps",), default=absent_means(1e-5)),
        activation_key("activation_function", "gelu_new"),
        Key("tie_word_embeddings", ("tied",), default=absent_means(True)),
    ),
    parts=(
        head_part("GPT2LMHeadModel", "GPT2Model"),
        even_heads_part(),
        learned_positions_part(),
        Part(("scale_attn_weights",), _scale, _write_scale),
    ),
    constants={
        "family": "gpt2",
        "ropes": (None,),
        "norm": "layer",
        "norm_bias": True,
        "qkv_bias": True,
        "o_bias": True,
        "gated": False,
        "mlp_bias": True,
    },
    fixed={
        **HF_FIXED,
        "scale_attn_by_inverse_layer_idx": (False,),
        "is_encoder_decoder": (False,),
    },
    equal={"n_ctx": "context_length"},
    # The order of operations of mixed precision, and heads that summarise a sequence.
    ignored=(*HF_IGNORED, "is_decoder", "reorder_and_upcast_attn", "summary_*", "_num_labels"),
    written={"model_type": "gpt2"},
)

_GGUF_SCHEMA = gguf_schema(
    "gpt2",
    "gpt2",
    parts=(learned_positions_part(),),
    constants={
        "ropes": (None,),
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "activation": "gelu_tanh",
    },
)

GPT2 = Family(
    name="gpt2",
    formats={
        "huggingface": Format(
            schema=_SCHEMA,
            rows={
                "embed/tokens": Stored("transformer.wte.weight", "V D -> V D"),
                "embed/positions": Stored("transformer.wpe.weight", "P D -> P D"),
                **norm_rows("blocks/attn_norm", _B + "ln_1"),
                **{
                    f"blocks/attn/{name}": Stored(
                        _B + "attn.c_attn.weight", "D (J Dh) -> D J Dh", _QKV, part
                    )
                    for part, name in enumerate("qkv")
                },
                **{
                    f"blocks/attn/{name}_bias": Stored(
                        _B + "attn.c_attn.bias", "(J Dh) -> J Dh", _QKV, part
                    )
                    for part, name in enumerate("qkv")
                },
                "blocks/attn/o": Stored(_B + "attn.c_proj.weight", "(H Dh) D -> H Dh D"),
                "blocks/attn/o_bias": Stored(_B + "attn.c_proj.bias", "D -> D"),
                **norm_rows("blocks/mlp_norm", _B + "ln_2"),
                "blocks/mlp/up": Stored(_B + "mlp.c_fc.weight", "D F -> D F"),
                "blocks/mlp/up_bias": Stored(_B + "mlp.c_fc.bias", "F -> F"),
                "blocks/mlp/down": Stored(_B + "mlp.c_proj.weight", "F D -> F D"),
                "blocks/mlp/down_bias": Stored(_B + "mlp.c_proj.bias", "D -> D"),
                **norm_rows("final_norm", "transformer.ln_f"),
                "unembed/kernel": Stored("lm_head.weight", "V D -> V D"),
            },
            ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
            copies={"lm_head.weight": "embed/tokens"},
            spellings=(("transformer.", ""),),
        ),
        "gguf": Format(
            schema=_GGUF_SCHEMA,
            rows={
                "embed/tokens": Stored("token_embd.weight", "V D -> V D"),
                "embed/positions": Stored("position_embd.weight", "P D -> P D"),
                **gguf_layer_norm_block(),
                **norm_rows("final_norm", "output_norm"),
                "unembed/kernel": Stored("output.weight", "V D -> V D"),
            },
        ),
    },
)
