"""Hugging Face's settings of rotary encodings, old and new spelling, in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxheads.convert.schema import Part
from jaxheads.model.config import ModelConfig
from jaxheads.model.rotary import Linear, Llama3, LongRope, Rope, Scaling, Yarn

ROPE_KEYS = (
    *("rope_theta", "rope_scaling", "rope_scaling.*", "rope_parameters", "rope_parameters.*"),
    *("partial_rotary_factor", "rotary_pct", "rotary_emb_base", "original_max_position_embeddings"),
)
"""Keys that `rope_part` reads."""

WHOLE_HEADS_ROTATE: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0,),
    "rope_scaling.partial_rotary_factor": (1.0,),
    "rope_parameters.partial_rotary_factor": (1.0,),
}
"""Fixed keys of families whose reference does not follow a share of a head that rotates."""

_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        *("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
        "attention_factor",
    ),
}
_OTHER_NAMES = {"su": "longrope"}


def rope_part(theta: float = 10_000.0, partial: float = 1.0) -> Part:
    """The part of a family whose layers all rotate alike: `ropes` and `rotary_dim`.

    Args:
      theta: base where the file names none.
      partial: share of a head that rotates where the file names none.
    """

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        settings = rope_settings(raw)
        share = settings.pop("partial_rotary_factor", partial)
        size = int(fields["head_dim"] * share)
        rope = read_rope(settings, theta, fields["context_length"])
        return {"ropes": (rope,), "rotary_dim": None if size == fields["head_dim"] else size}

    def write(config: ModelConfig) -> dict[str, Any]:
        ropes = set(config.ropes)
        rope = next(iter(ropes))
        if len(ropes) > 1 or rope is None:
            raise ValueError(f"this format has one rotary encoding, the config has {config.ropes}")
        keys = write_rope(rope)
        if config.rotary_dim is not None or partial != 1:
            keys["partial_rotary_factor"] = config.rotated_dim / config.head_dim
        return keys

    return Part(ROPE_KEYS, read, write)


def rope_settings(raw: Mapping[str, Any], layer_type: str = "") -> dict[str, Any]:
    """One mapping of the settings that a file spreads over several spellings.

    Args:
      raw: keys of the file; nested ones joined with dots.
      layer_type: of which kind of layer, where a file has settings for several.

    Raises:
      ValueError: two spellings that disagree.
    """
    inner = f"{layer_type}." if layer_type else ""
    flat = {
        "rope_theta": ("rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
        "original_max_position_embeddings": ("original_max_position_embeddings",),
    }
    found: dict[str, tuple[str, Any]] = {}

    def add(setting: str, key: str, value: Any) -> None:
        if found.get(setting, (key, value))[1] != value:
            other, before = found[setting]
            raise ValueError(f"{other} = {before!r} disagrees with {key} = {value!r}")
        found[setting] = (key, value)

    for setting, keys in flat.items():
        for key in keys:
            if key in raw:
                add(setting, key, raw[key])
    for group in ("rope_scaling", "rope_parameters"):
        for key, value in raw.items():
            if key.startswith(f"{group}.{inner}"):
                setting = key.removeprefix(f"{group}.{inner}")
                add("rope_type" if setting == "type" else setting, key, value)
    return {setting: value for setting, (_, value) in found.items()}


def read_rope(settings: Mapping[str, Any], theta: float, context_length: int) -> Rope:
    """The encoding that settings describe.

    Args:
      settings: as `rope_settings` returns them.
      theta: base where they name none.
      context_length: of the model, in tokens.

    Raises:
      ValueError: a kind of scaling that is not known, or a setting that is missing or
        unknown.
    """
    settings = dict(settings)
    base = float(settings.pop("rope_theta", theta))
    kind = settings.pop("rope_type", "default")
    kind = _OTHER_NAMES.get(kind, kind)
    if kind not in _KNOWN:
        raise ValueError(f"rope_type {kind!r} is not supported (known: {', '.join(_KNOWN)})")
    if kind == "default":
        # Some files keep the context of the first training without scaling anything.
        settings.pop("original_max_position_embeddings", None)
        if settings.get("factor", 1.0) == 1.0:
            settings.pop("factor", None)
    extra = [name for name in settings if name not in _KNOWN[kind]]
    if extra:
        raise ValueError(f"unknown settings of rope_type {kind!r}: {', '.join(extra)}")
    try:
        return Rope(base, _scaling(kind, settings, context_length))
    except KeyError as error:
        raise ValueError(f"rope_type {kind!r} lacks the setting {error}") from error


def _scaling(kind: str, settings: Mapping[str, Any], context_length: int) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(float(settings["factor"]))
    original = settings.get("original_max_position_embeddings", context_length)
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        original = settings["original_max_position_embeddings"]
        return Llama3(float(settings["factor"]), float(low), float(high), original)
    magnitude = settings.get("attention_factor")
    if kind == "yarn":
        factor = float(settings["factor"])
        if magnitude is None:
            scale, whole = settings.get("mscale"), settings.get("mscale_all_dim")
            magnitude = _hotter(factor, 1.0)
            if scale and whole:
                magnitude = _hotter(factor, scale) / _hotter(factor, whole)
        fast, slow = float(settings.get("beta_fast", 32)), float(settings.get("beta_slow", 1))
        truncate = bool(settings.get("truncate", True))
        return Yarn(factor, original, fast, slow, float(magnitude), truncate)
    factor = settings.get("factor", context_length / original)
    if magnitude is None:
        longer = factor > 1
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if longer else 1.0
    short, long = tuple(settings["short_factor"]), tuple(settings["long_factor"])
    return LongRope(short, long, original, float(magnitude))


def _hotter(factor: float, scale: float) -> float:
    """YaRN's magnitude, Peng et al. (2023), eq. 22."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def write_rope(rope: Rope) -> dict[str, Any]:
    """The keys `rope_theta` and `rope_scaling`, which every transformers version reads."""
    scaling, keys = rope.scaling, {"rope_theta": rope.base}
    if scaling is None:
        return keys
    original = {"original_max_position_embeddings": getattr(scaling, "original", None)}
    if isinstance(scaling, Linear):
        settings = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3):
        settings = {"rope_type": "llama3", "factor": scaling.factor} | original
        settings |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    elif isinstance(scaling, Yarn):
        settings = {"rope_type": "yarn", "factor": scaling.factor} | original
        settings |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        settings |= {"attention_factor": scaling.magnitude, "truncate": scaling.truncate}
    else:
        settings = {"rope_type": "longrope", "attention_factor": scaling.magnitude}
        settings |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        settings |= original
    return keys | {"rope_scaling": settings}


