"""Which drafted tokens are accepted, given what the model says at each node of the tree."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array


class Accept(Protocol):
    """A rule of acceptance: a pytree."""

    def __call__(self, logits: Array, tokens: Array, parent: np.ndarray) -> tuple[Array, Array]:
        """Looks at every node but the root, which is always accepted.

        Args:
          logits: float32 [B,N,V], of the model at each node.
          tokens: int32 [B,N], drafted.
          parent: int32 [N].

        Returns:
          bool [B,N], whether a node may follow its parent; and float32 [B,N], what a node adds
          to the score by which the best of several equally long lines is chosen.
        """
        ...


@struct.dataclass
class Greedy:
    """A draft must be the model's most likely token: the output is that of greedy decoding."""

    def __call__(self, logits: Array, tokens: Array, parent: np.ndarray) -> tuple[Array, Array]:
        """As `Accept`."""
        best = jnp.argmax(logits, axis=-1)
        return tokens == best[:, parent], jnp.zeros(tokens.shape, jnp.float32)


@struct.dataclass
class Typical:
    """A draft must be likely enough: p > min(epsilon, alpha exp(-H)), H the entropy.

    Source: Cai et al. (2024), "Medusa", section 2.3.1. The tokens that the model itself adds stay
    the most likely ones, so nothing is random; of equally long lines the most likely is taken.
    In the released code the defaults of one function are swapped (its callers pass them).

    Attributes:
      epsilon: a probability that is always enough.
      alpha: share of exp(-H) that is enough where the model is unsure.
      temperature: by which logits are divided.
    """

    epsilon: float | Array = 0.09
    alpha: float | Array = 0.3
    temperature: float | Array = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, int | float)
            if number and not (value > 0 and (name == "temperature" or value <= 1)):
                most = "" if name == "temperature" else " and at most 1"
                raise ValueError(f"{name} must be above 0{most}, got {value}")

    def __call__(self, logits: Array, tokens: Array, parent: np.ndarray) -> tuple[Array, Array]:
        """As `Accept`."""
        logp = jax.nn.log_softmax(logits / self.temperature, axis=-1)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        bound = jnp.minimum(self.epsilon, self.alpha * jnp.exp(-entropy))
        mine = jnp.take_along_axis(logp[:, parent], tokens[..., None], axis=-1)[..., 0]
        return jnp.exp(mine) > bound[:, parent], mine
