"""Qwen 3: Llama with normalised queries and keys, a head size of its own, and Qwen 2's windows."""

from __future__ import annotations

from jaxheads.convert.families.llama import (
    GGUF_BLOCK,
    HF_BLOCK,
    Row,
    hf_schema,
    llama_like,
    varied_rows,
)
from jaxheads.convert.families.llama_cpp import gguf_schema
from jaxheads.convert.families.qwen2 import QWEN_WINDOWS
from jaxheads.convert.families.rope import rope_part
from jaxheads.convert.families.shared import absent_means
from jaxheads.convert.schema import Key

QK_NORM_ROWS: tuple[Row, ...] = tuple(
    (
        f"blocks/attn/{name}_norm/scale",
        f"{HF_BLOCK}self_attn.{name}_norm.weight",
        f"{GGUF_BLOCK}attn_{name}_norm.weight",
        "Dh -> Dh",
    )
    for name in "qk"
)
"""Norms of each query and key head."""

QWEN3 = llama_like(
    hf_schema(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        parts=(rope_part(), QWEN_WINDOWS),
        used=(Key("head_dim", ("head_dim",), default=absent_means(128)),),
        unused=("mlp_bias",),
        constants={"qk_norm": "head", "mlp_bias": False},
    ),
    gguf_schema("qwen3", "qwen3", constants={"qk_norm": "head"}),
    varied_rows(*QK_NORM_ROWS),
)
