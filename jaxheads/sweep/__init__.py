"""Many edits at once: sweeps, attribution and paths, as compiled programs."""

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
from jaxheads.sweep.sweep import ablate_heads, sweep

__all__ = [
    "AnswerLoss",
    "Divergence",
    "LogitDifference",
    "Metric",
    "NamedArray",
    "Probability",
    "Rank",
    "TokenLoss",
    "ablate_heads",
    "patch",
    "sweep",
]
