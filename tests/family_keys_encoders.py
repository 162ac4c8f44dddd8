"""Keys of bert, roberta, distilbert, modernbert, vit, deit and dinov2; see family_keys.py."""

from __future__ import annotations

from typing import Any

from jaxheads.model.rotary import Rope

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
OTHER_VALUES: dict[str, dict[str, Any]] = {
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
REFUSED: list[tuple[str, dict[str, Any], str]] = [
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

SAME: list[tuple[str, dict[str, Any]]] = [
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

WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("modernbert", {"head": "none", "windows": (), "ropes": (Rope(5e4),) * 4}),
    ("modernbert", {"head": "none", "windows": (9, 9, 9, 9), "ropes": (Rope(7.0),) * 4}),
    ("vit_backbone", {"pooler": False, "qkv_bias": True, "activation": "relu"}),
    ("dinov2", {"d_mlp": 100, "activation": "relu"}),
    ("dinov2_swiglu", {"d_mlp": 56}),
]
