"""Keys of llama and the families that vary it; see family_keys.py."""

from __future__ import annotations

from typing import Any

from jaxheads.model.rotary import Linear, LongRope, Rope

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

OTHER_VALUES: dict[str, dict[str, Any]] = {
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

OVERRULED: dict[str, tuple[str, ...]] = {
    "qwen2_windows": ("max_window_layers",),
    "qwen3": ("max_window_layers", "sliding_window", "use_sliding_window"),
    "smollm3": ("no_rope_layer_interval", "sliding_window", "use_sliding_window"),
}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
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

SAME: list[tuple[str, dict[str, Any]]] = [
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

WRITTEN: list[tuple[str, dict[str, Any]]] = [
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
