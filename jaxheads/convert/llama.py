"""The Llama family: RMS norms, rotary positions, grouped queries, a gated MLP.

Hugging Face `LlamaForCausalLM` stores [out, in] matrices with all heads on one
axis. llama.cpp's GGUF stores the same, except that the rows of q and k are permuted
for interleaved rotary pairs: row (head, pair, two) instead of (head, two, pair).
Loading those rows as they lie gives a model that runs and is wrong.
"""

from __future__ import annotations

from typing import Any

from jaxheads.convert.schema import Key, Schema, Source
from jaxheads.convert.table import Family, Format, Stored

_HF = "model.layers.{L}."
_GGUF = "blk.{L}."

_ROWS: tuple[tuple[str, str, str, str], ...] = (
    # parameter, Hugging Face tensor, GGUF tensor, stored axes -> ours
    ("embed/tokens", "model.embed_tokens.weight", "token_embd.weight", "V D -> V D"),
    (
        "blocks/attn_norm/scale",
        _HF + "input_layernorm.weight",
        _GGUF + "attn_norm.weight",
        "D -> D",
    ),
    (
        "blocks/attn/q",
        _HF + "self_attn.q_proj.weight",
        _GGUF + "attn_q.weight",
        "(H Dh) D -> D H Dh",
    ),
    (
        "blocks/attn/k",
        _HF + "self_attn.k_proj.weight",
        _GGUF + "attn_k.weight",
        "(K Dh) D -> D K Dh",
    ),
    (
        "blocks/attn/v",
        _HF + "self_attn.v_proj.weight",
        _GGUF + "attn_v.weight",
        "(K Dh) D -> D K Dh",
    ),
    (
        "blocks/attn/o",
        _HF + "self_attn.o_proj.weight",
        _GGUF + "attn_output.weight",
        "D (H Dh) -> H Dh D",
    ),
    ("blocks/attn/q_bias", _HF + "self_attn.q_proj.bias", _GGUF + "attn_q.bias", "(H Dh) -> H Dh"),
    ("blocks/attn/k_bias", _HF + "self_attn.k_proj.bias", _GGUF + "attn_k.bias", "(K Dh) -> K Dh"),
    ("blocks/attn/v_bias", _HF + "self_attn.v_proj.bias", _GGUF + "attn_v.bias", "(K Dh) -> K Dh"),
    ("blocks/attn/o_bias", _HF + "self_attn.o_proj.bias", _GGUF + "attn_output.bias", "D -> D"),
    (
        "blocks/mlp_norm/scale",
        _HF + "post_attention_layernorm.weight",
        _GGUF + "ffn_norm.weight",
        "D -> D",
    ),
    ("blocks/mlp/gate", _HF + "mlp.gate_proj.weight", _GGUF + "ffn_gate.weight", "F D -> D F"),
    ("blocks/mlp/up", _HF + "mlp.up_proj.weight", _GGUF + "ffn_up.weight", "F D -> D F"),
    ("blocks/mlp/down", _HF + "mlp.down_proj.weight", _GGUF + "ffn_down.weight", "D F -> F D"),
    ("blocks/mlp/gate_bias", _HF + "mlp.gate_proj.bias", _GGUF + "ffn_gate.bias", "F -> F"),
    ("blocks/mlp/up_bias", _HF + "mlp.up_proj.bias", _GGUF + "ffn_up.bias", "F -> F"),
    ("blocks/mlp/down_bias", _HF + "mlp.down_proj.bias", _GGUF + "ffn_down.bias", "D -> D"),
    ("final_norm/scale", "model.norm.weight", "output_norm.weight", "D -> D"),
    ("unembed/kernel", "lm_head.weight", "output.weight", "V D -> V D"),
)

_INTERLEAVED = {
    "blocks/attn/q": "(H half two) D -> D H (two half)",
    "blocks/attn/k": "(K half two) D -> D K (two half)",
    "blocks/attn/q_bias": "(H half two) -> H (two half)",
    "blocks/attn/k_bias": "(K half two) -> K (two half)",
}
"""GGUF's own axes, where they differ from Hugging Face's."""


def _absent_means(value: Any) -> Any:
    return lambda source: value


def _same_as(key: str) -> Any:
    return lambda source: source.config[key]


def _width_per_head(width: str, heads: str) -> Any:
    return lambda source: source.config[width] // source.config[heads]


def _has(tensor: str) -> Any:
    return lambda source: tensor in source.shapes


def _vocabulary(source: Source) -> int:
    return source.shapes["token_embd.weight"][0]


