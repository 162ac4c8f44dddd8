"""Denoising diffusion: the noise schedule, and the way back.

Sources: Ho et al. (2020), DDPM, eqs. 2 and 4, for the schedule; Song et al. (2021), DDIM, eq. 12
without noise, for the sampler; Ho and Salimans (2022), "Classifier-Free Diffusion Guidance".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Predict = Callable[[Array, Array], Array]
"""From noisy images [B,...] and timesteps int [B] to the noise in them [B,...]."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Variances of the noise that each step adds, rising linearly.

    Attributes:
      steps: S, timesteps 0 to S - 1.
      first: variance of the first step.
      last: variance of the last.

    Raises:
      ValueError: no step, or variances that do not rise within (0, 1).
    """

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"noise.steps must be at least 1, got {self.steps}")
        if not 0 < self.first <= self.last < 1:
            raise ValueError(
                f"noise.first and noise.last must satisfy 0 < first <= last < 1, got {self.first} "
                f"and {self.last}"
            )

    @property
    def alpha_bars(self) -> np.ndarray:
        """float32 [S]: the share of an image's variance that is left at each timestep."""
        betas = np.linspace(self.first, self.last, self.steps)
        return np.cumprod(1 - betas).astype(np.float32)

    def spaced(self, count: int) -> np.ndarray:
        """int32 [count]: timesteps from the last down to 0, evenly spaced.

        Raises:
          ValueError: more than there are, or fewer than one.
        """
        if not 1 <= count <= self.steps:
            raise ValueError(f"sampling takes 1 to {self.steps} steps, got {count}")
        if count == 1:
            return np.array([self.steps - 1], np.int32)
        return np.linspace(self.steps - 1, 0, count).round().astype(np.int32)


def noised(
    clean: Array | np.ndarray, noise: Array | np.ndarray, alpha_bar: Array | np.ndarray
) -> Array:
    """Images at a timestep: sqrt(a) x + sqrt(1 - a) noise, DDPM eq. 4.

    Args:
      clean: [B,...].
      noise: standard normal, of the same shape.
      alpha_bar: [B].
    """
    share = alpha_bar.reshape(-1, *(1,) * (clean.ndim - 1))
    return jnp.sqrt(share) * clean + jnp.sqrt(1 - share) * noise


def guided(conditional: Array, unconditional: Array, guidance: float) -> Array:
    """The noise extrapolated away from what is predicted without a class.

    Args:
      conditional: predicted with the class.
      unconditional: predicted without; same shape.
      guidance: 1 is the conditional prediction, 0 the other; more exaggerates the class.
    """
    return unconditional + guidance * (conditional - unconditional)


def ddim(predict: Predict, noise: Array, schedule: NoiseSchedule, steps: int) -> Array:
    """Deterministic sampling as one scan.

    The clean image guessed at each step is clipped to -1 to 1, and the noise taken to be what
    then is left, as samplers of pixels do.

    Args:
      predict: the trained model.
      noise: standard normal [B,...], where sampling starts.
      schedule: that of training.
      steps: how many of its timesteps are visited.

    Returns:
      Images [B,...] in -1 to 1.

    Raises:
      ValueError: as `NoiseSchedule.spaced`.
    """
    times = schedule.spaced(steps)
    here = schedule.alpha_bars[times]
    before = np.append(here[1:], np.float32(1))

    def back(x: Array, step: Any) -> tuple[Array, None]:
        time, share, target = step
        found = predict(x, jnp.full(x.shape[0], time))
        clean = jnp.clip((x - jnp.sqrt(1 - share) * found) / jnp.sqrt(share), -1, 1)
        left = (x - jnp.sqrt(share) * clean) / jnp.sqrt(1 - share)
        return jnp.sqrt(target) * clean + jnp.sqrt(1 - target) * left, None

    return jax.lax.scan(back, noise, (times, here, before))[0]
