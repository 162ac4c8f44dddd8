"""BERT (Devlin et al. 2019): a bidirectional encoder with a norm after every sum.

llama.cpp stores BERT, RoBERTa, XLM-RoBERTa and DistilBERT as one architecture, without pooler
and heads. RoBERTa's table of positions loses the rows that no token has, so what is left is a
BERT (its conversion/bert.py).
"""

from __future__ import annotations

from jaxheads.convert.families.encoder import ENCODER_CONSTANTS, class_part
from jaxheads.convert.families.llama_cpp import gguf_schema
from jaxheads.convert.families.rows import block_rows, dense_rows, norm_rows
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    has,
    learned_positions_part,
)
from jaxheads.convert.schema import Key, Schema, Source
from jaxheads.convert.table import Family, Format, Stored

BERT_CONSTANTS = {
    **ENCODER_CONSTANTS,
    "norm_place": "post",
    "embed_norm": True,
    "final_norm": False,
}

BERT_KEYS = (
    Key("num_hidden_layers", ("n_layers",)),
    Key("num_attention_heads", ("n_heads",)),
    Key("hidden_size", ("d_model",)),
    Key("intermediate_size", ("d_mlp",)),
    Key("vocab_size", ("vocab_size",)),
    Key("type_vocab_size", ("n_token_types",), default=absent_means(2)),
    Key("layer_norm_eps", ("norm_eps",), default=absent_means(1e-12)),
    activation_key("hidden_act", "gelu"),
)

BERT_FIXED = {
    **HF_FIXED,
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
}

BERT_REFUSED = {
    "classifier.weight": "a classifier of sentences or tokens, which is not supported",
    "qa_outputs.weight": "a head that answers questions, which is not supported",
}

OLD_NORMS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
"""How files of the first years spell what a norm holds."""

_BLOCK = {
    "attn/q": "attention.self.query",
    "attn/k": "attention.self.key",
    "attn/v": "attention.self.value",
    "attn/o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}

_GGUF_BLOCK = {
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "attn_norm": "attn_output_norm",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "mlp_norm": "layer_output_norm",
}
_TYPES = "token_types.weight"


def body_rows(prefix: str) -> dict[str, Stored]:
    """Rows of everything but the head."""
    embeddings = f"{prefix}embeddings."
    return {
        "embed/tokens": Stored(f"{embeddings}word_embeddings.weight", "V D -> V D"),
        "embed/positions": Stored(f"{embeddings}position_embeddings.weight", "P D -> P D"),
        "embed/types": Stored(f"{embeddings}token_type_embeddings.weight", "Y D -> Y D"),
        **norm_rows("embed/norm", f"{embeddings}LayerNorm"),
        **block_rows(f"{prefix}encoder.layer.{{L}}.", _BLOCK),
        **dense_rows("pooler/kernel", "pooler/bias", f"{prefix}pooler.dense"),
    }


def _head(source: Source) -> str:
    return "mlm" if "cls.predictions.transform.dense.weight" in source.shapes else "none"


def _gguf_types(source: Source) -> int:
    return source.shapes[_TYPES][0] if _TYPES in source.shapes else 0


_GGUF_SCHEMA = gguf_schema(
    "bert",
    "bert",
    parts=(learned_positions_part(),),
    # No key names the activation: it is the one that the published models have. (llama.cpp
    # itself computes the tanh approximation of it.)
    constants={**BERT_CONSTANTS, "activation": "gelu", "head": "none"},
    fixed={"attention.causal": (False,)},
    inferred={
        "n_token_types": _gguf_types,
        # Nothing else of a DistilBERT's file differs from a BERT's.
        "family": lambda source: "bert" if _TYPES in source.shapes else "distilbert",
    },
    # Files have it for models without a classifier too.
    ignored=("classifier.output_labels",),
)

BERT = Family(
    name="bert",
    formats={
        "huggingface": Format(
            schema=Schema(
                family_key="model_type",
                used=(*BERT_KEYS, Key("max_position_embeddings", ("context_length",))),
                parts=(
                    even_heads_part(),
                    learned_positions_part(),
                    class_part({"mlm": "BertForMaskedLM", "none": "BertModel"}),
                ),
                constants={**BERT_CONSTANTS, "family": "bert"},
                inferred={"head": _head, "pooler": has("pooler.dense.weight")},
                fixed=BERT_FIXED,
                # The pooler's settings were written by the first scripts and read by nothing.
                ignored=(*HF_IGNORED, "directionality", "pooler_*", "output_past"),
                written={"model_type": "bert"},
            ),
            rows={
                **body_rows("bert."),
                **dense_rows("head/dense", "head/dense_bias", "cls.predictions.transform.dense"),
                **norm_rows("head/norm", "cls.predictions.transform.LayerNorm"),
                "unembed/bias": Stored("cls.predictions.bias", "V -> V"),
            },
            ignored=(
                r"(bert\.)?embeddings\.(position|token_type)_ids",
                r"cls\.seq_relationship\.(weight|bias)",
            ),
            refused=BERT_REFUSED,
            copies={
                "cls.predictions.decoder.weight": "embed/tokens",
                "cls.predictions.decoder.bias": "unembed/bias",
            },
            spellings=(("bert.", ""), *OLD_NORMS),
        ),
        "gguf": Format(
            schema=_GGUF_SCHEMA,
            rows={
                "embed/tokens": Stored("token_embd.weight", "V D -> V D"),
                "embed/positions": Stored("position_embd.weight", "P D -> P D"),
                "embed/types": Stored(_TYPES, "Y D -> Y D"),
                **norm_rows("embed/norm", "token_embd_norm"),
                **block_rows("blk.{L}.", _GGUF_BLOCK),
            },
            refused={
                "cls.weight": BERT_REFUSED["classifier.weight"],
                "cls.output.weight": BERT_REFUSED["classifier.weight"],
            },
        ),
    },
)
