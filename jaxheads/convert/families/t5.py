"""T5, T5 v1.1 and Flan-T5 (Raffel et al. 2020): RMS norms, relative position biases.

The two stacks share the token embeddings. v1.0 ties the unembedding to them and scales
what it unembeds by D ** -0.5; later versions have an unembedding of their own.

llama.cpp stores neither the activation (it is relu, or gelu where gated) nor the scale (it
leaves that out) nor the farthest distance (always 128): src/models/t5.cpp, src/llama-graph.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxheads.convert.families.llama_cpp import gguf_schema, read_only
from jaxheads.convert.families.shared import HF_FIXED, HF_IGNORED, absent_means, has, same_as
from jaxheads.convert.schema import Composite, Key, Part, Schema, Source
from jaxheads.convert.table import Family, Format, Stored
from jaxheads.model.config import ModelConfig
from jaxheads.model.encoder_decoder import EncoderDecoderConfig

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def _read_mlp(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = raw.get("feed_forward_proj", "relu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    # The reference reads "gated-gelu" as the tanh approximation.
    name = "gelu_new" if kind == "gated-gelu" else name
    if name not in _ACTIVATIONS:
        raise ValueError(f"feed_forward_proj = {kind!r} is not supported")
    for key, expected in (("dense_act_fn", name), ("is_gated_act", gated)):
        if raw.get(key, expected) != expected:
            raise ValueError(f"{key} = {raw[key]!r} disagrees with feed_forward_proj = {kind!r}")
    return {"activation": _ACTIVATIONS[name], "gated": gated}


def _write_mlp(config: ModelConfig) -> dict[str, Any]:
    name = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    if config.gated and name == "gelu":
        raise ValueError("T5 has no gated MLP with the exact gelu")
    if config.gated:
        return {"feed_forward_proj": "gated-gelu" if name == "gelu_new" else f"gated-{name}"}
    return {"feed_forward_proj": name}


def _read_ends(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    tied = raw.get("tie_word_embeddings", True)
    scaled = raw.get("scale_decoder_outputs", tied)
    return {"tied": tied, "logit_scale": fields["d_model"] ** -0.5 if scaled else 1.0}


def _write_ends(config: ModelConfig) -> dict[str, Any]:
    scaled = config.logit_scale == config.d_model**-0.5
    keys: dict[str, Any] = {"tie_word_embeddings": config.tied}
    return keys if scaled == config.tied else keys | {"scale_decoder_outputs": scaled}


def _nothing(config: ModelConfig) -> dict[str, Any]:
    return {}


_COMMON = (
    Key("num_heads", ("n_heads", "n_kv_heads")),
    Key("d_kv", ("head_dim",)),
    Key("d_model", ("d_model",)),
    Key("d_ff", ("d_mlp",)),
    Key("vocab_size", ("vocab_size",)),
    # Relative positions have no end; this is what the tokenizer was trained with.
    Key("n_positions", ("context_length",), default=absent_means(512)),
    Key("relative_attention_num_buckets", ("relative_buckets",)),
    Key("relative_attention_max_distance", ("relative_distance",), default=absent_means(128)),
    Key("layer_norm_epsilon", ("norm_eps",)),
)
_CONSTANTS = {"family": "t5", "ropes": (None,), "attn_scale": 1.0}
_FIXED = {**HF_FIXED, "is_encoder_decoder": (True,)}
_IGNORED = (*HF_IGNORED, "is_decoder", "output_past")
_MLP = Part(("feed_forward_proj", "dense_act_fn", "is_gated_act"), _read_mlp, _write_mlp)

_ENCODER = Schema(
    family_key="model_type",
    used=(*_COMMON, Key("num_layers", ("n_layers",))),
    parts=(_MLP,),
    constants={**_CONSTANTS, "causal": False, "head": "none"},
    fixed=_FIXED,
    ignored=(*_IGNORED, "num_decoder_layers", "tie_word_embeddings", "scale_decoder_outputs"),
)
_DECODER = Schema(
    family_key="model_type",
    used=(
        *_COMMON,
        Key("num_decoder_layers", ("n_layers",), default=same_as("num_layers")),
    ),
    parts=(_MLP, Part(("tie_word_embeddings", "scale_decoder_outputs"), _read_ends, _write_ends)),
    constants={**_CONSTANTS, "cross": True},
    fixed=_FIXED,
    ignored=(*_IGNORED, "num_layers"),
)


def _attention(path: str, name: str) -> dict[str, Stored]:
    rows = {
        f"{path}/{head}": Stored(f"{name}.{head}.weight", f"({axis} Dh) D -> D {axis} Dh")
        for head, axis in (("q", "H"), ("k", "K"), ("v", "K"))
    }
    return rows | {f"{path}/o": Stored(f"{name}.o.weight", "D (H Dh) -> H Dh D")}


def _stack(side: str, mlp: int) -> dict[str, Stored]:
    """Rows of a stack whose MLP is the layer of this number in a block."""
    block, ours = f"{side}.block.{{L}}.layer.", f"{side}/blocks/"
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        f"{side}/relative/bias": Stored(bias, "N H -> N H"),
        f"{ours}attn_norm/scale": Stored(f"{block}0.layer_norm.weight", "D -> D"),
        **_attention(f"{ours}attn", f"{block}0.SelfAttention"),
        f"{ours}mlp_norm/scale": Stored(f"{block}{mlp}.layer_norm.weight", "D -> D"),
        f"{ours}mlp/gate": Stored(f"{block}{mlp}.DenseReluDense.wi_0.weight", "F D -> D F"),
        f"{ours}mlp/up": Stored(f"{block}{mlp}.DenseReluDense.wi_1.weight", "F D -> D F"),
        f"{ours}mlp/down": Stored(f"{block}{mlp}.DenseReluDense.wo.weight", "D F -> F D"),
        f"{side}/final_norm/scale": Stored(f"{side}.final_layer_norm.weight", "D -> D"),
    }


def _plain_mlp(config: EncoderDecoderConfig) -> dict[str, Stored]:
    """The rows of an MLP that is not gated: its first map has no number."""
    if config.decoder.gated:
        return {}
    return {
        f"{side}/blocks/mlp/up": Stored(
            f"{side}.block.{{L}}.layer.{mlp}.DenseReluDense.wi.weight", "F D -> D F"
        )
        for side, mlp in (("encoder", 1), ("decoder", 2))
    }


_GATED, _OUTPUT, _TOKENS = has("enc.blk.0.ffn_gate.weight"), "output.weight", "token_embd.weight"


def _gguf_tied(source: Source) -> bool:
    # Files made from PyTorch's of v1.0 may repeat the embeddings.
    if _OUTPUT not in source.shapes or _TOKENS not in source.shapes:
        return True
    return np.array_equal(source.read(_OUTPUT), source.read(_TOKENS))


def _read_gguf_scale(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    if not (fields["tied"] or fields["gated"]):
        raise ValueError(
            f"an {_OUTPUT} that is not {_TOKENS}, beside an MLP without a gate: "
            "the file does not tell whether the logits are scaled, as those of T5 v1.0 are"
        )
    return {"logit_scale": fields["d_model"] ** -0.5 if fields["tied"] else 1.0}


def _gguf_side(
    *used: Key,
    parts: tuple[Part, ...],
    constants: Mapping[str, Any],
    inferred: Mapping[str, Callable[[Source], Any]],
    ignored: tuple[str, ...],
) -> Schema:
    return gguf_schema(
        "t5",
        "t5",
        parts=parts,
        used=(Key("attention.relative_buckets_count", ("relative_buckets",)), *used),
        constants={**_CONSTANTS, "relative_distance": 128, **constants},
        inferred={
            "gated": _GATED,
            "activation": lambda source: "gelu_tanh" if _GATED(source) else "relu",
            **inferred,
        },
        ignored=("decoder_start_token_id", *ignored),
    )


_GGUF_SCHEMA = Composite(
    family_key="general.architecture",
    sides={
        "encoder": _gguf_side(
            parts=(),
            constants={"causal": False, "head": "none"},
            inferred={"tied": lambda source: True},
            ignored=("decoder_block_count",),
        ),
        "decoder": _gguf_side(
            Key("decoder_block_count", ("n_layers",), default=same_as("t5.block_count")),
            parts=(Part((), _read_gguf_scale, read_only),),
            constants={"cross": True},
            inferred={"tied": _gguf_tied},
            ignored=(),
        ),
    },
    make=EncoderDecoderConfig,
)


def _gguf_attention(path: str, name: str) -> dict[str, Stored]:
    rows = {
        f"{path}/{head}": Stored(f"{name}_{head}.weight", f"({axis} Dh) D -> D {axis} Dh")
        for head, axis in (("q", "H"), ("k", "K"), ("v", "K"))
    }
    return rows | {f"{path}/o": Stored(f"{name}_o.weight", "D (H Dh) -> H Dh D")}


def _gguf_stack(side: str) -> dict[str, Stored]:
    short, ours = side[:3], f"{side}/blocks/"
    block = f"{short}.blk.{{L}}."
    return {
        f"{side}/relative/bias": Stored(f"{short}.blk.0.attn_rel_b.weight", "N H -> N H"),
        f"{ours}attn_norm/scale": Stored(f"{block}attn_norm.weight", "D -> D"),
        **_gguf_attention(f"{ours}attn", f"{block}attn"),
        f"{ours}mlp_norm/scale": Stored(f"{block}ffn_norm.weight", "D -> D"),
        f"{ours}mlp/gate": Stored(f"{block}ffn_gate.weight", "F D -> D F"),
        f"{ours}mlp/up": Stored(f"{block}ffn_up.weight", "F D -> D F"),
        f"{ours}mlp/down": Stored(f"{block}ffn_down.weight", "D F -> F D"),
        f"{side}/final_norm/scale": Stored(f"{short}.output_norm.weight", "D -> D"),
    }


T5 = Family(
    name="t5",
    formats={
        "huggingface": Format(
            schema=Composite(
                family_key="model_type",
                sides={"encoder": _ENCODER, "decoder": _DECODER},
                make=EncoderDecoderConfig,
                written={
                    "model_type": "t5",
                    "architectures": ["T5ForConditionalGeneration"],
                    "is_encoder_decoder": True,
                    "decoder_start_token_id": 0,
                },
            ),
            rows={
                "embed/tokens": Stored("shared.weight", "V D -> V D"),
                "unembed/kernel": Stored("lm_head.weight", "V D -> V D"),
                **_stack("encoder", 1),
                **_stack("decoder", 2),
                "decoder/blocks/cross_norm/scale": Stored(
                    "decoder.block.{L}.layer.1.layer_norm.weight", "D -> D"
                ),
                **_attention("decoder/blocks/cross", "decoder.block.{L}.layer.1.EncDecAttention"),
            },
            # Of files made before the reference dropped it: it was never used.
            ignored=(
                r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
            ),
            copies={
                "encoder.embed_tokens.weight": "embed/tokens",
                "decoder.embed_tokens.weight": "embed/tokens",
                "lm_head.weight": "embed/tokens",
            },
            varied=_plain_mlp,
        ),
        "gguf": Format(
            schema=_GGUF_SCHEMA,
            rows={
                "embed/tokens": Stored(_TOKENS, "V D -> V D"),
                "unembed/kernel": Stored(_OUTPUT, "V D -> V D"),
                **_gguf_stack("encoder"),
                **_gguf_stack("decoder"),
                "decoder/blocks/cross_norm/scale": Stored(
                    "dec.blk.{L}.cross_attn_norm.weight", "D -> D"
                ),
                **_gguf_attention("decoder/blocks/cross", "dec.blk.{L}.cross_attn"),
            },
            ignored=(r"dec\.blk\.0\.cross_attn_rel_b\.weight",),
            refused={
                f"{side}.blk.1.attn_rel_b.weight": (
                    "a bias of relative positions in every layer, as umT5 has, is not supported"
                )
                for side in ("enc", "dec")
            },
            copies={_OUTPUT: "embed/tokens"},
        ),
    },
)
