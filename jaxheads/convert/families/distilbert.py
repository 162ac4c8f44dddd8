"""DistilBERT (Sanh et al. 2019): BERT without token types and without a pooler."""

from __future__ import annotations

from jaxheads.convert.families.bert import BERT_CONSTANTS, OLD_NORMS
from jaxheads.convert.families.encoder import class_part
from jaxheads.convert.families.rows import block_rows, dense_rows, norm_rows
from jaxheads.convert.families.shared import (
    HF_FIXED,
    HF_IGNORED,
    absent_means,
    activation_key,
    even_heads_part,
    learned_positions_part,
)
from jaxheads.convert.schema import Key, Schema, Source
from jaxheads.convert.table import Family, Format, Stored

_BLOCK = {
    "attn/q": "attention.q_lin",
    "attn/k": "attention.k_lin",
    "attn/v": "attention.v_lin",
    "attn/o": "attention.out_lin",
    "attn_norm": "sa_layer_norm",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_EMBEDDINGS = "distilbert.embeddings."
_CLASSIFIER = "a classifier of sentences or tokens, which is not supported"


def _head(source: Source) -> str:
    return "mlm" if "vocab_transform.weight" in source.shapes else "none"


DISTILBERT = Family(
    name="distilbert",
    formats={
        "huggingface": Format(
            schema=Schema(
                family_key="model_type",
                used=(
                    Key("n_layers", ("n_layers",), spellings=("num_hidden_layers",)),
                    Key("n_heads", ("n_heads",), spellings=("num_attention_heads",)),
                    Key("dim", ("d_model",), spellings=("hidden_size",)),
                    Key("hidden_dim", ("d_mlp",)),
                    Key("vocab_size", ("vocab_size",)),
                    Key("max_position_embeddings", ("context_length",), default=absent_means(512)),
                    activation_key("activation", "gelu"),
                ),
                parts=(
                    even_heads_part(),
                    learned_positions_part(),
                    class_part({"mlm": "DistilBertForMaskedLM", "none": "DistilBertModel"}),
                ),
                constants={**BERT_CONSTANTS, "family": "distilbert", "norm_eps": 1e-12},
                inferred={"head": _head},
                fixed={**HF_FIXED, "tie_word_embeddings": (True,), "tie_weights_": (True,)},
                # Sinusoids are what the stored positions are filled with before training.
                ignored=(
                    *HF_IGNORED,
                    *("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "output_past"),
                ),
                written={"model_type": "distilbert"},
            ),
            rows={
                "embed/tokens": Stored(f"{_EMBEDDINGS}word_embeddings.weight", "V D -> V D"),
                "embed/positions": Stored(f"{_EMBEDDINGS}position_embeddings.weight", "P D -> P D"),
                **norm_rows("embed/norm", f"{_EMBEDDINGS}LayerNorm"),
                **block_rows("distilbert.transformer.layer.{L}.", _BLOCK),
                **dense_rows("head/dense", "head/dense_bias", "vocab_transform"),
                **norm_rows("head/norm", "vocab_layer_norm"),
                "unembed/bias": Stored("vocab_projector.bias", "V -> V"),
            },
            ignored=(r"(distilbert\.)?embeddings\.position_ids",),
            refused={
                "pre_classifier.weight": _CLASSIFIER,
                "classifier.weight": _CLASSIFIER,
                "qa_outputs.weight": "a head that answers questions, which is not supported",
            },
            copies={"vocab_projector.weight": "embed/tokens"},
            spellings=(("distilbert.", ""), *OLD_NORMS),
        )
    },
)
