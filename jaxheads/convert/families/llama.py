"""The Llama family: RMS norms, rotary positions, grouped queries, a gated MLP.

Hugging Face `LlamaForCausalLM` stores [out, in] matrices with all heads on one
axis. llama.cpp's GGUF stores the same, except that the rows of q and k are permuted
for interleaved rotary pairs: row (head, pair, two) instead of (head, two, pair).
Loading those rows as they lie gives a model that runs and is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxheads.convert.families.llama_cpp import gguf_schema
from jaxheads.convert.families.rope import WHOLE_HEADS_ROTATE, rope_part
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    head_part,
    same_as,
    width_per_head,
)
from jaxheads.convert.schema import Key, Part, Schema
from jaxheads.convert.table import Family, Format, Stored

HF_BLOCK = "model.layers.{L}."
GGUF_BLOCK = "blk.{L}."

Row = tuple[str, str, str, str]

ROWS: tuple[Row, ...] = (
    # parameter, Hugging Face tensor, GGUF tensor, stored axes -> ours
    ("embed/tokens", "model.embed_tokens.weight", "token_embd.weight", "V D -> V D"),
    (
        "blocks/attn_norm/scale",
        HF_BLOCK + "input_layernorm.weight",
        GGUF_BLOCK + "attn_norm.weight",
        "D -> D",
    ),
    (
        "blocks/attn/q",
        HF_BLOCK + "self_attn.q_proj.weight",
        GGUF_BLOCK + "attn_q.weight",
        "(H Dh) D -> D H Dh",
    ),
    (
        "blocks/attn/k",
        HF_BLOCK + "self_attn.k_proj.weight",
        GGUF_BLOCK + "attn_k.weight",
        "(K Dh) D -> D K Dh",
    ),
    (
        "blocks/attn/v",
        HF_BLOCK + "self_attn.v_proj.weight",
        GGUF_BLOCK + "attn_v.weight",
        "(K Dh) D -> D K Dh",
    ),
    (
        "blocks/attn/o",
        HF_BLOCK + "self_attn.o_proj.weight",
        GGUF_BLOCK + "attn_output.weight",
        "D (H Dh) -> H Dh D",
    ),
    (
        "blocks/attn/q_bias",
        HF_BLOCK + "self_attn.q_proj.bias",
        GGUF_BLOCK + "attn_q.bias",
        "(H Dh) -> H Dh",
    ),
    (
        "blocks/attn/k_bias",
        HF_BLOCK + "self_attn.k_proj.bias",
        GGUF_BLOCK + "attn_k.bias",
        "(K Dh) -> K Dh",
    ),
    (
        "blocks/attn/v_bias",
        HF_BLOCK + "self_attn.v_proj.bias",
        GGUF_BLOCK + "attn_v.bias",
        "(K Dh) -> K Dh",
    ),
    (
        "blocks/attn/o_bias",
        HF_BLOCK + "self_attn.o_proj.bias",
        GGUF_BLOCK + "attn_output.bias",
        "D -> D",
    ),
    (
        "blocks/mlp_norm/scale",
        HF_BLOCK + "post_attention_layernorm.weight",
        GGUF_BLOCK + "ffn_norm.weight",
        "D -> D",
    ),
    (
        "blocks/mlp/gate",
        HF_BLOCK + "mlp.gate_proj.weight",
        GGUF_BLOCK + "ffn_gate.weight",
        "F D -> D F",
    ),
    ("blocks/mlp/up", HF_BLOCK + "mlp.up_proj.weight", GGUF_BLOCK + "ffn_up.weight", "F D -> D F"),
    (
        "blocks/mlp/down",
        HF_BLOCK + "mlp.down_proj.weight",
        GGUF_BLOCK + "ffn_down.weight",
        "D F -> F D",
    ),
    (
        "blocks/mlp/gate_bias",
        HF_BLOCK + "mlp.gate_proj.bias",
        GGUF_BLOCK + "ffn_gate.bias",
        "F -> F",
    ),
    ("blocks/mlp/up_bias", HF_BLOCK + "mlp.up_proj.bias", GGUF_BLOCK + "ffn_up.bias", "F -> F"),
    (
        "blocks/mlp/down_bias",
        HF_BLOCK + "mlp.down_proj.bias",
        GGUF_BLOCK + "ffn_down.bias",
        "D -> D",
    ),
    ("final_norm/scale", "model.norm.weight", "output_norm.weight", "D -> D"),
    ("unembed/kernel", "lm_head.weight", "output.weight", "V D -> V D"),
)

_INTERLEAVED = {
    "blocks/attn/q": "(H half two) D -> D H (two half)",
    "blocks/attn/k": "(K half two) D -> D K (two half)",
    "blocks/attn/q_bias": "(H half two) -> H (two half)",
    "blocks/attn/k_bias": "(K half two) -> K (two half)",
}
"""GGUF's own axes, where it permutes rows for interleaved rotary pairs."""

