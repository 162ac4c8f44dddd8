"""StableLM: Llama with layer norms, and rotary positions on a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.llama import HF_BLOCK, llama_like, varied_rows
from jaxheads.convert.families.rope import rope_part
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    head_part,
    same_as,
)
from jaxheads.convert.schema import Key, Part, Schema

_NORMS = {
    "blocks/attn_norm": HF_BLOCK + "input_layernorm",
    "blocks/mlp_norm": HF_BLOCK + "post_attention_layernorm",
    "final_norm": "model.norm",
}


def _head_part() -> Part:
    """The size of a head, which follows from the width."""

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        width, heads = fields["d_model"], fields["n_heads"]
        if heads < 1 or width % heads:
            raise ValueError(f"hidden_size {width} is not split evenly by {heads} heads")
        return {"head_dim": width // heads}

    return Part((), read, lambda config: {})


STABLELM = llama_like(
    Schema(
        family_key="model_type",
        used=(
            Key("num_hidden_layers", ("n_layers",)),
            Key("num_attention_heads", ("n_heads",)),
            Key("num_key_value_heads", ("n_kv_heads",), default=same_as("num_attention_heads")),
            Key("hidden_size", ("d_model",)),
            Key("intermediate_size", ("d_mlp",)),
            Key("vocab_size", ("vocab_size",)),
            Key("max_position_embeddings", ("context_length",)),
            Key("layer_norm_eps", ("norm_eps",), default=absent_means(1e-5)),
            activation_key("hidden_act", "silu"),
            Key("use_qkv_bias", ("qkv_bias",), default=absent_means(False)),
            Key("tie_word_embeddings", ("tied",), default=absent_means(False)),
        ),
        parts=(
            _head_part(),
            rope_part(partial=0.25),
            head_part("StableLmForCausalLM", "StableLmModel"),
        ),
        constants={"family": "stablelm", "norm": "layer", "norm_bias": True},
        fixed={
            **HF_FIXED,
            # Its norms of queries and keys have a scale for each head; in parallel, its branches
            # share one norm.
            "qk_layernorm": (False,),
            "use_parallel_residual": (False,),
            "is_encoder_decoder": (False,),
        },
        ignored=(*HF_IGNORED, "is_decoder"),
        written={"model_type": "stablelm"},
    ),
    gguf=None,
    rows=varied_rows(
        *((f"{path}/bias", f"{name}.bias", "", "D -> D") for path, name in _NORMS.items())
    ),
)
