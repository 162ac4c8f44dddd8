"""Decoders: odd shapes, biases on and off, windows shorter than the prompt, scaled rotary."""

from __future__ import annotations

from typing import Any

from family_reference.case import Case, Stack

# Ids inside the small vocabulary.
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_EPS = 2e-3
"""Larger than usual, so that an ignored epsilon shows."""

# Six heads of size 10 in a width of 36: H != K, and D is no multiple of Dh.
_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 640,
    "rms_norm_eps": _EPS,
} | _IDS

# For families whose heads are of size D / H.
_EVEN = {name: size for name, size in _SHAPE.items() if name != "head_dim"}
_LAYER_NORMED = {
    "vocab_size": 97,
    "hidden_size": 36,
    "max_position_embeddings": 640,
} | _IDS

_MODERN = Stack("model.layers", "input:post_attention_layernorm", final="model.norm")
_SANDWICH = Stack("model.layers", "input:pre_feedforward_layernorm", final="model.norm")
_GPT2 = Stack(
    "transformer.h", "input:ln_2", attention="attn", o="attn.c_proj", final="transformer.ln_f"
)
_NEO = Stack(
    "transformer.h",
    "input:ln_2",
    attention="attn",
    o="attn.attention.out_proj",
    final="transformer.ln_f",
)
_OPT = Stack(
    "model.decoder.layers",
    "input:final_layer_norm",
    o="self_attn.out_proj",
    final="model.decoder.final_layer_norm",
)
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _neox(mid: str) -> Stack:
    return Stack(
        "gpt_neox.layers",
        mid,
        attention="attention",
        o="attention.dense",
        final="gpt_neox.final_layer_norm",
    )


def _decoder(name: str, prefix: str, stack: Stack = _MODERN, **settings: Any) -> Case:
    window = settings.get("sliding_window") or settings.get("window_size") or 0
    draw = settings.pop("draw", {})
    config = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    return Case(name, f"{prefix}ForCausalLM", config, settings, (stack,), window, draw)


def _rope(kind: str, theta: float = 10_000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta} | settings


def _phi3(name: str, **settings: Any) -> Case:
    shape = _EVEN | {"hidden_size": 48, "num_attention_heads": 4}
    return _decoder(name, "Phi3", **shape | settings)


def _longrope(original: int, features: int, **further: Any) -> dict[str, Any]:
    short = [1.0 + 0.05 * i for i in range(features)]
    long = [1.5 + 0.9 * i for i in range(features)]
    return {
        "original_max_position_embeddings": original,
        "max_position_embeddings": 4 * original,
        "rope_parameters": _rope(
            "longrope",
            short_factor=short,
            long_factor=long,
            original_max_position_embeddings=original,
            **further,
        ),
    }


DECODERS = (
    Case(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 40, "n_layer": 3, "n_head": 5, "n_positions": 512}
        | {"n_inner": 52, "layer_norm_epsilon": _EPS, "bos_token_id": 1, "eos_token_id": 2},
        (_GPT2,),
    ),
    _decoder(
        "gpt_neo",
        "GPTNeo",
        _NEO,
        **_LAYER_NORMED,
        num_layers=4,
        num_heads=4,
        intermediate_size=52,
        attention_types=[[["global", "local"], 2]],
        window_size=64,
        layer_norm_epsilon=_EPS,
        draw={"gain": 1.0},
    ),
    _decoder(
        "gpt_neox",
        "GPTNeoX",
        _neox("sum"),
        **_LAYER_NORMED | {"hidden_size": 48},
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=52,
        layer_norm_eps=_EPS,
        rope_parameters=_rope("default", 5_000.0, partial_rotary_factor=0.25),
    ),
    _decoder(
        "gpt_neox_sequential",
        "GPTNeoX",
        _neox("input:post_attention_layernorm"),
        **_LAYER_NORMED | {"hidden_size": 48},
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=52,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters=_rope("default", partial_rotary_factor=0.5),
    ),
    _decoder(
        "opt",
        "OPT",
        _OPT,
        **_LAYER_NORMED,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=52,
        word_embed_proj_dim=36,
    ),
    _decoder(
        "llama_llama3",
        "Llama",
        **_SHAPE,
        rope_parameters=_rope(
            "llama3",
            500_000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    ),
    _decoder(
        "llama_linear",
        "Llama",
        **_SHAPE,
        rope_parameters=_rope("linear", factor=3.0),
        tie_word_embeddings=True,
    ),
    _decoder(
        "llama_yarn",
        "Llama",
        **_SHAPE,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=160),
    ),
    _decoder(
        "llama_yarn_exact",
        "Llama",
        **_SHAPE | {"head_dim": 16},
        rope_parameters=_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=160,
            beta_fast=8.0,
            beta_slow=2.0,
            attention_factor=1.2,
            truncate=False,
        ),
    ),
    _decoder("llama_biases", "Llama", **_SHAPE, attention_bias=True, mlp_bias=True),
    _decoder("mistral", "Mistral", **_SHAPE, sliding_window=64),
    _decoder("qwen2", "Qwen2", **_EVEN, tie_word_embeddings=True),
    _decoder(
        "qwen2_windows",
        "Qwen2",
        **_EVEN,
        use_sliding_window=True,
        sliding_window=64,
        max_window_layers=1,
        layer_types=[_FULL, _SLIDING, _SLIDING],
        rope_parameters=_rope("default", 1e6),
    ),
    _decoder("qwen3", "Qwen3", **_SHAPE, tie_word_embeddings=True),
    _decoder(
        "gemma2",
        "Gemma2",
        _SANDWICH,
        **_SHAPE,
        query_pre_attn_scalar=7,
        sliding_window=64,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=3.0,
        draw={"norm": 0.0},
    ),
    _decoder(
        "gemma3_text",
        "Gemma3",
        _SANDWICH,
        **_SHAPE | {"num_hidden_layers": 4},
        query_pre_attn_scalar=7,
        sliding_window=64,
        layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING],
        rope_parameters={
            _FULL: _rope("linear", 1e6, factor=8.0),
            _SLIDING: _rope("default", 10_000.0),
        },
        draw={"norm": 0.0, "qk_norm": 0.4},
    ),
    _phi3("phi3", sliding_window=64),
    _phi3("phi3_longrope_short", **_longrope(1024, 6)),
    _phi3("phi3_longrope_long", **_longrope(200, 6)),
    _phi3("phi3_partial", **_longrope(200, 3, partial_rotary_factor=0.5)),
    _decoder(
        "olmo2",
        "Olmo2",
        Stack("model.layers", "input:mlp", final="model.norm"),
        **_EVEN,
        rope_parameters=_rope("default", 500_000.0),
    ),
    _decoder(
        "smollm3",
        "SmolLM3",
        **_EVEN | {"num_hidden_layers": 4},
        no_rope_layers=[1, 0, 1, 0],
        rope_parameters=_rope("default", 2_000_000.0),
    ),
    _decoder(
        "stablelm",
        "StableLm",
        **_LAYER_NORMED | {"hidden_size": 96},
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=52,
        layer_norm_eps=_EPS,
        use_qkv_bias=True,
        rope_parameters=_rope("default", 5_000.0, partial_rotary_factor=0.25),
    ),
)
