"""`Clip`: a text and a vision tower whose projections are compared (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.model.config import ModelConfig
from jaxheads.model.pair import PairConfig
from jaxheads.model.parameters import (
    Parameter,
    Tree,
    check_parameters,
    parameter_table,
    random_parameters,
)
from jaxheads.model.transformer import Transformer

Array = jax.Array


@dataclass(frozen=True)
class ClipConfig(PairConfig):
    """The configs of the two towers, both with a projection of the same size.

    Attributes:
      text: of the tower that reads tokens.
      vision: of the tower that reads images.
    """

    text: ModelConfig
    vision: ModelConfig

    def __post_init__(self) -> None:
        if not 0 < self.text.projection == self.vision.projection:
            raise ValueError(
                "config.text.projection and config.vision.projection must be equal and positive, "
                f"got {self.text.projection} and {self.vision.projection}"
            )


@parameter_table.register
def _(config: ClipConfig) -> dict[str, Parameter]:
    table = {"logit_scale": Parameter((), (), None, neutral=float(np.log(1 / 0.07)))}
    for name, side in config.sides.items():
        leaves = parameter_table(side)
        table |= {f"{name}/{path}": leaf for path, leaf in leaves.items()}
    return table


class Clip(nnx.Module):
    """Two `Transformer`s, `text` and `vision`, each to be called, edited and tapped as such.

    Their outputs' `pooled` [B,Z] are the projections.
    """

    def __init__(self, config: ClipConfig, params: Mapping[str, Any]) -> None:
        """Wraps a parameter tree.

        Args:
          config: the model's config.
          params: nested dict of arrays as listed by `parameter_table(config)`.

        Raises:
          ValueError: a parameter is missing, unexpected or of the wrong shape.
        """
        check_parameters(config, params)
        self.config = config
        self.text = Transformer(config.text, params["text"])
        self.vision = Transformer(config.vision, params["vision"])
        self.logit_scale = nnx.Param(params["logit_scale"])

    @classmethod
    def random(cls, config: ClipConfig, key: Array, dtype: str = "float32") -> Clip:
        """A randomly initialised model."""
        return cls(config, random_parameters(config, key, dtype))

    @property
    def params(self) -> Tree:
        """The parameters as a nested dict of arrays."""
        scale = self.logit_scale[...]
        return {"logit_scale": scale, "text": self.text.params, "vision": self.vision.params}

    def compare(self, text: Array, vision: Array) -> Array:
        """Scaled cosines of projections: text [B,Z] and vision [C,Z] -> float32 [C,B]."""
        text, vision = _unit(text), _unit(vision)
        return jnp.exp(self.logit_scale[...].astype(jnp.float32)) * vision @ text.T


def _unit(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