_HF_SCHEMA = Schema(
    family_key="model_type",
    used=(
        Key("num_hidden_layers", ("n_layers",)),
        Key("num_attention_heads", ("n_heads",)),
        Key("num_key_value_heads", ("n_kv_heads",), default=_same_as("num_attention_heads")),
        Key(
            "head_dim",
            ("head_dim",),
            default=_width_per_head("hidden_size", "num_attention_heads"),
        ),
        Key("hidden_size", ("d_model",)),
        Key("intermediate_size", ("d_mlp",)),
        Key("vocab_size", ("vocab_size",)),
        Key("max_position_embeddings", ("context_length",)),
        # Flat, the older spelling, is the one that every transformers version reads.
        Key(
            "rope_theta",
            ("rope_base",),
            spellings=("rope_parameters.rope_theta", "rope_scaling.rope_theta"),
            default=_absent_means(10_000.0),
        ),
        Key("rms_norm_eps", ("norm_eps",)),
        Key(
            "hidden_act",
            ("activation",),
            default=_absent_means("silu"),
            values={
                "swish": "silu",
                "silu": "silu",
                "gelu": "gelu",
                "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh",
                "relu": "relu",
            },
        ),
        Key("attention_bias", ("qkv_bias", "o_bias"), default=_absent_means(False)),
        Key("mlp_bias", ("mlp_bias",), default=_absent_means(False)),
        Key("tie_word_embeddings", ("tied",), default=_absent_means(False)),
    ),
    fixed={
        "rope_scaling": (None,),
        "rope_scaling.rope_type": ("default",),
        "rope_scaling.type": ("default",),
        "rope_parameters.rope_type": ("default",),
        "rope_parameters.partial_rotary_factor": (1.0,),
        "partial_rotary_factor": (1.0,),
        "rope_interleaved": (False,),
        "rope_parameters": (None,),
        "pretraining_tp": (1,),
        "sliding_window": (None,),
        "quantization_config": (None,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "cross_attention_hidden_size": (None,),
        "pruned_heads": ({},),
    },
    ignored=(
        *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype"),
        *("use_cache", "initializer_range", "attention_dropout", "hidden_dropout"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
        *("decoder_start_token_id", "tokenizer_class", "is_llama_config", "transformers.js_config"),
        *("_attn_implementation*", "attn_implementation", "_flash_attn_2_enabled"),
        *("return_dict", "output_hidden_states", "output_attentions", "torchscript"),
        *("use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "tie_encoder_decoder"),
        *("is_decoder", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
        *("task_specific_params", "prefix", "unsloth_fixed", "unsloth_version"),
        # Settings of generation, which older versions wrote next to the model's.
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
        *("num_beam_groups", "diversity_penalty", "top_k", "top_p", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
        *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        "begin_suppress_tokens",
    ),
    written={"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
)

_GGUF_SCHEMA = Schema(
    family_key="general.architecture",
    used=(
        Key("llama.block_count", ("n_layers",)),
        Key("llama.attention.head_count", ("n_heads",)),
        Key(
            "llama.attention.head_count_kv",
            ("n_kv_heads",),
            default=_same_as("llama.attention.head_count"),
        ),
        Key(
            "llama.attention.key_length",
            ("head_dim",),
            spellings=("llama.attention.value_length",),
            default=_width_per_head("llama.embedding_length", "llama.attention.head_count"),
        ),
        Key("llama.embedding_length", ("d_model",)),
        Key("llama.feed_forward_length", ("d_mlp",)),
        Key("llama.vocab_size", ("vocab_size",), default=_vocabulary),
        Key("llama.context_length", ("context_length",)),
        Key("llama.rope.freq_base", ("rope_base",), default=_absent_means(10_000.0)),
        Key("llama.attention.layer_norm_rms_epsilon", ("norm_eps",)),
    ),
    inferred={
        "activation": _absent_means("silu"),
        "qkv_bias": _has("blk.0.attn_q.bias"),
        "o_bias": _has("blk.0.attn_output.bias"),
        "mlp_bias": _has("blk.0.ffn_down.bias"),
        "tied": lambda source: "output.weight" not in source.shapes,
    },
    fixed={
        "llama.rope.scaling.type": ("none",),
        "llama.rope.scaling.factor": (1.0,),
        "llama.rope.scale_linear": (1.0,),
        "llama.rope.scaling.attn_factor": (1.0,),
        "llama.expert_count": (0,),
        "llama.expert_used_count": (0,),
        "llama.use_parallel_residual": (False,),
        "llama.attention.sliding_window": (0,),
        "split.count": (0, 1),
    },
    equal={"llama.rope.dimension_count": "head_dim"},
    ignored=(
        *("GGUF.*", "general.*", "tokenizer.*", "quantize.*"),
        *("llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned"),
        *("split.no", "split.tensors.count"),
    ),
)

LLAMA = Family(
    name="llama",
    formats={
        "huggingface": Format(
            schema=_HF_SCHEMA,
            rows={path: Stored(name, pattern) for path, name, _, pattern in _ROWS},
            ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
            copies={"unembed/kernel": "embed/tokens"},
        ),
        "gguf": Format(
            schema=_GGUF_SCHEMA,
            rows={
                path: Stored(name, _INTERLEAVED.get(path, pattern))
                for path, _, name, pattern in _ROWS
            },
            refused={
                "rope_freqs.weight": "it rescales the rotary frequencies, which is not supported"
            },
        ),
    },
)
