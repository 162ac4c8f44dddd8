"""Encoder-decoders: two stacks of different depth, sources of 500 tokens."""

from __future__ import annotations

from typing import Any

from family_reference.case import Case, Stack

_TARGET = 120


def _t5(name: str, gain: float, further: dict[str, Any] | None = None, **settings: Any) -> Case:
    # Five heads of size 8 in a width of 36. Unscaled logits need no gain to be sharp.
    shape = {"vocab_size": 97, "d_model": 36, "d_kv": 8, "num_heads": 5, "d_ff": 52}
    shape |= {"num_layers": 3, "num_decoder_layers": 2, "relative_attention_num_buckets": 16}
    shape |= {"relative_attention_max_distance": 60, "decoder_start_token_id": 0}
    shape |= {"layer_norm_epsilon": 2e-3}
    attention = {"attention": "layer.0.SelfAttention", "o": "layer.0.SelfAttention.o"}
    encoder = Stack(
        "encoder.block",
        "input:layer.1",
        **attention,
        final="encoder.final_layer_norm",
        prefix="encoder.",
        side="right",
    )
    decoder = Stack(
        "decoder.block",
        "input:layer.2",
        **attention,
        final="decoder.final_layer_norm",
        cross="layer.1.EncDecAttention",
        cross_o="layer.1.EncDecAttention.o",
        cross_pre="input:layer.1",
        side="right",
        length=_TARGET,
    )
    return Case(
        name,
        "T5ForConditionalGeneration",
        "T5Config",
        shape | settings,
        (encoder, decoder),
        draw={"gain": gain},
        **further or {},
    )


def _bart(name: str, gain: float, **settings: Any) -> Case:
    shape = {"vocab_size": 97, "d_model": 36, "max_position_embeddings": 512}
    shape |= {"encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 52}
    shape |= {"decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 44}
    encoder = Stack(
        "model.encoder.layers",
        "output:self_attn_layer_norm",
        o="self_attn.out_proj",
        prefix="encoder.",
        side="right",
    )
    decoder = Stack(
        "model.decoder.layers",
        "output:encoder_attn_layer_norm",
        o="self_attn.out_proj",
        cross="encoder_attn",
        cross_o="encoder_attn.out_proj",
        cross_pre="output:self_attn_layer_norm",
        side="right",
        length=_TARGET,
    )
    return Case(
        name,
        "BartForConditionalGeneration",
        "BartConfig",
        shape | settings,
        (encoder, decoder),
        draw={"gain": gain},
    )


PAIRS = (
    _t5("t5", 1.2),
    # T5 1.1 has an unembedding of its own, which transformers reads but never makes.
    _t5(
        "t5_gated",
        1.15,
        {"tensors": {"lm_head.weight": (97, 36)}, "written": {"tie_word_embeddings": False}},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    _bart("bart", 2.1),
    _bart("bart_scaled", 2.4, scale_embedding=True, activation_function="relu"),
)
