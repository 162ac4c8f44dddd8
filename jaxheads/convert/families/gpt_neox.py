"""GPT-NeoX and Pythia: rotary positions on a part of each head, attention and MLP in parallel.

Hugging Face stores queries, keys and values head by head in one tensor, llama.cpp all
queries, then all keys, then all values.
"""

from __future__ import annotations

from typing import Any

from jaxheads.convert.families.llama_cpp import (
    gguf_layer_norm_block,
    gguf_schema,
    partial_rope_part,
)
from jaxheads.convert.families.rope import rope_part
from jaxheads.convert.families.rows import block_rows, norm_rows
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    head_part,
)
from jaxheads.convert.schema import Key, Part, Schema
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig

_B = "gpt_neox.layers.{L}."
_QKV = ("one", "one", "one")


def _rope_part() -> Part:
    common = rope_part(partial=0.25)

    def write(config: ModelConfig) -> dict[str, Any]:
        # transformers reads the base and the share of this family by these names only.
        keys = common.write(config)
        share = keys.pop("partial_rotary_factor")
        return {"rotary_emb_base": keys.pop("rope_theta"), "rotary_pct": share} | keys

    return Part(common.keys, common.read, write)


_SCHEMA = Schema(
    family_key="model_type",
    used=(
        Key("num_hidden_layers", ("n_layers",)),
        Key("num_attention_heads", ("n_heads",)),
        Key("hidden_size", ("d_model",)),
        Key("intermediate_size", ("d_mlp",)),
        Key("vocab_size", ("vocab_size",)),
        Key("max_position_embeddings", ("context_length",)),
        Key("layer_norm_eps", ("norm_eps",), default=absent_means(1e-5)),
        activation_key("hidden_act", "gelu"),
        Key("attention_bias", ("qkv_bias", "o_bias"), default=absent_means(True)),
        Key("use_parallel_residual", ("parallel",), default=absent_means(True)),
        Key("tie_word_embeddings", ("tied",), default=absent_means(False)),
    ),
    parts=(
        even_heads_part(),
        _rope_part(),
        head_part("GPTNeoXForCausalLM", "GPTNeoXModel"),
    ),
    constants={
        "family": "gpt_neox",
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "mlp_bias": True,
    },
    fixed={**HF_FIXED, "is_encoder_decoder": (False,)},
    ignored=(*HF_IGNORED, "is_decoder"),
    written={"model_type": "gpt_neox"},
)

# llama.cpp keeps no name of the activation, and computes the approximate GELU for all of them.
_GGUF_SCHEMA = gguf_schema(
    "gptneox",
    "gpt_neox",
    parts=(partial_rope_part("gptneox"),),
    used=(Key("use_parallel_residual", ("parallel",), default=absent_means(True)),),
    constants={"norm": "layer", "norm_bias": True, "gated": False, "activation": "gelu"},
)

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn/o": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
}

GPT_NEOX = Family(
    name="gpt_neox",
    formats={
        "huggingface": Format(
            schema=_SCHEMA,
            rows={
                "embed/tokens": Stored("gpt_neox.embed_in.weight", "V D -> V D"),
                **block_rows(_B, _BLOCK),
                **{
                    f"blocks/attn/{name}": Stored(
                        _B + "attention.query_key_value.weight",
                        "(H J Dh) D -> J D H Dh",
                        _QKV,
                        part,
                    )
                    for part, name in enumerate("qkv")
                },
                **{
                    f"blocks/attn/{name}_bias": Stored(
                        _B + "attention.query_key_value.bias", "(H J Dh) -> J H Dh", _QKV, part
                    )
                    for part, name in enumerate("qkv")
                },
                **norm_rows("final_norm", "gpt_neox.final_layer_norm"),
                "unembed/kernel": Stored("embed_out.weight", "V D -> V D"),
            },
            ignored=(
                r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
            ),
            copies={"embed_out.weight": "embed/tokens"},
            spellings=(("gpt_neox.", ""),),
        ),
        "gguf": Format(
            schema=_GGUF_SCHEMA,
            names=("gptneox",),
            rows={
                "embed/tokens": Stored("token_embd.weight", "V D -> V D"),
                **gguf_layer_norm_block(),
                **norm_rows("final_norm", "output_norm"),
                "unembed/kernel": Stored("output.weight", "V D -> V D"),
            },
        ),
    },
)
