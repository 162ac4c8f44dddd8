"""What each key of the families' config.json does, case by case; see test_family_configs.py."""

from __future__ import annotations

from typing import Any

from jaxheads.model.rotary import Linear, LongRope, Rope

# Another value for each key that sets fields of the config.
OTHER_VALUES: dict[str, dict[str, Any]] = {}

# Keys with a value that is refused, and what the message says beside the name of the file.
REFUSED: list[tuple[str, dict[str, Any], str]] = []

# Keys of other versions of transformers that describe the same model.
SAME: list[tuple[str, dict[str, Any]]] = []

# Fields that no case has, which an export must be able to write.
WRITTEN: list[tuple[str, dict[str, Any]]] = []

# Keys that others of the same file overrule, in transformers too.
OVERRULED: dict[str, tuple[str, ...]] = {}

# Keys that say for how long a text the model is good, which changes no value.
LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")

# --- gpt2, gpt_neo, gpt_neox, opt, phi3 ---

OTHER_VALUES |= {
    "gpt2": {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 20,
        "n_inner": 48,
        "vocab_size": 96,
        "n_positions": 511,
        "layer_norm_epsilon": 0.02,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "scale_attn_weights": False,
        "architectures": ["GPT2Model"],
    },
    "gpt_neo": {
        "num_layers": 3,
        "num_heads": 3,
        "hidden_size": 18,
        "intermediate_size": 48,
        "vocab_size": 96,
        "max_position_embeddings": 639,
        "layer_norm_epsilon": 0.02,
        "activation_function": "relu",
        "tie_word_embeddings": False,
        "attention_types": [[["local", "global"], 2]],
        "attention_layers": ["global"] * 4,
        "window_size": 63,
        "architectures": ["GPTNeoModel"],
    },
    "gpt_neox": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "vocab_size": 96,
        "max_position_embeddings": 639,
        "layer_norm_eps": 0.02,
        "hidden_act": "gelu_new",
        "attention_bias": False,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "rope_parameters.rope_type": "linear",
        "rope_parameters.rope_theta": 5100.0,
        "rope_parameters.partial_rotary_factor": 0.5,
        "architectures": ["GPTNeoXModel"],
    },
    "opt": {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_size": 18,
        "ffn_dim": 48,
        "vocab_size": 96,
        "max_position_embeddings": 639,
        "activation_function": "gelu",
        "enable_bias": False,
        "tie_word_embeddings": False,
        "do_layer_norm_before": False,
        "_remove_final_layer_norm": True,
        "architectures": ["OPTModel"],
    },
    "phi3": {
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 4,
        "hidden_size": 24,
        "intermediate_size": 48,
        "vocab_size": 96,
        "max_position_embeddings": 639,
        "original_max_position_embeddings": 4095,
        "rms_norm_eps": 0.02,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "sliding_window": 63,
        "rope_parameters.rope_type": "longrope",
        "rope_parameters.rope_theta": 11_000.0,
        "rope_parameters.partial_rotary_factor": 0.5,
        "architectures": ["Phi3Model"],
    },
}

