"""llama.cpp's keys: what its architectures have in common in a GGUF file.

Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py. What an
architecture does not say in its keys (Gemma's factor of the logits, which layers have a
window) is in llama.cpp's src/models/, one file each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxheads.convert.families.rope import gguf_rope_part
from jaxheads.convert.families.shared import has, same_as, width_per_head
from jaxheads.convert.schema import Key, Part, Schema, Source
from jaxheads.convert.table import Stored
from jaxheads.model.config import ModelConfig


def gguf_schema(
    architecture: str,
    family: str,
    *,
    parts: tuple[Part, ...] | None = None,
    used: tuple[Key, ...] = (),
    constants: Mapping[str, Any] | None = None,
    fixed: Mapping[str, tuple[Any, ...]] | None = None,
    inferred: Mapping[str, Callable[[Source], Any]] | None = None,
    ignored: tuple[str, ...] = (),
) -> Schema:
    """The policy of an architecture, by default with RMS norms and a gated MLP.

    Biases and the tied unembedding follow from the tensors.

    Args:
      architecture: llama.cpp's name, which its keys begin with.
      family: ours.
      parts: its groups of keys; default: all layers rotate alike.
      used: further keys, without the architecture. Fields that they set take the place of
        those that the common keys set.
      constants: fields that are the same in the whole family.
      fixed: further keys without the architecture, with the only values that are supported.
      inferred: further fields that follow from the tensors, or other ways to infer them.
      ignored: further keys without the architecture that do not change the computation.
    """
    key = f"{architecture}."
    rotary = "rope.dimension_count"
    # The converters of T5 and ModernBERT write both.
    epsilons = [f"attention.layer_norm_{kind}epsilon" for kind in ("rms_", "")]
    if (constants or {}).get("norm") == "layer":
        epsilons.reverse()
    keys = (
        Key("block_count", ("n_layers",)),
        Key("attention.head_count", ("n_heads",)),
        Key(
            "attention.head_count_kv",
            ("n_kv_heads",),
            default=same_as(key + "attention.head_count"),
        ),
        Key(
            "attention.key_length",
            ("head_dim",),
            spellings=(key + "attention.value_length",),
            default=width_per_head(key + "embedding_length", key + "attention.head_count"),
        ),
        Key("embedding_length", ("d_model",)),
        Key("feed_forward_length", ("d_mlp",)),
        Key("vocab_size", ("vocab_size",), default=_vocabulary),
        Key("context_length", ("context_length",)),
        Key(epsilons[0], ("norm_eps",), spellings=(key + epsilons[1],)),
        *used,
    )
    supported = {
        "attention.sliding_window": (0,),
        "expert_count": (0,),
        "expert_used_count": (0,),
        **(fixed or {}),
    }
    taken = {name.removeprefix(key) for part in parts or () for name in part.keys}
    return Schema(
        family_key="general.architecture",
        used=tuple(_prefixed(entry, key) for entry in keys),
        parts=(gguf_rope_part(architecture),) if parts is None else parts,
        constants={"family": family, "activation": "silu", **(constants or {})},
        inferred={
            "qkv_bias": lambda source: any(
                has(f"blk.0.attn_{name}.bias")(source) for name in ("q", "qkv")
            ),
            "o_bias": has("blk.0.attn_output.bias"),
            "mlp_bias": has("blk.0.ffn_down.bias"),
            "tied": lambda source: "output.weight" not in source.shapes,
            **(inferred or {}),
        },
        fixed={
            "split.count": (0, 1),
            **{key + name: values for name, values in supported.items() if name not in taken},
        },
        equal={} if rotary in taken else {key + rotary: "head_dim"},
        # How outputs are pooled is not up to the model here.
        ignored=(
            *("GGUF.*", "general.*", "tokenizer.*", "quantize.*"),
            *("split.no", "split.tensors.count", key + "pooling_type"),
            *(key + name for name in ignored),
        ),
    )


def gguf_layer_norm_block() -> dict[str, Stored]:
    """Rows of the blocks of GPT-2 and GPT-NeoX: layer norms, and q, k and v one after another."""
    block, joint = "blk.{L}.", ("H", "H", "H")
    rows = {
        "blocks/attn/o": Stored(block + "attn_output.weight", "D (H Dh) -> H Dh D"),
        "blocks/attn/o_bias": Stored(block + "attn_output.bias", "D -> D"),
        "blocks/mlp/up": Stored(block + "ffn_up.weight", "F D -> D F"),
        "blocks/mlp/up_bias": Stored(block + "ffn_up.bias", "F -> F"),
        "blocks/mlp/down": Stored(block + "ffn_down.weight", "D F -> F D"),
        "blocks/mlp/down_bias": Stored(block + "ffn_down.bias", "D -> D"),
    }
    for ours, theirs in (("attn_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
        rows[f"blocks/{ours}/scale"] = Stored(f"{block}{theirs}.weight", "D -> D")
        rows[f"blocks/{ours}/bias"] = Stored(f"{block}{theirs}.bias", "D -> D")
    for part, name in enumerate("qkv"):
        weight, bias = block + "attn_qkv.weight", block + "attn_qkv.bias"
        rows[f"blocks/attn/{name}"] = Stored(weight, "(J Dh) D -> D J Dh", joint, part)
        rows[f"blocks/attn/{name}_bias"] = Stored(bias, "(J Dh) -> J Dh", joint, part)
    return rows


def partial_rope_part(architecture: str) -> Part:
    """`gguf_rope_part` of an architecture that may rotate a part of each head: `rotary_dim`."""
    common, key = gguf_rope_part(architecture), f"{architecture}.rope.dimension_count"

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        whole = fields["head_dim"]
        size = raw.get(key, whole)
        return {**common.read(raw, fields), "rotary_dim": None if size == whole else size}

    return Part((*common.keys, key), read, common.write, common.tensors)


def periodic_windows(
    architecture: str, size: int | None, period: int, *, first: bool = False
) -> Callable[..., Any]:
    """A reader of windows: all layers but the last of each period have one.

    Args:
      architecture: llama.cpp's name.
      size: the window where the file names none; None for no windows then.
      period: the period where the file names none.
      first: whether the layer without a window is the first of each period instead.

    Returns:
      (keys of the file, number of layers) -> windows, one for each layer, 0 for none.
    """
    key = f"{architecture}.attention.sliding_window"

    def read(raw: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
        window = raw.get(key, size or 0)
        pattern = raw.get(key + "_pattern", period)
        if isinstance(pattern, list):
            if len(pattern) != n_layers:
                raise ValueError(f"{key}_pattern must have {n_layers} entries, got {pattern}")
            return tuple(window if slides else 0 for slides in pattern)
        # A period of 0 means windows everywhere.
        full = 0 if first else pattern - 1
        return tuple(window if pattern == 0 or i % pattern != full else 0 for i in range(n_layers))

    return read


def read_only(config: ModelConfig) -> dict[str, Any]:
    """The `write` of a part of a GGUF file."""
    raise ValueError("GGUF files are read, not written")


def _prefixed(entry: Key, prefix: str) -> Key:
    return Key(prefix + entry.name, entry.fields, entry.spellings, entry.default, entry.values)


def _vocabulary(source: Source) -> int:
    return source.shapes["token_embd.weight"][0]
