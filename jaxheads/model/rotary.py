"""Rotary position encoding (Su et al. 2021, eq. 34) in the rotate-half layout, and its scalings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied with."""
        return 1.0

    def scale(self, inverse: np.ndarray, base: float) -> np.ndarray:
        """The frequencies [dim/2], scaled."""
        return inverse / self.factor


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.

    Attributes:
      factor: of the low frequencies.
      low: a wavelength above original / low counts as long.
      high: a wavelength below original / high counts as short.
      original: context of the first training, in tokens.
    """

    factor: float
    low: float
    high: float
    original: int

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied with."""
        return 1.0

    def scale(self, inverse: np.ndarray, base: float) -> np.ndarray:
        """The frequencies [dim/2], scaled."""
        turns = self.original * inverse / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return inverse * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, section 3): a ramp over frequencies, and hotter attention.

    Attributes:
      factor: of the low frequencies.
      original: context of the first training, in tokens.
      beta_fast: frequencies that turn more often within `original` tokens are kept.
      beta_slow: those that turn less often are divided by `factor`.
      magnitude: what queries and keys are multiplied with.
      truncate: whether the ends of the ramp are rounded to whole features.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    truncate: bool = True

    def scale(self, inverse: np.ndarray, base: float) -> np.ndarray:
        """The frequencies [dim/2], scaled."""
        dim = 2 * len(inverse)

        def feature(turns: float) -> float:
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return inverse * ((1 - ramp) + ramp / self.factor)


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (Ding et al. 2024): a factor of its own for every frequency.

    Attributes:
      short: factors [dim/2] of rows of at most `original` tokens.
      long: factors [dim/2] of longer ones.
      original: context of the first training, in tokens.
      magnitude: what queries and keys are multiplied with.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    magnitude: float = 1.0

    def scale(self, inverse: np.ndarray, base: float) -> np.ndarray:
        """The frequencies [dim/2] of short rows, scaled."""
        return inverse / np.asarray(self.short)


Scaling = Linear | Llama3 | Yarn | LongRope
SCALINGS: Mapping[str, type[Scaling]] = {
    "linear": Linear,
    "llama3": Llama3,
    "yarn": Yarn,
    "longrope": LongRope,
}


@dataclass(frozen=True)
class Rope:
    """The rotary encoding of a layer.

    Attributes:
      base: theta.
      scaling: how its frequencies are stretched for longer contexts; None for plain.
    """

    base: float = 10_000.0
    scaling: Scaling | None = None


def frequencies(rope: Rope | None, dim: int) -> np.ndarray:
    """Radians per token of each pair, float64 [dim/2]; zeros where nothing rotates (None)."""
    if rope is None:
        return np.zeros(dim // 2)
    inverse = rope.base ** -(np.arange(0, dim, 2) / dim)
    return inverse if rope.scaling is None else rope.scaling.scale(inverse, rope.base)


def rotary_angles(positions: Array, ropes: tuple[Rope | None, ...], dim: int) -> Array:
    """Cosines and sines for each position and encoding.

    Args:
      positions: int [B,T].
      ropes: R encodings; None rotates by nothing.
      dim: features of a head that rotate.

    Returns:
      float32 [R,2,B,T,1,dim/2], cosines then sines; the singleton axis broadcasts over heads.
    """
    return jnp.stack([_angles(positions, rope, dim) for rope in ropes])


def _angles(positions: Array, rope: Rope | None, dim: int) -> Array:
    inverse = jnp.asarray(frequencies(rope, dim), jnp.float32)[None, None]
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, LongRope) and rope is not None:
        # Chosen row by row, so that a batch equals its rows alone.
        stretched = frequencies(Rope(rope.base), dim) / np.asarray(scaling.long)
        long = positions.max(axis=1)[:, None, None] >= scaling.original
        inverse = jnp.where(long, jnp.asarray(stretched, jnp.float32), inverse)
    angle = positions[..., None].astype(jnp.float32) * inverse
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return magnitude * jnp.stack([jnp.cos(angle), jnp.sin(angle)])[:, :, :, None, :]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + dim/2}) of x [B,T,H,Dh] by their angles, in float32.

    The first dim features of a head rotate, the rest passes. This is the pairing that
    Hugging Face weights expect; GGUF files of the Llama family store the rows for
    interleaved pairs (x_2i, x_2i+1) and are permuted when read.

    Args:
      x: [B,T,H,Dh].
      cos: float32 [B,T,1,dim/2].
      sin: likewise.
    """
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = jnp.split(wide, (half, 2 * half), axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
