"""ModernBERT (Warner et al. 2024): rotary positions, local layers, a gated MLP, few biases.

llama.cpp drops the unembedding's bias, and with it the head: conversion/bert.py. Its own code
is src/models/modern-bert.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxheads.convert.families.encoder import class_part
from jaxheads.convert.families.llama_cpp import gguf_schema, periodic_windows, read_only
from jaxheads.convert.families.rope import (
    gguf_rope_part,
    read_gguf_rope,
    read_rope,
    rope_settings,
)
from jaxheads.convert.families.rows import norm_rows
from jaxheads.convert.families.shared import (
    ACTIVATION_NAMES,
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    has,
    normal_windows,
)
from jaxheads.convert.schema import Key, Part, Schema, Source
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig
from jaxheads.model.rotary import Rope

_FULL, _SLIDING = "full_attention", "sliding_attention"
_BASES = {_FULL: ("global_rope_theta", 160_000.0), _SLIDING: ("local_rope_theta", 10_000.0)}
"""For each kind of layer, the old key of its rotary base, and the base where none is named."""


def _read_layers(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    n_layers, period = fields["n_layers"], raw.get("global_attn_every_n_layers", 3)
    local = raw.get("local_attention", 128)
    for name, value in (("global_attn_every_n_layers", period), ("local_attention", local)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    kinds = raw.get("layer_types") or [_SLIDING if i % period else _FULL for i in range(n_layers)]
    if len(kinds) != n_layers or not set(kinds) <= {_FULL, _SLIDING}:
        raise ValueError(
            f"layer_types must be {n_layers} times {_FULL} or {_SLIDING}, got {kinds!r}"
        )
    ropes = {kind: _read_base(raw, kind, fields["context_length"]) for kind in _BASES}
    # A token sees local_attention // 2 tokens to either side, itself not counted.
    windows = tuple(local // 2 + 1 if kind == _SLIDING else 0 for kind in kinds)
    return {"windows": normal_windows(windows), "ropes": tuple(ropes[kind] for kind in kinds)}


def _read_base(raw: Mapping[str, Any], kind: str, context_length: int) -> Rope:
    old, base = _BASES[kind]
    settings = rope_settings(raw, kind)
    if old in raw:
        named = settings.setdefault("rope_theta", raw[old])
        if named != raw[old]:
            raise ValueError(f"rope_theta = {named!r} of {kind} disagrees with {old} = {raw[old]}")
    rope = read_rope(settings, base, context_length)
    if rope.scaling is not None:
        raise ValueError(f"rotary scaling of {kind} is not supported: {settings}")
    return rope


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    n_layers = config.n_layers
    kinds = [_SLIDING if window else _FULL for window in config.windows or (0,) * n_layers]
    keys: dict[str, Any] = {"layer_types": kinds}
    width = max(config.windows, default=0)
    if width:
        keys["local_attention"] = 2 * (width - 1)
    ropes = config.ropes * n_layers if len(config.ropes) == 1 else config.ropes
    # The old keys of the bases are those that every version of transformers reads.
    for kind, rope in zip(kinds, ropes, strict=True):
        if rope is not None:
            keys[_BASES[kind][0]] = rope.base
    period = next((i for i in range(1, n_layers) if kinds[i] == _FULL), n_layers)
    if all((kinds[i] == _FULL) == (i % period == 0) for i in range(n_layers)):
        keys["global_attn_every_n_layers"] = period
    return keys


def _read_activation(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    name = raw.get("classifier_activation", "gelu")
    if fields["head"] == "mlm" and ACTIVATION_NAMES.get(name) != fields["activation"]:
        raise ValueError(
            f"classifier_activation = {name!r} is not supported where hidden_activation "
            f"is {fields['activation']!r}"
        )
    return {}


def _write_activation(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
    return {"classifier_activation": names[config.activation]}


def _head(source: Source) -> str:
    return "mlm" if "head.dense.weight" in source.shapes else "none"


_WINDOW, _BASE = "modern-bert.attention.sliding_window", "modern-bert.rope.freq_base"


def _read_gguf_layers(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    both = periodic_windows("modern-bert", size=None, period=3, first=True)(raw, fields["n_layers"])
    # The stored window counts both sides, as local_attention does.
    windows = tuple(window // 2 + 1 if window else 0 for window in both)
    # llama.cpp's base where there is no key is not ModernBERT's.
    for key in (_BASE, f"{_BASE}_swa") if any(windows) else (_BASE,):
        if key not in raw:
            raise ValueError(f"missing key {key}")
    full = read_gguf_rope(raw, "modern-bert", fields["context_length"])
    if full.scaling is not None:
        raise ValueError(f"rotary scaling is not supported, got {full.scaling}")
    sliding = Rope(raw[f"{_BASE}_swa"]) if any(windows) else full
    ropes = tuple(sliding if window else full for window in windows)
    return {"windows": normal_windows(windows), "ropes": ropes}


_BLOCK, _GGUF_BLOCK = "model.layers.{L}.", "blk.{L}."
_QKV = "(J H Dh) D -> J D H Dh", "(J H Dh) -> J H Dh"
_ROWS: dict[str, tuple[str, str]] = {
    "embed/tokens": ("model.embeddings.tok_embeddings.weight", "V D -> V D"),
    "embed/norm/scale": ("model.embeddings.norm.weight", "D -> D"),
    "embed/norm/bias": ("model.embeddings.norm.bias", "D -> D"),
    "blocks/attn/o": (f"{_BLOCK}attn.Wo.weight", "D (H Dh) -> H Dh D"),
    "blocks/attn/o_bias": (f"{_BLOCK}attn.Wo.bias", "D -> D"),
    "blocks/mlp_norm/scale": (f"{_BLOCK}mlp_norm.weight", "D -> D"),
    "blocks/mlp_norm/bias": (f"{_BLOCK}mlp_norm.bias", "D -> D"),
    "blocks/mlp/down": (f"{_BLOCK}mlp.Wo.weight", "D F -> F D"),
    "blocks/mlp/down_bias": (f"{_BLOCK}mlp.Wo.bias", "D -> D"),
    "final_norm/scale": ("model.final_norm.weight", "D -> D"),
    "final_norm/bias": ("model.final_norm.bias", "D -> D"),
    "head/dense": ("head.dense.weight", "E D -> D E"),
    "head/dense_bias": ("head.dense.bias", "D -> D"),
    "head/norm/scale": ("head.norm.weight", "D -> D"),
    "head/norm/bias": ("head.norm.bias", "D -> D"),
    "unembed/kernel": ("decoder.weight", "V D -> V D"),
    "unembed/bias": ("decoder.bias", "V -> V"),
}


def _fused_rows(qkv: str, gate_up: str, attn_norm: str) -> dict[str, Stored]:
    """Rows of joint tensors and of a norm that not every layer has, by the tensors' names."""
    rows: dict[str, Stored] = {}
    for part, head in enumerate("qkv"):
        for path, name, pattern in (("", "weight", _QKV[0]), ("_bias", "bias", _QKV[1])):
            joint = ("one", "one", "one")
            stored = Stored(f"{qkv}.{name}", pattern, joint=joint, part=part)
            rows[f"blocks/attn/{head}{path}"] = stored
    # The first half is the one that is activated.
    for part, half in enumerate(("gate", "up")):
        for path, name, pattern in (("", "weight", "J D -> D J"), ("_bias", "bias", "J -> J")):
            stored = Stored(f"{gate_up}.{name}", pattern, joint=("F", "F"), part=part)
            rows[f"blocks/mlp/{half}{path}"] = stored
    # The first block's attention reads the embeddings, which are normalised already.
    for path, name in (("scale", "weight"), ("bias", "bias")):
        rows[f"blocks/attn_norm/{path}"] = Stored(f"{attn_norm}.{name}", "D -> D", skip=(0,))
    return rows


