"""`HeadKinds`: which key/value heads keep the whole context, by what they score."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxheads.model.config import ModelConfig
from jaxheads.names import choose

PREFILLS = ("streaming", "dense")


@dataclass(frozen=True, eq=False)
class HeadKinds:
    """Full and streaming key/value heads, and what streaming ones keep.

    Attributes:
      full: bool [L,K], heads that keep the whole context; the others stream.
      sinks: first tokens that a streaming head keeps.
      recent: last tokens that it keeps, the one that attends among them.
      compensate: whether what it drops stays as one token (RazorAttention).
      bits: 8 stores keys and values as int8 with a scale for each token of a head; None in the
        dtype of the activations.
      prefill: "streaming", heads see the same tokens in prefill as in decoding; "dense", in
        prefill they also see all tokens of the pass that reads the prompt, as DuoAttention and
        kvpress do: better, and it depends on how a prompt is cut into passes.

    Raises:
      ValueError: another shape, numbers of tokens below their least, other bits or prefill.
    """

    full: np.ndarray
    sinks: int = 4
    recent: int = 256
    compensate: bool = False
    bits: int | None = None
    prefill: str = "streaming"

    def __post_init__(self) -> None:
        full = np.asarray(self.full)
        if full.ndim != 2 or full.dtype != bool:
            raise ValueError(f"full must be bool [L,K], got {full.dtype} {list(full.shape)}")
        object.__setattr__(self, "full", full)
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1, got {self.recent}")
        if self.bits not in (None, 8):
            raise ValueError(f"bits must be 8 or None, got {self.bits}")
        choose("prefill", self.prefill, PREFILLS)

    @classmethod
    def all_full(cls, config: ModelConfig, **options: Any) -> HeadKinds:
        """Every head keeps the whole context."""
        return cls(np.ones((config.n_layers, config.n_kv_heads), bool), **options)

    @classmethod
    def all_streaming(cls, config: ModelConfig, **options: Any) -> HeadKinds:
        """StreamingLLM: no head keeps the whole context (Xiao et al. 2023)."""
        return cls(np.zeros((config.n_layers, config.n_kv_heads), bool), **options)

    def keeping(
        self,
        scores: np.ndarray,
        *,
        heads: int | float | None = None,
        budget: float | None = None,
        length: int | None = None,
    ) -> HeadKinds:
        """The same options, with the heads of the highest scores full.

        Args:
          scores: [L,K], how much each head needs the whole context; ties to the earlier head.
          heads: how many heads are full; or their share of all, a float in [0, 1].
          budget: share of the tokens of a full cache that may be kept, at `length` tokens; as many
            heads are full as it allows. Give this or `heads`.
          length: tokens of a context, for `budget`.

        Raises:
          ValueError: scores of another shape or NaN, both or neither of heads and budget, a number
            out of range, a budget that is less than all heads streaming need.
        """
        scores = np.asarray(scores, np.float64)
        if scores.shape != self.full.shape or np.isnan(scores).any():
            raise ValueError(
                f"scores must be {list(self.full.shape)} without NaN, got {list(scores.shape)}"
            )
        if (heads is None) == (budget is None):
            raise ValueError(f"give one of heads and budget, got {heads} and {budget}")
        if heads is not None:
            count = _counted(heads, scores.size)
        else:
            assert budget is not None
            count = self._allowed(budget, length)
        full = np.zeros(scores.size, bool)
        full[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
        return dataclasses.replace(self, full=full.reshape(scores.shape))

    def share(self, length: int) -> float:
        """Tokens kept at a context of `length`, over those of a full cache."""
        streaming = min(self.sinks + self.recent, length) / length
        return float(np.where(self.full, 1.0, streaming).mean())

    def _allowed(self, budget: float, length: int | None) -> int:
        """How many heads can be full."""
        if length is None or length < 1:
            raise ValueError(f"a budget needs the length of a context in tokens, got {length}")
        if not 0 < budget <= 1:
            raise ValueError(f"budget must lie in (0, 1], got {budget}")
        kept = min(self.sinks + self.recent, length) / length
        if kept > budget:
            raise ValueError(
                f"budget {budget:g} of {length} tokens is {budget * length:g} a head, less than "
                f"the {self.sinks} sinks and {self.recent} recent tokens of streaming heads"
            )
        share = 1.0 if kept == 1 else (budget - kept) / (1 - kept)
        return int(share * self.full.size + 1e-9)


def _counted(heads: int | float, total: int) -> int:
    if isinstance(heads, float):
        if not 0 <= heads <= 1:
            raise ValueError(f"a share of heads must lie in [0, 1], got {heads}")
        return int(heads * total + 0.5)
    if not 0 <= heads <= total:
        raise ValueError(f"heads must lie in 0..{total}, got {heads}")
    return int(heads)
