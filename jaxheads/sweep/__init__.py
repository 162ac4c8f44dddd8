"""Many edits at once: sweeps, attribution and paths, as compiled programs."""

from jaxheads.sweep.agreement import Agreement, agreement
from jaxheads.sweep.attribution import attribution_patching, head_importance, integrated_gradients
from jaxheads.sweep.direct import DirectEffects, direct_effects, effect_split
from jaxheads.sweep.metrics import (
    AnswerLoss,
    Divergence,
    LogitDifference,
    Metric,
    Probability,
    Rank,
    TokenLoss,
)
from jaxheads.sweep.named import NamedArray
from jaxheads.sweep.patching import patch
from jaxheads.sweep.paths import path_patch
from jaxheads.sweep.sweep import ablate_heads, sweep

__all__ = [
    "Agreement",
    "AnswerLoss",
    "DirectEffects",
    "Divergence",
    "LogitDifference",
    "Metric",
    "NamedArray",
    "Probability",
    "Rank",
    "TokenLoss",
    "ablate_heads",
    "agreement",
    "attribution_patching",
    "direct_effects",
    "effect_split",
    "head_importance",
    "integrated_gradients",
    "patch",
    "path_patch",
    "sweep",
]
