"""Text encoders, with and without their masked-LM heads, padded on the right."""

from __future__ import annotations

from typing import Any

from family_reference.case import Case, Stack

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
# Norms after every sum leave less in the stream for attention to tell tokens apart by.
_SHARPER = {"gain": 2.0}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def _bert(path: str) -> Stack:
    return Stack(
        f"{path}encoder.layer",
        "output:attention.output",
        attention="attention.self",
        o="attention.output.dense",
        side="right",
    )


_DISTIL = Stack(
    "distilbert.transformer.layer",
    "output:sa_layer_norm",
    attention="attention",
    o="attention.out_lin",
    side="right",
)
_MODERN = Stack(
    "model.layers",
    "input:mlp_norm",
    attention="attn",
    o="attn.Wo",
    final="model.final_norm",
    side="right",
)


def _modern(name: str, **settings: Any) -> Case:
    shape = _SHAPE | _IDS | {"num_hidden_layers": 4, "num_attention_heads": 3}
    shape |= {"local_attention": 64, "norm_eps": 2e-3}
    return Case(
        name, "ModernBertForMaskedLM", "ModernBertConfig", shape | settings, (_MODERN,), window=64
    )


ENCODERS = (
    Case("bert", "BertForMaskedLM", "BertConfig", _SHAPE, (_bert("bert."),), draw=_SHARPER),
    Case(
        "bert_backbone",
        "BertModel",
        "BertConfig",
        _SHAPE | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        (_bert(""),),
        draw={"gain": 2.4},
        outputs={"pooled": "pooler"},
    ),
    Case(
        "roberta",
        "RobertaForMaskedLM",
        "RobertaConfig",
        _SHAPE
        | {"max_position_embeddings": 514, "pad_token_id": 1, "type_vocab_size": 1}
        | {"layer_norm_eps": 2e-3, "bos_token_id": 0, "eos_token_id": 2},
        (_bert("roberta."),),
        draw=_SHARPER,
    ),
    Case(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": 97, "dim": 36, "hidden_dim": 52, "n_layers": 3, "n_heads": 4},
        (_DISTIL,),
        draw=_SHARPER,
    ),
    _modern("modernbert"),
    _modern(
        "modernbert_biases",
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        decoder_bias=False,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 40_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        },
    ),
)
