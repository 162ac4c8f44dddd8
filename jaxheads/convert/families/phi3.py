"""Phi-3 and Phi-4-mini: Llama's block with joint tensors, windows, and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.llama_cpp import gguf_schema, partial_rope_part, read_only
from jaxheads.convert.families.rope import read_rope, rope_part, rope_settings
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    head_part,
    same_as,
    width_per_head,
    windows_part,
)
from jaxheads.convert.schema import Key, Part, Schema
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig
from jaxheads.model.rotary import LongRope, Rope

_B = "model.layers.{L}."
_GGUF = "blk.{L}."
_QKV, _GATE_UP = ("H", "K", "K"), ("F", "F")
_ORIGINAL = "original_max_position_embeddings"
_ORIGINAL_DEFAULT = 4096
_KINDS = ("default", "longrope", "su")


def _rope_part() -> Part:
    common = rope_part()

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        kind = rope_settings(raw).get("rope_type", "default")
        if kind not in _KINDS:
            raise ValueError(f"rope_type {kind!r} is not supported (only {', '.join(_KINDS)})")
        if not any(key.endswith(_ORIGINAL) for key in raw):
            raw = {**raw, _ORIGINAL: _ORIGINAL_DEFAULT}
        return common.read(raw, fields)

    def write(config: ModelConfig) -> dict[str, Any]:
        keys = common.write(config)
        rope, scaling = config.ropes[0], keys.pop("rope_scaling", None)
        if scaling is None or rope is None:
            return keys
        if not isinstance(rope.scaling, LongRope):
            raise ValueError(f"this format has no rotary scaling but longrope, got {rope.scaling}")
        # Older versions of transformers take these three settings and no other.
        factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
        outside = {_ORIGINAL: rope.scaling.original}
        settings = {"rope_type": "longrope"} | factors | outside
        if read_rope(settings, rope.base, config.context_length) != rope:
            factors["attention_factor"] = rope.scaling.magnitude
        return keys | {"rope_scaling": {"type": "longrope"} | factors} | outside

    return Part(common.keys, read, write)


def _read_windows(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    window = raw.get("sliding_window")
    if window is None:
        return ()
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window must be a positive integer, got {window!r}")
    return (window,) * n_layers


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    if len(set(config.windows)) > 1:
        raise ValueError(f"this format has one window, the config has {config.windows}")
    return {"sliding_window": next(iter(config.windows), 0) or None}


_SCHEMA = Schema(
    family_key="model_type",
    used=(
        Key("num_hidden_layers", ("n_layers",)),
        Key("num_attention_heads", ("n_heads",)),
        Key("num_key_value_heads", ("n_kv_heads",), default=same_as("num_attention_heads")),
        Key(
            "head_dim",
            ("head_dim",),
            default=width_per_head("hidden_size", "num_attention_heads"),
        ),
        Key("hidden_size", ("d_model",)),
        Key("intermediate_size", ("d_mlp",)),
        Key("vocab_size", ("vocab_size",)),
        Key("max_position_embeddings", ("context_length",)),
        Key("rms_norm_eps", ("norm_eps",), default=absent_means(1e-5)),
        activation_key("hidden_act", "silu"),
        Key("tie_word_embeddings", ("tied",), default=absent_means(False)),
    ),
    parts=(
        _rope_part(),
        windows_part(_read_windows, _write_windows, "sliding_window"),
        head_part("Phi3ForCausalLM", "Phi3Model"),
    ),
    constants={"family": "phi3"},
    fixed={
        **HF_FIXED,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "is_encoder_decoder": (False,),
    },
    ignored=(*HF_IGNORED, "is_decoder", "auto_map"),
    written={"model_type": "phi3"},
)

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_SCALING = "phi3.rope.scaling."
_WINDOW = "phi3.attention.sliding_window"


def _gguf_rope_part() -> Part:
    common = partial_rope_part("phi3")

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        if _LONG not in raw and _SHORT not in raw:
            return common.read(raw, fields)
        # The tensors say what the type, which most files lack, would.
        settings = {key: raw[key] for key in raw if not key.startswith(_SCALING)}
        found = common.read(settings, fields)
        if raw.get(_SCALING + "type", "longrope") != "longrope":
            raise ValueError(f"{_SCALING}type = {raw[_SCALING + 'type']!r} with {_LONG}")
        missing = [
            name
            for name in (_LONG, _SHORT, _SCALING + "original_context_length")
            if name not in raw
        ]
        if missing:
            raise ValueError(f"longrope needs {' and '.join(missing)}")
        short, long = (tuple(float(str(v)) for v in raw[name]) for name in (_SHORT, _LONG))
        original = raw[_SCALING + "original_context_length"]
        magnitude = float(raw.get(_SCALING + "attn_factor", 1.0))
        rope = Rope(found["ropes"][0].base, LongRope(short, long, original, magnitude))
        return found | {"ropes": (rope,)}

    return Part(common.keys, read, read_only, (*common.tensors, _LONG, _SHORT))


def _gguf_windows(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    if _WINDOW not in raw:
        raise ValueError(f"missing key {_WINDOW}: files from before it do not tell the window")
    return (raw[_WINDOW],) * n_layers


_GGUF_SCHEMA = gguf_schema(
    "phi3",
    "phi3",
    parts=(_gguf_rope_part(), windows_part(_gguf_windows, read_only, _WINDOW)),
)

PHI3 = Family(
    name="phi3",
    formats={
        "huggingface": Format(
            schema=_SCHEMA,
            rows={
                "embed/tokens": Stored("model.embed_tokens.weight", "V D -> V D"),
                "blocks/attn_norm/scale": Stored(_B + "input_layernorm.weight", "D -> D"),
                **{
                    f"blocks/attn/{name}": Stored(
                        _B + "self_attn.qkv_proj.weight", "(J Dh) D -> D J Dh", _QKV, part
                    )
                    for part, name in enumerate("qkv")
                },
                "blocks/attn/o": Stored(_B + "self_attn.o_proj.weight", "D (H Dh) -> H Dh D"),
                "blocks/mlp_norm/scale": Stored(_B + "post_attention_layernorm.weight", "D -> D"),
                **{
                    f"blocks/mlp/{name}": Stored(
                        _B + "mlp.gate_up_proj.weight", "J D -> D J", _GATE_UP, part
                    )
                    for part, name in enumerate(("gate", "up"))
                },
                "blocks/mlp/down": Stored(_B + "mlp.down_proj.weight", "D F -> F D"),
                "final_norm/scale": Stored("model.norm.weight", "D -> D"),
                "unembed/kernel": Stored("lm_head.weight", "V D -> V D"),
            },
            ignored=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
            copies={"lm_head.weight": "embed/tokens"},
            spellings=(("model.", ""),),
        ),
        "gguf": Format(
            schema=_GGUF_SCHEMA,
            rows={
                "embed/tokens": Stored("token_embd.weight", "V D -> V D"),
                "blocks/attn_norm/scale": Stored(_GGUF + "attn_norm.weight", "D -> D"),
                **{
                    f"blocks/attn/{name}": Stored(
                        _GGUF + "attn_qkv.weight", "(J Dh) D -> D J Dh", _QKV, part
                    )
                    for part, name in enumerate("qkv")
                },
                "blocks/attn/o": Stored(_GGUF + "attn_output.weight", "D (H Dh) -> H Dh D"),
                "blocks/mlp_norm/scale": Stored(_GGUF + "ffn_norm.weight", "D -> D"),
                **{
                    f"blocks/mlp/{name}": Stored(
                        _GGUF + "ffn_up.weight", "J D -> D J", _GATE_UP, part
                    )
                    for part, name in enumerate(("gate", "up"))
                },
                "blocks/mlp/down": Stored(_GGUF + "ffn_down.weight", "D F -> F D"),
                "final_norm/scale": Stored("output_norm.weight", "D -> D"),
                "unembed/kernel": Stored("output.weight", "V D -> V D"),
            },
            # Read as settings.
            ignored=(r"rope_factors_(long|short)\.weight",),
        ),
    },
)
