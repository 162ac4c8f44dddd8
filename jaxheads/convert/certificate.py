"""The rows of a certificate: how far what a model computes is from what it should.

An error is relative: the norm of a difference along the last axis against the norm of the
reference there, so that each token counts at its own scale.

Axes: L layers, B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

Values = Mapping[str, Any]

TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2}
"""Dtype -> largest accepted error of a value."""

KL_TOLERANCE: Mapping[str, float] = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 0.05}
"""Dtype -> largest accepted KL divergence, nats per token."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      check: what was compared with what.
      value: the site, or output, that was compared.
      tokens: real tokens (patches, for images) at which it was.
      max_error: largest error of a token in a layer.
      mean_error: mean of them.
      tolerance: largest accepted `max_error`.
      kl: for logits, KL(reference || found) in nats, mean over tokens.
      kl_tolerance: largest accepted `kl`.
      top1: for logits, share of tokens whose likeliest entry is the same.
    """

    check: str
    value: str
    tokens: int
    max_error: float
    mean_error: float
    tolerance: float
    kl: float | None = None
    kl_tolerance: float | None = None
    top1: float | None = None

    @property
    def passed(self) -> bool:
        """Whether everything is within its tolerance; NaN is not."""
        close = self.max_error <= self.tolerance
        if self.kl is None or self.kl_tolerance is None:
            return close
        return close and self.kl <= self.kl_tolerance

    def to_dict(self) -> dict[str, Any]:
        """The fields and `passed`, as values that JSON can hold: NaN as text."""
        fields = asdict(self) | {"passed": self.passed}
        return {name: _finite(value) for name, value in fields.items()}


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    check: str, reference: Values, found: Values, dtype: str, mask: np.ndarray | None = None
) -> Iterator[Row]:
    """One row for each value that both have.

    Args:
      check: what is compared.
      reference: name -> [L,B,T,D], [B,T,D] or [B,D].
      found: the same, of the model.
      dtype: of the model's activations, which sets the tolerances.
      mask: bool [B,T], True at tokens that count; None for all.
    """
    for name in [name for name in reference if name in found]:
        errors, divergences, same = [], [], []
        expected, actual = (np.asarray(values[name]) for values in (reference, found))
        if actual.shape != expected.shape:
            raise ValueError(f"{check}: {name} is {actual.shape}, expected {expected.shape}")
        stacked = expected.ndim == 4
        layers = zip(expected, actual, strict=True) if stacked else [(expected, actual)]
        for one, other in layers:
            one, other = _real(one, mask), _real(other, mask)
            errors.append(_relative(one, other))
            if name.endswith("logits"):
                divergences.append(_divergence(one, other))
                same.append(one.argmax(-1) == other.argmax(-1))
        every = np.concatenate(errors)
        row = Row(
            check,
            name,
            len(errors[0]),
            float(every.max()),
            float(every.mean()),
            TOLERANCE[dtype],
        )
        if divergences:
            kl, top1 = float(np.concatenate(divergences).mean()), float(np.concatenate(same).mean())
            row = replace(row, kl=kl, kl_tolerance=KL_TOLERANCE[dtype], top1=top1)
        yield row


def _real(value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """[B,T,D] or [B,D] -> [N,D], the tokens that count."""
    if value.ndim == 3 and mask is not None and value.shape[:2] == mask.shape:
        return value[mask]
    return value.reshape(-1, value.shape[-1])


def _relative(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[N,D] twice -> [N]."""
    wide = reference.astype(np.float64)
    size = np.maximum(np.linalg.norm(wide, axis=-1), np.finfo(np.float32).tiny)
    return np.linalg.norm(found - wide, axis=-1) / size


def _divergence(reference: np.ndarray, found: np.ndarray, rows: int = 64) -> np.ndarray:
    """KL(reference || found) in nats: logits [N,V] twice -> [N]; some rows at a time."""
    out = []
    for start in range(0, len(reference), rows):
        log_p, log_q = (
            _log_softmax(logits[start : start + rows].astype(np.float64))
            for logits in (reference, found)
        )
        out.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    return np.concatenate(out)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