_FACTORS = [1.5, 2.4, 3.3]
REFUSED += [
    ("gpt2", {"n_head": 7}, "a width of 40 is not split evenly by 7 heads"),
    ("gpt2", {"n_ctx": 100}, r"n_ctx is 100, expected 512"),
    ("gpt2", {"activation_function": "mish"}, 'activation_function = "mish" is not supported'),
    ("gpt2", {"n_embed": 40}, "unknown key n_embed = 40"),
    ("gpt_neo", {"window_size": 0}, "window_size must be a positive integer, got 0"),
    ("gpt_neo", {"attention_types": [[["local"], 4]]}, "disagrees with attention_layers"),
    (
        "gpt_neo",
        {"attention_types": [[["global"], 3]], "attention_layers": None},
        "attention_types must name 4 layers, each global or local",
    ),
    (
        "gpt_neo",
        {"attention_types": None, "attention_layers": ["global", "sparse"] * 2},
        "attention_types must name 4 layers, each global or local",
    ),
    ("gpt_neox", {"rope_parameters.rope_type": "dynamic"}, "rope_type 'dynamic'"),
    ("gpt_neox", {"rope_parameters.partial_rotary_factor": 2.0}, "rotary_dim .* got 32"),
    ("gpt_neox", {"rotary_pct": 0.5}, "rotary_pct = 0.5 disagrees with rope_parameters"),
    ("opt", {"word_embed_proj_dim": 18}, "word_embed_proj_dim is 18, expected 36"),
    ("phi3", {"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
    (
        "phi3",
        {"rope_parameters.rope_type": "linear", "rope_parameters.factor": 2.0},
        "rope_type 'linear' is not supported",
    ),
    (
        "phi3_partial",
        {"rope_parameters.short_factor": _FACTORS[:2]},
        "longrope needs 3 short and long factors, got 2 and 3",
    ),
]

SAME += [
    ("gpt2", {"n_ctx": 512}),
    ("gpt_neo", {"attention_layers": None}),
    ("gpt_neo", {"attention_types": None}),
    (
        "gpt_neox",
        {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 5000},
    ),
    ("phi3", {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10_000.0}),
    (
        "phi3_partial",
        {
            "rope_parameters": None,
            "rope_theta": 10_000,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "su",
                "long_factor": _FACTORS,
                "short_factor": [1.0, 1.05, 1.1],
            },
        },
    ),
]

WRITTEN += [
    ("gpt2", {"attn_scale": 1.0, "tied": False}),
    ("gpt2", {"head": "none"}),
    ("gpt_neo", {"windows": ()}),
    ("gpt_neox", {"rotary_dim": None, "ropes": (Rope(7e3, Linear(2.0)),)}),
    ("gpt_neox", {"head": "none"}),
    ("opt", {"norm_place": "post", "final_norm": False}),
    ("opt", {"final_norm": False, "qkv_bias": False, "o_bias": False, "mlp_bias": False}),
    ("phi3", {"windows": ()}),
    ("phi3_partial", {"ropes": (Rope(7e3, LongRope((1.0,) * 3, (2.0,) * 3, 128, 1.25)),)}),
]

# --- llama and the families that vary it ---

_LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 3,
    "hidden_size": 24,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 639,
    "rms_norm_eps": 0.02,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
    "rope_parameters.rope_type": "dynamic",
    "rope_parameters.rope_theta": 5000.0,
}
_QWEN = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_window_layers": 2,
    "sliding_window": 63,
    "use_sliding_window": False,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_GEMMA = {key: value for key, value in _LLAMA.items() if not key.startswith(("hidden_act", "rope"))}
_GEMMA |= {
    "head_dim": 8,
    "hidden_activation": "silu",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "query_pre_attn_scalar": 8,
    "sliding_window": 63,
    "final_logit_softcapping": 4.0,
}

OTHER_VALUES |= {
    "llama_llama3": {
        **_LLAMA,
        **_BIASES,
        "head_dim": 8,
        "architectures": ["LlamaModel"],
        "rope_parameters.factor": 4.0,
        "rope_parameters.low_freq_factor": 2.0,
        "rope_parameters.high_freq_factor": 5.0,
        "rope_parameters.original_max_position_embeddings": 64,
    },
    "llama_yarn": {
        **_LLAMA,
        **_BIASES,
        "head_dim": 8,
        "architectures": ["LlamaModel"],
        "rope_parameters.factor": 3.0,
        "rope_parameters.original_max_position_embeddings": 320,
    },
    "mistral": {
        **_LLAMA,
        "head_dim": 8,
        "architectures": ["MistralModel"],
        "sliding_window": 63,
    },
    "qwen2_windows": {**_LLAMA, **_QWEN, "architectures": ["Qwen2Model"]},
    "qwen3": {
        **_LLAMA,
        **_QWEN,
        "head_dim": 8,
        "architectures": ["Qwen3Model"],
        "attention_bias": True,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
    },
    "gemma2": {
        **_GEMMA,
        "architectures": ["Gemma2Model"],
        "attn_logit_softcapping": 5.0,
        "layer_types": ["full_attention"] * 3,
        "rope_parameters.rope_type": "dynamic",
        "rope_parameters.rope_theta": 5000.0,
    },
    "gemma3_text": {
        **_GEMMA,
        "architectures": ["Gemma3TextModel"],
        "layer_types": ["full_attention"] * 4,
        "rope_parameters.full_attention.rope_type": "dynamic",
        "rope_parameters.full_attention.rope_theta": 5000.0,
        "rope_parameters.full_attention.factor": 4.0,
        "rope_parameters.sliding_attention.rope_type": "dynamic",
        "rope_parameters.sliding_attention.rope_theta": 5000.0,
    },
    "olmo2": {**_LLAMA, "architectures": ["Olmo2Model"], "attention_bias": True},
    "smollm3": {
        **_LLAMA,
        **_BIASES,
        "architectures": ["SmolLM3Model"],
        "tie_word_embeddings": False,
        "no_rope_layers": [1, 1, 1, 0],
        "no_rope_layer_interval": 2,
        "layer_types": ["sliding_attention"] * 4,
        "sliding_window": 63,
        "use_sliding_window": True,
    },
}

