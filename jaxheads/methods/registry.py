"""Methods that train, by the names that configs use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxheads.names import choose

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "bigram": "bigram.BigramMasks",
        "denoiser": "denoiser.Denoiser",
        "draft_heads": "draft_heads.DraftTraining",
        "duo_attention": "duo_attention.DuoAttention",
        "fine_tuning": "fine_tuning.FineTuning",
        "from_scratch": "from_scratch.FromScratch",
        "head_gating": "head_gating.HeadGating",
        "image_classes": "image_classes.ImageClasses",
        "iti": "iti.ITI",
        "lofit": "lofit.Lofit",
        "lora": "lora.Lora",
        "moh": "moh.Moh",
        "moh_from_scratch": "moh_from_scratch.MohFromScratch",
        "precise_heads": "precise_heads.PreciseHeads",
        "soft_injection": "soft_injection.SoftInjection",
        "union_of_experts": "union_of_experts.UnionOfExperts",
    }
)
"""Name -> file of this folder and the dataclass of settings in it."""


def find_method(name: str) -> type[Any]:
    """The settings of a method, a dataclass with a function `train`.

    Raises:
      ValueError: there is no such method; the nearest is named.
    """
    module, kind = METHODS[choose("method", name, METHODS)].split(".")
    found: type[Any] = getattr(importlib.import_module(f"jaxheads.methods.{module}"), kind)
    return found


def name_of(method: Any) -> str:
    """The name of a method by its settings."""
    kind = type(method)
    path = f"{kind.__module__.removeprefix('jaxheads.methods.')}.{kind.__name__}"
    return next(name for name, place in METHODS.items() if place == path)
