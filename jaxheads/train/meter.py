"""Speed: tokens per second, model FLOP/s utilisation, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import jax

from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import parameter_table
from jaxheads.names import choose

Trained = Literal["nothing", "edits", "parameters"]

# Multiply-adds of the backward pass per multiply-add of the forward one, in a product with a
# weight and in a product of two activations. With only edits trained there is no gradient of
# weights, but both factors of an attention product are activations.
_BACKWARD = {"nothing": (0, 0), "edits": (1, 2), "parameters": (2, 2)}

PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {
        # Google Cloud's pages of TPU versions, per chip: 46, 123, 275, 197, 459, 918, 2307
        # TFLOP/s. A device of v2, v3 and 7x is one of the two cores of a chip.
        "TPU v2": 23e12,
        "TPU v3": 61.5e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5e": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU v6 lite": 918e12,
        "TPU v6e": 918e12,
        "TPU7x": 1153.5e12,
        # NVIDIA's data sheets, without sparsity. A name stands for all that begin with it, such
        # as "NVIDIA H100 80GB HBM3"; the longest one counts.
        "NVIDIA A10G": 70e12,
        "NVIDIA A100": 312e12,
        "NVIDIA H100": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835.5e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA H200 NVL": 835.5e12,
        "NVIDIA GH200": 989.4e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L40S": 362e12,
    }
)
"""Peak FLOP/s of one device in bfloat16 (dense), by the beginning of its `device_kind`."""


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device in bfloat16, None where it is not known (a CPU, say)."""
    if device_kind.startswith("TPU"):  # "TPU v4 lite" is another chip than "TPU v4".
        return PEAK_FLOPS.get(device_kind)
    words = device_kind.split()
    if "MIG" in words:  # A slice of a GPU under the name of the whole one.
        return None
    names = (" ".join(words[:n]) for n in range(len(words), 0, -1))
    # Variants such as "A100-SXM4-80GB" hang on to the name by a hyphen.
    return next((PEAK_FLOPS[n] for name in names if (n := name.split("-")[0]) in PEAK_FLOPS), None)


def model_flops(
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    trained: Trained = "parameters",
    adapters: int = 0,
) -> float:
    """Floating point operations of a step that the mathematics needs, from shapes alone.

    A product with a weight of n numbers takes 2 n operations for each token; attention takes
    4 T H Dh for each token and layer, whatever the mask hides (PaLM, Chowdhery et al. 2022,
    appendix B, counts so, and so 6 N + 12 L H Dh T for training). Here N holds the unembedding,
    also a tied one, but no lookup. Norms, activations and edits are left out, and what
    rematerialisation repeats is not counted. The backward pass takes as much again for the
    gradient of the activations and, where parameters are trained, as much for theirs; both
    factors of the two products of attention are activations.

    Args:
      config: the model; a stack without cross-attention.
      rows: B, rows of the batch (all micro-batches together).
      length: T, tokens of a row, padding included.
      trained: "nothing" for a forward pass, "edits", or "parameters" for all of them.
      adapters: numbers in trained low-rank factors beside the weights (LoRA), which cost as
        trained parameters do; with trained="edits".

    Returns:
      FLOPs of one step over the whole batch.

    Raises:
      ValueError: an unknown value of `trained`, or a model with cross-attention.
    """
    if config.cross:
        raise ValueError("FLOPs of a model with cross-attention are not known from one length")
    of_weights, of_activations = _BACKWARD[choose("trained", trained, _BACKWARD)]
    each_token, each_row = _weights(config)
    tokens = rows * length
    weights = 2.0 * (each_token * tokens + each_row * rows)
    attention = 4.0 * config.n_layers * config.n_heads * config.head_dim * length * tokens
    lora = 2.0 * adapters * tokens
    return (1 + of_weights) * weights + (1 + of_activations) * attention + 3 * lora


def _weights(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the weights that multiply every token, and in those that multiply one of a row."""
    each_token = each_row = 0
    for path, parameter in parameter_table(config).items():
        size = 1
        for axis in parameter.shape:
            size *= axis
        room = path.split("/")[0]
        looked_up = room in ("embed", "relative") and path != "embed/patches"
        if not parameter.fan_in or looked_up:
            continue
        one = room in ("pooler", "projection") or (room == "unembed" and config.head == "classes")
        each_token, each_row = each_token + size * (not one), each_row + size * one
    if config.tied and config.head in ("lm", "mlm"):
        each_token += config.vocab_size * config.d_model
    return each_token, each_row


@dataclass(frozen=True)
class Speed:
    """How fast a run is.

    Attributes:
      seconds: of one step, mean over the last reports.
      tokens_per_second: over all devices, None where the tokens of a step are not known.
      mfu: model FLOP/s over the peak of all devices, None where either is not known. The peak
        is that of bfloat16, also for a run in float32.
      seconds_left: until the last step, evaluations and checkpoints like those so far included.
    """

    seconds: float
    tokens_per_second: float | None
    mfu: float | None
    seconds_left: float


class Meter:
    """Times the steps of a run on the host, from report to report."""

    def __init__(
        self,
        *,
        tokens: int | None = None,
        flops: float | None = None,
        devices: int | None = None,
        device_kind: str | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Says what a step is.

        Args:
          tokens: of a step, over all devices.
          flops: of a step, over all devices (`model_flops`).
          devices: how many it runs on; None for all of this run.
          device_kind: their `device_kind`; None for that of this run.
          window: reports over which the speed is a mean.
          clock: seconds.
        """
        peak = peak_flops(jax.devices()[0].device_kind if device_kind is None else device_kind)
        count = jax.device_count() if devices is None else devices
        self._tokens = tokens
        self._share = flops / (peak * count) if flops is not None and peak is not None else None
        self._laps: deque[tuple[int, float]] = deque(maxlen=window)
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def told(self, step: int, steps: int) -> Speed | None:
        """The speed when step number `step` of `steps` is known to have ended.

        Returns:
          None at the first report of a run: that step holds the compilation.
        """
        now = self._clock()
        if self._last is None or self._first is None:
            self._first = self._last = (step, now)
            return None
        self._laps.append((step - self._last[0], now - self._last[1]))
        self._last = (step, now)
        seconds = sum(lap for _, lap in self._laps) / max(1, sum(count for count, _ in self._laps))
        rate = 1 / seconds if seconds > 0 else None
        overall = (now - self._first[1]) / max(1, step - self._first[0])
        return Speed(
            seconds=seconds,
            tokens_per_second=self._tokens * rate if self._tokens and rate else None,
            mfu=self._share * rate if self._share and rate else None,
            seconds_left=overall * (steps - step),
        )

    def resume(self) -> None:
        """What was done since the last report (an evaluation, a save) is no step's time."""
        if self._last is not None:
            self._last = (self._last[0], self._clock())