OVERRULED |= {
    "qwen2_windows": ("max_window_layers",),
    "qwen3": ("max_window_layers", "sliding_window", "use_sliding_window"),
    "smollm3": ("no_rope_layer_interval", "sliding_window", "use_sliding_window"),
}

REFUSED += [
    ("llama_biases", {"sliding_window": 5}, "sliding_window = 5 is not supported"),
    ("llama_biases", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama_biases", {"rope_parameters.rope_type": "dynamic"}, "rope_type 'dynamic'"),
    ("llama_yarn", {"rope_parameters.factr": 1.0}, "unknown settings .* factr"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "unknown key layer_types"),
    ("mistral", {"sliding_window": -1}, "sliding_window must be positive"),
    ("qwen2", {"use_mrope": True}, "use_mrope = true is not supported"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types must be 3 times"),
    ("qwen2", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is not true"),
    ("qwen2", {"dual_chunk_attention_config": {}}, "unknown key dual_chunk_attention_config"),
    ("gemma2", {"sliding_window": None}, "sliding_window must be positive"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", {"rope_parameters.rope_theta": 1.0}, "unknown key rope_parameters.rope_theta"),
    (
        "gemma3_text",
        {"rope_local_base_freq": 9.0},
        "of sliding_attention: .* disagrees",
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be 4 times"),
    ("olmo2", {"clip_qkv": 8.0}, "unknown key clip_qkv"),
]

SAME += [
    ("qwen2_windows", {"layer_types": None}),
    ("gemma2", {"layer_types": None, "hidden_act": "gelu_pytorch_tanh"}),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3}),
    (
        "gemma3_text",
        {
            "rope_parameters": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    (
        "llama_llama3",
        {
            "rope_parameters": None,
            "rope_theta": 5e5,
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    (
        "smollm3",
        {"layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 2},
    ),
]

WRITTEN += [
    ("llama_biases", {"head": "none"}),
    ("llama_biases", {"ropes": (Rope(7e3, LongRope((2.0,) * 5, (2.0,) * 5, 640)),)}),
    ("mistral", {"windows": ()}),
    ("qwen3", {"windows": (0, 0, 8)}),
    ("gemma2", {"windows": (), "attn_scale": None, "attn_softcap": None, "tied": False}),
    ("gemma3_text", {"windows": (), "ropes": (Rope(1e4, Linear(2.0)),)}),
    ("gemma3_text", {"ropes": (Rope(5.0), Rope(5.0), Rope(6.0), Rope(5.0))}),
    ("smollm3", {"ropes": (None,) * 4, "windows": (0, 9, 0, 9)}),
    ("smollm3", {"ropes": (Rope(7e3, Linear(2.0)),)}),
]

# --- bert, roberta, distilbert, modernbert, vit, deit, dinov2 ---

_BERT_VALUES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_size": 24,
    "intermediate_size": 48,
    "vocab_size": 96,
    "type_vocab_size": 3,
    "max_position_embeddings": 511,
    "layer_norm_eps": 0.02,
    "hidden_act": "gelu_new",
}
_VISION_VALUES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_size": 24,
    "qkv_bias": False,
    "layer_norm_eps": 0.02,
    "hidden_act": "gelu_new",
    "image_size": 48,
    "patch_size": 4,
    "num_channels": 1,
}
_VIT_VALUES = _VISION_VALUES | {
    "intermediate_size": 48,
    "id2label": {"0": "one"},
    "label2id": {"one": 0},
}
OTHER_VALUES |= {
    "bert": _BERT_VALUES,
    "roberta": _BERT_VALUES | {"pad_token_id": 2},
    "distilbert": {
        "n_layers": 2,
        "n_heads": 3,
        "dim": 24,
        "hidden_dim": 48,
        "vocab_size": 96,
        "max_position_embeddings": 511,
        "activation": "gelu_new",
    },
    "modernbert": {
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "vocab_size": 96,
        "max_position_embeddings": 511,
        "norm_eps": 0.02,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "decoder_bias": False,
        "tie_word_embeddings": False,
        "hidden_activation": "relu",
        "classifier_activation": "relu",
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        "local_attention": 62,
        "rope_parameters.full_attention.rope_type": "linear",
        "rope_parameters.full_attention.rope_theta": 150_000.0,
        "rope_parameters.sliding_attention.rope_type": "yarn",
        "rope_parameters.sliding_attention.rope_theta": 9_000.0,
    },
    "vit": _VIT_VALUES,
    "deit": _VIT_VALUES,
    "dinov2": _VISION_VALUES | {"mlp_ratio": 3, "use_swiglu_ffn": True},
}

_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 160_000.0}
REFUSED += [
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = .*absolute"),
    ("bert", {"is_decoder": True}, "is_decoder = true is not supported"),
    ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings = false is not supported"),
    ("bert", {"num_attention_heads": 5}, "a width of 36 is not split evenly by 5 heads"),
    ("bert", {"embedding_size": 36}, "unknown key embedding_size = 36"),
    ("roberta", {"pad_token_id": 513}, r"pad_token_id must lie in 0\.\.512, got 513"),
    ("roberta", {"hidden_act": "relu"}, "hidden_act must be 'gelu' with this head, got 'relu'"),
    ("distilbert", {"hidden_size": 40}, "dim = 36 disagrees with hidden_size = 40"),
    ("modernbert", {"classifier_activation": "relu"}, "classifier_activation = 'relu'"),
    ("modernbert", {"layer_types": ["full_attention"] * 3}, "layer_types must be 4 times"),
    ("modernbert", {"layer_types": ["chunked_attention"] * 4}, "layer_types must be 4 times"),
    ("modernbert", {"local_attention": 0}, "local_attention must be a positive integer, got 0"),
    (
        "modernbert",
        {"layer_types": None, "global_attn_every_n_layers": 0},
        "global_attn_every_n_layers must be a positive integer, got 0",
    ),
    ("modernbert", {"local_rope_theta": 1e5}, "sliding_attention disagrees with local_rope_theta"),
    (
        "modernbert",
        {"rope_parameters.full_attention": _LINEAR},
        "rotary scaling of full_attention is not supported",
    ),
    ("vit", {"image_size": 41}, "not cut evenly into patches of 8"),
    ("vit", {"image_size": None}, "missing key image_size"),
    ("vit", {"image_size": [40, 40, 3]}, "image_size must be a positive integer or two"),
    ("vit", {"patch_size": [8, 4]}, "patch_size must be square, got 8 x 4"),
    ("vit", {"pooler_act": "gelu"}, 'pooler_act = "gelu" is not supported'),
    ("vit", {"pooler_output_size": 20}, "pooler_output_size is 20, expected 36"),
    ("vit", {"num_labels": 8}, "num_labels counts 8 classes, classifier.weight 7"),
    ("deit", {"id2label": {"0": "cat"}}, "id2label counts 1 classes, classifier.weight 7"),
    ("dinov2", {"mlp_ratio": -1}, "mlp_ratio must be a positive number, got -1"),
    ("dinov2", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported"),
]

SAME += [
    ("bert", {"type_vocab_size": None, "hidden_act": None, "layer_norm_eps": None}),
    (
        "bert",
        {"directionality": "bidi", "pooler_fc_size": 7, "position_embedding_type": "absolute"},
    ),
    ("roberta", {"pad_token_id": None}),
    (
        "distilbert",
        {"dim": None, "hidden_size": 36, "n_layers": None, "num_hidden_layers": 3}
        | {"n_heads": None, "num_attention_heads": 4, "tie_weights_": True},
    ),
    (
        "modernbert",
        {"layer_types": None, "rope_parameters": None, "global_attn_every_n_layers": 3}
        | {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000, "layer_norm_eps": 1e-5}
        | {"position_embedding_type": "absolute", "reference_compile": None},
    ),
    ("modernbert", {"layer_types": None, "rope_parameters": None}),
    ("vit", {"image_size": [40, 40], "patch_size": [8, 8], "pooler_output_size": None}),
    ("dinov2_swiglu", {"hidden_act": "relu"}),
]

WRITTEN += [
    ("modernbert", {"head": "none", "windows": (), "ropes": (Rope(5e4),) * 4}),
    ("modernbert", {"head": "none", "windows": (9, 9, 9, 9), "ropes": (Rope(7.0),) * 4}),
    ("vit_backbone", {"pooler": False, "qkv_bias": True, "activation": "relu"}),
    ("dinov2", {"d_mlp": 100, "activation": "relu"}),
    ("dinov2_swiglu", {"d_mlp": 56}),
]

# --- stablelm ---

OTHER_VALUES["stablelm"] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 3,
    "hidden_size": 48,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 639,
    "layer_norm_eps": 0.02,
    "hidden_act": "gelu",
    "use_qkv_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters.rope_type": "linear",
    "rope_parameters.rope_theta": 5100.0,
    "rope_parameters.partial_rotary_factor": 0.5,
    "architectures": ["StableLmModel"],
}

REFUSED += [
    ("stablelm", {"num_attention_heads": 7}, "hidden_size 96 is not split evenly by 7 heads"),
    ("stablelm", {"head_dim": 10}, "unknown key head_dim = 10"),
]

SAME += [("stablelm", {"rope_theta": 5000.0, "partial_rotary_factor": 0.25, "rope_parameters": {}})]

WRITTEN += [("stablelm", {"rotary_dim": None}), ("stablelm", {"rotary_dim": 8})]