_CONSTANTS = {
    "family": "modernbert",
    "causal": False,
    "norm": "layer",
    "embed_norm": True,
    "first_attn_norm": False,
}

_GGUF_SCHEMA = gguf_schema(
    "modern-bert",
    "modernbert",
    parts=(
        Part(
            (
                *gguf_rope_part("modern-bert").keys,
                *(f"{_BASE}_swa", _WINDOW, f"{_WINDOW}_pattern"),
            ),
            _read_gguf_layers,
            read_only,
        ),
    ),
    used=(activation_key("hidden_activation", "gelu"),),
    constants={**_CONSTANTS, "head": "none"},
    fixed={"attention.causal": (False,)},
    inferred={"norm_bias": has("token_embd_norm.bias")},
    ignored=("classifier.output_labels",),
)

_GGUF_ROWS = {
    "embed/tokens": Stored("token_embd.weight", "V D -> V D"),
    **norm_rows("embed/norm", "token_embd_norm"),
    "blocks/attn/o": Stored(f"{_GGUF_BLOCK}attn_output.weight", "D (H Dh) -> H Dh D"),
    "blocks/attn/o_bias": Stored(f"{_GGUF_BLOCK}attn_output.bias", "D -> D"),
    **norm_rows("blocks/mlp_norm", f"{_GGUF_BLOCK}ffn_norm"),
    "blocks/mlp/down": Stored(f"{_GGUF_BLOCK}ffn_down.weight", "D F -> F D"),
    "blocks/mlp/down_bias": Stored(f"{_GGUF_BLOCK}ffn_down.bias", "D -> D"),
    **norm_rows("final_norm", "output_norm"),
    **_fused_rows(*(_GGUF_BLOCK + name for name in ("attn_qkv", "ffn_up", "attn_norm"))),
}

