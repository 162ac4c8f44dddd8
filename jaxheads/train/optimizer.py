"""`Optimizer`: the settings of a gradient transformation, built on optax.

One order for all: clip the gradient by its global norm, the optimizer's own rule, decoupled weight
decay, the learning rate. Sources: Kingma and Ba (2015), Adam; Loshchilov and Hutter (2019), AdamW;
Chen et al. (2023), Lion; Shazeer and Stern (2018), Adafactor; Hu et al. (2024), MiniCPM, for the
schedule of warm-up, stable phase and decay.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxheads.edits import Edits
from jaxheads.names import choose
from jaxheads.train.select import only

RULES: Mapping[str, Mapping[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "sgd": {"momentum": 0.0, "weight_decay": 0.0},
    "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0},
    "adafactor": {"momentum": 0.0, "weight_decay": 0.0},
}
"""The options that each rule reads, and their defaults."""

SCHEDULES: Mapping[str, Mapping[str, float]] = {
    "constant": {},
    "linear": {"end": 0.0},
    "cosine": {"end": 0.0},
    "wsd": {"end": 0.0, "decay": 0.2},
}
"""The options that each schedule reads, and their defaults."""

_RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "b1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "b2": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "momentum": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "eps": ("positive", lambda x: x > 0),
    "weight_decay": ("at least 0", lambda x: x >= 0),
    "end": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "decay": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "learning_rate": ("positive", lambda x: x > 0),
    "clip": ("positive", lambda x: x > 0),
}

_UNDECAYED = re.compile(r"(.*_)?(scale|bias|offset)")


@dataclass(frozen=True)
class Optimizer:
    """What turns gradients into updates.

    An option left at None takes the default of its rule (`RULES`) or schedule (`SCHEDULES`); one
    that the chosen rule or schedule does not read is refused.

    Attributes:
      name: "adamw", "adam" (no weight decay), "sgd", "lion" or "adafactor".
      learning_rate: the peak.
      schedule: after the warm-up, "constant"; "linear" or "cosine" down to the end of the run;
        or "wsd", constant and then linearly down over the last part of the run.
      warmup: steps over which the rate rises linearly to the peak. The first of them already
        moves: it has peak / (warmup + 1).
      end: rate after the last step, as a share of the peak.
      decay: part of the run that "wsd" spends going down, as a share of all steps.
      weight_decay: share of a weight that is taken away per step, times the learning rate; of
        those that `decayed` names.
      clip: largest global norm of the gradient; None for no limit.
      b1: decay rate of the mean of gradients.
      b2: decay rate of the mean of their squares (of Lion's momentum).
      eps: added to the root of the mean square.
      momentum: decay rate of the sum of gradients ("sgd") or of the mean of updates
        ("adafactor"); 0 keeps none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    end: float | None = None
    decay: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown name, an option nobody reads or out of its range."""
        choose("optimizer", self.name, RULES)
        choose("schedule", self.schedule, SCHEDULES)
        for table, kind, chosen in (
            (RULES, "optimizer", self.name),
            (SCHEDULES, "schedule", self.schedule),
        ):
            options = {option for defaults in table.values() for option in defaults}
            for option in sorted(options - set(table[chosen])):
                if getattr(self, option) is not None:
                    readers = ", ".join(name for name in table if option in table[name])
                    raise ValueError(
                        f"{option} = {getattr(self, option)} is not read by the {kind} "
                        f"{chosen!r}, expected one of {readers}"
                    )
        for option, (expected, fits) in _RANGES.items():
            value = getattr(self, option)
            if value is not None and not (math.isfinite(value) and fits(value)):
                raise ValueError(f"{option} must be {expected}, got {value}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of each step of a run, counted from 0.

        Raises:
          ValueError: the run is no longer than the warm-up.
        """
        if steps <= self.warmup:
            raise ValueError(
                f"a run of {steps} steps has no step after a warmup of {self.warmup}; "
                "expected more steps than warmup"
            )
        peak, left = self.learning_rate, steps - self.warmup
        options = self._options(SCHEDULES[self.schedule])
        if self.schedule == "constant":
            after = optax.constant_schedule(peak)
        elif self.schedule == "linear":
            after = optax.linear_schedule(peak, peak * options["end"], left)
        elif self.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, left, options["end"])
        else:
            down = min(left, max(1, round(options["decay"] * steps)))
            after = optax.linear_schedule(peak, peak * options["end"], down, left - down)
        if not self.warmup:
            return after
        rise = optax.linear_schedule(peak / (self.warmup + 1), peak, self.warmup)
        return optax.join_schedules([rise, after], [self.warmup])

    def build(self, steps: int, mask: Any = None) -> optax.GradientTransformation:
        """The transformation for a run.

        Args:
          steps: optimizer steps of the whole run, which the schedule spans.
          mask: what of the trained tree is trained, as `Selection.mask`; None for all. See
            `select.only`.

        Raises:
          ValueError: the run is no longer than the warm-up.
        """
        options = self._options(RULES[self.name])
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts.append(_rule(self.name, options))
        if options.get("weight_decay"):
            parts.append(optax.add_decayed_weights(options["weight_decay"], mask=decayed))
        chain = optax.chain(*parts, optax.scale_by_learning_rate(self.rate(steps)))
        return chain if mask is None else only(mask, chain)

    def _options(self, defaults: Mapping[str, float]) -> dict[str, float]:
        given = dataclasses.asdict(self)
        return {k: v if given[k] is None else given[k] for k, v in defaults.items()}


def _rule(name: str, options: Mapping[str, float]) -> optax.GradientTransformation:
    """The optimizer's own direction, before weight decay and learning rate."""
    if name in ("adam", "adamw"):
        return optax.scale_by_adam(options["b1"], options["b2"], options["eps"])
    if name == "lion":
        return optax.scale_by_lion(options["b1"], options["b2"])
    momentum = options["momentum"]
    if name == "sgd":
        return optax.trace(momentum) if momentum else optax.identity()
    parts = [
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    ]
    if momentum:
        parts.append(optax.ema(momentum, debias=False))
    return optax.chain(*parts)


def decayed(tree: Any) -> Any:
    """Which leaves of a trained tree weight decay acts on: its matrices.

    That is every named leaf but scales, biases and offsets, vectors, and whatever lies in
    `Edits`: those have a neutral value of their own, to which decay would not lead. Embeddings
    decay, as they do in most trainers. A bare array has no name and does not decay.

    Returns:
      The tree with a bool for each leaf (one for a whole `Edits`).
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [_name(key) for key in path]
        # A parameter of a flax module is reached through its field `value`.
        name = names[-2] if names[-1:] == ["value"] and len(names) > 1 else (names or [""])[-1]
        if isinstance(leaf, Edits) or not name or jnp.ndim(leaf) < 2:
            return False
        return _UNDECAYED.fullmatch(name) is None

    return jax.tree_util.tree_map_with_path(
        decays, tree, is_leaf=lambda node: isinstance(node, Edits)
    )


def _name(key: Any) -> str:
    """The name in a dict's key or an attribute; empty for a place in a sequence."""
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    return key.name if isinstance(key, jax.tree_util.GetAttrKey) else ""