def gguf_rope_part(architecture: str) -> Part:
    """The part of a GGUF file whose layers all rotate alike: `ropes`.

    llama.cpp keeps Llama 3's scaling as a tensor rope_freqs.weight of what every frequency is
    divided by.
    """
    key = f"{architecture}.rope."

    def read(raw: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"ropes": (read_gguf_rope(raw, architecture, fields["context_length"]),)}

    def write(config: ModelConfig) -> dict[str, Any]:
        raise ValueError("GGUF files are read, not written")

    return Part(tuple(key + name for name in _GGUF_KEYS), read, write, (_GGUF_FACTORS,))


_GGUF_FACTORS = "rope_freqs.weight"
_GGUF_KEYS = (
    *("freq_base", "scaling.type", "scaling.factor", "scaling.attn_factor"),
    *("scaling.original_context_length", "scaling.finetuned"),
    *("scaling.yarn_beta_fast", "scaling.yarn_beta_slow"),
)


def read_gguf_rope(raw: Mapping[str, Any], architecture: str, context_length: int) -> Rope:
    """The encoding that a GGUF file describes.

    Args:
      raw: keys of the file, and the tensor of factors if it has one.
      architecture: llama.cpp's name, which the keys begin with.
      context_length: of the model, in tokens.

    Raises:
      ValueError: a kind of scaling that is not known.
    """
    key = f"{architecture}.rope."
    base = float(raw.get(key + "freq_base", 10_000.0))
    kind = raw.get(key + "scaling.type", "none")
    factor = float(raw.get(key + "scaling.factor", 1.0))
    if raw.get(key + "scaling.attn_factor", 1.0) != 1.0:
        raise ValueError(f"{key}scaling.attn_factor is not supported (only 1.0)")
    plain = kind == "none" and factor == 1.0
    if _GGUF_FACTORS in raw:
        if not plain:
            raise ValueError(f"{_GGUF_FACTORS} with {key}scaling.type = {kind!r} is not supported")
        factors = tuple(float(value) for value in raw[_GGUF_FACTORS])
        return Rope(base, LongRope(factors, factors, context_length))
    if plain:
        return Rope(base)
    if kind == "linear":
        return Rope(base, Linear(factor))
    if kind == "yarn":
        original = raw.get(key + "scaling.original_context_length", context_length)
        fast = float(raw.get(key + "scaling.yarn_beta_fast", 32.0))
        slow = float(raw.get(key + "scaling.yarn_beta_slow", 1.0))
        return Rope(base, Yarn(factor, original, fast, slow, _hotter(factor, 1.0)))
    raise ValueError(f"{key}scaling.type = {kind!r} is not supported (none, linear or yarn)")