MODERNBERT = Family(
    name="modernbert",
    formats={
        "huggingface": Format(
            schema=Schema(
                family_key="model_type",
                used=(
                    Key("num_hidden_layers", ("n_layers",)),
                    Key("num_attention_heads", ("n_heads",)),
                    Key("hidden_size", ("d_model",)),
                    Key("intermediate_size", ("d_mlp",)),
                    Key("vocab_size", ("vocab_size",)),
                    Key("max_position_embeddings", ("context_length",)),
                    Key("norm_eps", ("norm_eps",), default=absent_means(1e-5)),
                    Key("norm_bias", ("norm_bias",), default=absent_means(False)),
                    Key("attention_bias", ("qkv_bias", "o_bias"), default=absent_means(False)),
                    Key("mlp_bias", ("mlp_bias",), default=absent_means(False)),
                    Key("classifier_bias", ("head_bias",), default=absent_means(False)),
                    Key("decoder_bias", ("unembed_bias",), default=absent_means(True)),
                    Key("tie_word_embeddings", ("tied",), default=absent_means(True)),
                    activation_key("hidden_activation", "gelu"),
                ),
                parts=(
                    even_heads_part(),
                    Part(
                        (
                            *("layer_types", "global_attn_every_n_layers", "local_attention"),
                            *("global_rope_theta", "local_rope_theta"),
                            *(f"rope_parameters.{kind}.*" for kind in _BASES),
                        ),
                        _read_layers,
                        _write_layers,
                    ),
                    Part(("classifier_activation",), _read_activation, _write_activation),
                    class_part({"mlm": "ModernBertForMaskedLM", "none": "ModernBertModel"}),
                ),
                constants=_CONSTANTS,
                inferred={"head": _head},
                fixed={
                    **HF_FIXED,
                    "rope_scaling": (None,),
                    "rope_parameters": (None,),
                    "position_embedding_type": ("absolute",),
                    "is_decoder": (False,),
                    "is_encoder_decoder": (False,),
                },
                # layer_norm_eps is written by old versions and read by none (norm_eps is);
                # sparse_prediction leaves out logits only where a loss is asked for.
                ignored=(
                    *HF_IGNORED,
                    *("layer_norm_eps", "sparse_pred*", "deterministic_flash_attn"),
                    *("reference_compile", "repad_logits_with_grad", "initializer_cutoff_factor"),
                    "classifier_pooling",
                ),
                written={"model_type": "modernbert"},
            ),
            rows={
                **{path: Stored(*row) for path, row in _ROWS.items()},
                **_fused_rows(*(_BLOCK + name for name in ("attn.Wqkv", "mlp.Wi", "attn_norm"))),
            },
            refused={
                "classifier.weight": "a classifier of sentences or tokens, which is not supported"
            },
            copies={"decoder.weight": "embed/tokens"},
            spellings=(("model.", ""),),
        ),
        "gguf": Format(
            schema=_GGUF_SCHEMA,
            rows=_GGUF_ROWS,
            names=("modern-bert",),
            # What is left of the head.
            ignored=(r"cls\.(norm\.)?(weight|bias)",),
            refused={
                "cls.output.weight": "a classifier of sentences or tokens, which is not supported"
            },
        ),
    },
)
