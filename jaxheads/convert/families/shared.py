"""What the tables of several families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxheads.convert.schema import Key, Part, Source
from jaxheads.model.config import ModelConfig, is_of_type

Default = Callable[[Source], Any]

FULL, SLIDING = "full_attention", "sliding_attention"
"""Hugging Face's names of layers without and with a window."""

ACTIVATION_NAMES: Mapping[str, str] = {
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
"""Hugging Face's names of activations; the last of several is the one that is written."""

HF_IGNORED = (
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype"),
    *("use_cache", "initializer_range", "initializer_factor"),
    *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "classifier_dropout"),
    *("activation_dropout", "embed_dropout", "embedding_dropout", "mlp_dropout", "dropout_rate"),
    *("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "init_std"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"),
    *("decoder_start_token_id", "mask_token_id", "tokenizer_class", "transformers.js_config"),
    *("_attn_implementation*", "attn_implementation", "_flash_attn_2_enabled"),
    *("return_dict", "output_hidden_states", "output_attentions", "torchscript"),
    *("use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "tie_encoder_decoder"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("task_specific_params", "prefix", "gradient_checkpointing", "unsloth_*"),
    # Settings of generation, which older versions wrote next to the model's.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
    *("num_beam_groups", "diversity_penalty", "top_k", "top_p", "typical_p"),
    *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    "begin_suppress_tokens",
)
"""Keys of Hugging Face configs that cannot change what a model computes."""

HF_FIXED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "pruned_heads": ({},),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
}
"""Keys of Hugging Face configs that change it, and the values that do not."""


def absent_means(value: Any) -> Default:
    """The default of a key: `value`."""
    return lambda source: value


def same_as(key: str) -> Default:
    """The default of a key: the value of another."""
    return lambda source: source.config[key]


def width_per_head(width: str, heads: str) -> Default:
    """The default of a key: one of the others divided by another."""
    return lambda source: source.config[width] // source.config[heads]


def has(tensor: str) -> Default:
    """Whether the file has a tensor whose name ends like this."""
    return lambda source: any(name.endswith(tensor) for name in source.shapes)


def activation_key(name: str, default: str | None = None) -> Key:
    """The key that names the activation."""
    known = None if default is None else absent_means(default)
    return Key(name, ("activation",), default=known, values=ACTIVATION_NAMES)


def windows_part(
    read: Callable[[Mapping[str, Any], int], tuple[int, ...]],
    write: Callable[[ModelConfig], dict[str, Any]],
    *keys: str,
) -> Part:
    """A part that sets `windows` from (keys, number of layers)."""
    return Part(
        keys=keys,
        read=lambda raw, fields: {"windows": normal_windows(read(raw, fields["n_layers"]))},
        write=write,
    )


def normal_windows(windows: tuple[int, ...]) -> tuple[int, ...]:
    """() where no layer has a window."""
    return windows if any(windows) else ()


def layer_windows(
    raw: Mapping[str, Any], n_layers: int, slides: Callable[[int], bool]
) -> tuple[int, ...]:
    """Windows that Hugging Face's `layer_types` and `sliding_window` describe.

    Args:
      raw: keys of the file.
      n_layers: L.
      slides: whether the layer of that index has a window, where the file has no list.

    Raises:
      ValueError: a list of the wrong length or with an unknown kind of layer, or a window
        that is needed and missing.
    """
    kinds = raw.get("layer_types") or [SLIDING if slides(i) else FULL for i in range(n_layers)]
    if len(kinds) != n_layers or not set(kinds) <= {FULL, SLIDING}:
        raise ValueError(f"layer_types must be {n_layers} times {FULL} or {SLIDING}, got {kinds!r}")
    size = raw.get("sliding_window", 0)
    if SLIDING in kinds and (not is_of_type(size, int) or size < 1):
        raise ValueError(f"sliding_window must be positive where layers are {SLIDING}, got {size}")
    return tuple(size if kind == SLIDING else 0 for kind in kinds)


def optional_windows(
    raw: Mapping[str, Any], n_layers: int, slides: Callable[[int], bool]
) -> tuple[int, ...]:
    """`layer_windows` where `use_sliding_window` says whether there are any; the default is no.

    Files carry `sliding_window` along even where nothing uses it.
    """
    if raw.get("use_sliding_window", False):
        return layer_windows(raw, n_layers, lambda i: "sliding_window" in raw and slides(i))
    if SLIDING in raw.get("layer_types", ()):
        raise ValueError(f"layer_types has {SLIDING}, but use_sliding_window is not true")
    return layer_windows(raw, n_layers, lambda i: False)


def write_layer_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `layer_windows`.

    Raises:
      ValueError: windows of several sizes.
    """
    windows = config.windows or (0,) * config.n_layers
    sizes = {window for window in windows if window}
    if len(sizes) > 1:
        raise ValueError(f"this format has one window size, the config has {config.windows}")
    return {
        "layer_types": [SLIDING if window else FULL for window in windows],
        "sliding_window": next(iter(sizes), None),
    }


def head_part(with_head: str, bare: str) -> Part:
    """The part that tells a language model from the model without a head by its class."""

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"head": "none" if raw.get("architectures") == [bare] else "lm"}

    def write(config: ModelConfig) -> dict[str, Any]:
        return {"architectures": [bare if config.head == "none" else with_head]}

    return Part(("architectures",), read, write)


def even_heads_part() -> Part:
    """The part of a family with as many key/value heads as heads, which split `d_model`."""

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        width, heads = fields["d_model"], fields["n_heads"]
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} is not split evenly by {heads} heads")
        return {"n_kv_heads": heads, "head_dim": width // heads}

    return Part((), read, lambda config: {})


def learned_positions_part(offset: int = 0) -> Part:
    """The part of a family with a learned row for each token of its context, after `offset`."""

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"n_positions": fields["context_length"] + offset, "position_offset": offset}

    return Part((), read, lambda config: {})
