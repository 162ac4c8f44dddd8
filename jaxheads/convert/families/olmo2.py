"""OLMo 2: Llama that normalises what branches write, and queries and keys over all heads."""

from __future__ import annotations

from jaxheads.convert.families.llama import (
    GGUF_BLOCK,
    HF_BLOCK,
    hf_schema,
    llama_like,
    varied_rows,
)
from jaxheads.convert.families.llama_cpp import gguf_schema

_CONSTANTS = {"norm_place": "branch", "qk_norm": "all"}

_ROWS = varied_rows(
    (
        "blocks/attn_norm/scale",
        HF_BLOCK + "post_attention_layernorm.weight",
        GGUF_BLOCK + "post_attention_norm.weight",
        "D -> D",
    ),
    (
        "blocks/mlp_norm/scale",
        HF_BLOCK + "post_feedforward_layernorm.weight",
        GGUF_BLOCK + "post_ffw_norm.weight",
        "D -> D",
    ),
    (
        "blocks/attn/q_norm/scale",
        HF_BLOCK + "self_attn.q_norm.weight",
        GGUF_BLOCK + "attn_q_norm.weight",
        "(H Dh) -> H Dh",
    ),
    (
        "blocks/attn/k_norm/scale",
        HF_BLOCK + "self_attn.k_norm.weight",
        GGUF_BLOCK + "attn_k_norm.weight",
        "(K Dh) -> K Dh",
    ),
)

OLMO2 = llama_like(
    hf_schema(
        "olmo2",
        ("Olmo2ForCausalLM", "Olmo2Model"),
        unused=("mlp_bias",),
        constants={**_CONSTANTS, "mlp_bias": False},
    ),
    # llama.cpp reads OLMo 3, which has windows, as this architecture too.
    gguf_schema("olmo2", "olmo2", constants=_CONSTANTS),
    _ROWS,
)