_USED = (
    Key("num_hidden_layers", ("n_layers",)),
    Key("num_attention_heads", ("n_heads",)),
    Key("num_key_value_heads", ("n_kv_heads",), default=same_as("num_attention_heads")),
    Key("head_dim", ("head_dim",), default=width_per_head("hidden_size", "num_attention_heads")),
    Key("hidden_size", ("d_model",)),
    Key("intermediate_size", ("d_mlp",)),
    Key("vocab_size", ("vocab_size",)),
    Key("max_position_embeddings", ("context_length",)),
    Key("rms_norm_eps", ("norm_eps",)),
    activation_key("hidden_act", "silu"),
    Key("attention_bias", ("qkv_bias", "o_bias"), default=absent_means(False)),
    Key("mlp_bias", ("mlp_bias",), default=absent_means(False)),
    Key("tie_word_embeddings", ("tied",), default=absent_means(False)),
)


def hf_schema(
    model_type: str,
    classes: tuple[str, str],
    *,
    parts: tuple[Part, ...] = (rope_part(),),
    used: tuple[Key, ...] = (),
    unused: tuple[str, ...] = (),
    constants: Mapping[str, Any] | None = None,
    fixed: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: tuple[str, ...] = (),
) -> Schema:
    """Llama's policy for Hugging Face configs, with what a family of its kind has different.

    Args:
      model_type: the family.
      classes: the names of its classes with and without a language-modelling head.
      parts: its groups of keys.
      used: keys that it has instead of Llama's of the same name, or besides.
      unused: names of Llama's keys that it does not know.
      constants: fields that are the same in the whole family.
      fixed: keys with the only values that are supported, besides those of every family.
      ignored: keys that do not change the computation, besides those of every family.
    """
    keys = {key.name: key for key in (*_USED, *used) if key.name not in unused}
    return Schema(
        family_key="model_type",
        used=tuple(keys.values()),
        parts=(*parts, head_part(*classes)),
        constants={"family": model_type, **(constants or {})},
        fixed={
            **HF_FIXED,
            **WHOLE_HEADS_ROTATE,
            "is_encoder_decoder": (False,),
            **(fixed or {}),
        },
        ignored=(*HF_IGNORED, "is_decoder", *ignored),
        written={"model_type": model_type},
    )


def varied_rows(*rows: Row) -> tuple[Row, ...]:
    """Llama's rows, some replaced by, or with more, of `rows`."""
    return tuple({row[0]: row for row in (*ROWS, *rows)}.values())


def llama_like(
    schema: Schema,
    gguf: Schema | None,
    rows: Sequence[Row] = ROWS,
    *,
    architecture: str = "",
    interleaved: bool = False,
    norm_shift: float = 0.0,
) -> Family:
    """A family of Llama's kind.

    Args:
      schema: its policy for Hugging Face configs.
      gguf: for GGUF; None where llama.cpp has no architecture of its own for it.
      rows: where its parameters are.
      architecture: llama.cpp's name of it, where that is not the family's name.
      interleaved: whether GGUF permutes the rows of q and k.
      norm_shift: what GGUF adds to the scales of norms.
    """
    formats = {
        "huggingface": Format(
            schema=schema,
            rows={path: Stored(name, pattern) for path, name, _, pattern in rows},
            ignored=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
            copies={"lm_head.weight": "embed/tokens"},
            spellings=(("model.", ""),),
        )
    }
    if gguf is not None:
        own = _INTERLEAVED if interleaved else {}
        formats["gguf"] = Format(
            schema=gguf,
            rows={
                path: Stored(
                    name,
                    own.get(path, pattern),
                    shift=norm_shift if path.endswith("norm/scale") else 0.0,
                )
                for path, _, name, pattern in rows
            },
            names=(architecture,) if architecture else (),
            ignored=(r"rope_freqs\.weight",),
            copies={"output.weight": "embed/tokens"},
        )
    return Family(schema.constants["family"], formats)


LLAMA = llama_like(
    hf_schema(
        "llama",
        ("LlamaForCausalLM", "LlamaModel"),
        fixed={
            "rope_interleaved": (False,),
            "pretraining_tp": (1,),
            "sliding_window": (None,),
        },
        ignored=("is_llama_config",),
    ),
    gguf_schema(
        "llama",
        "llama",
        fixed={"rope.scale_linear": (1.0,), "use_parallel_residual": (False,)},
    ),
    interleaved=True,
)
