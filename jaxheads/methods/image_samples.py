"""What a denoiser of images is measured by: noise in images, and images made from noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.edits import Edits
from jaxheads.methods.diffusion import NoiseSchedule, ddim, guided, noised
from jaxheads.methods.dit import none_of, predict_noise
from jaxheads.methods.method import ImageData
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Transformer

Array = jax.Array
ROWS = 120
"""Rows measured at a time; a number that many meshes divide."""
DRAWS = 8
"""Timesteps at which each held-out image is measured."""


@struct.dataclass
class Weights:
    """A denoiser: its blocks, and what conditions them."""

    model: Transformer
    condition: Tree


@jax.jit
def row_losses(weights: Weights, edits: Edits | None, rows: Any) -> Array:
    """Mean squared error of the noise in each row, float32 [B].

    Args:
      weights: the denoiser.
      edits: what acts on its blocks.
      rows: as `measured_rows` gives them.
    """
    noisy, classes, times, added = rows
    model, condition = weights.model, weights.condition
    found, _ = predict_noise(model, condition, noisy, times, classes, edits=edits)
    return jnp.mean(jnp.square(found - added), axis=(1, 2, 3))


@partial(jax.jit, static_argnames=("noise", "steps", "guidance"))
def sample(
    weights: Weights,
    edits: Edits | None,
    rows: Any,
    *,
    noise: NoiseSchedule,
    steps: int,
    guidance: float,
) -> Array:
    """Images made from noise by `diffusion.ddim`, float32 [B,height,width,C] in -1 to 1.

    Args:
      weights: the denoiser.
      edits: what acts on its blocks.
      rows: standard normal [B,height,width,C], and the classes wanted [B].
      noise: the schedule of training.
      steps: timesteps visited.
      guidance: as in `diffusion.guided`.
    """
    start, classes = rows
    none = jnp.full_like(classes, none_of(weights.condition))

    def predict(x: Array, times: Array) -> Array:
        with_class, without = (
            predict_noise(weights.model, weights.condition, x, times, wanted, edits=edits)[0]
            for wanted in (classes, none)
        )
        return guided(with_class, without, guidance)

    return ddim(predict, start, noise, steps)


def measured_rows(
    images: np.ndarray, labels: np.ndarray, noise: NoiseSchedule, seed: int
) -> tuple[np.ndarray, ...]:
    """Held-out images, each `DRAWS` times, with timesteps that cover all evenly, and noise.

    Returns:
      float32 [N,height,width,C] images with noise, int32 [N] classes and timesteps, and float32
      [N,height,width,C] the noise that is in the images.
    """
    random = np.random.default_rng(seed)
    count = len(images) * DRAWS
    spread = (random.permutation(count) + random.random(count)) / count
    times = np.minimum((spread * noise.steps).astype(np.int32), noise.steps - 1)
    added = random.standard_normal((count, *images.shape[1:])).astype(np.float32)
    noisy = noised(np.tile(images, (DRAWS, 1, 1, 1)), added, noise.alpha_bars[times])
    return np.asarray(noisy), np.tile(labels, DRAWS), times, added


def recognised(data: ImageData, images: np.ndarray) -> np.ndarray:
    """The classes that a logistic regression on training pixels finds in images, int [N].

    Raises:
      ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # an extra
    except ImportError as error:
        raise ValueError(
            "measuring samples needs scikit-learn, which is not installed: pip install "
            "'jaxheads[images]'"
        ) from error
    known, labels = data.train[np.arange(len(data.train))]
    reader = LogisticRegression(max_iter=1000).fit(known.reshape(len(known), -1), labels)
    return np.asarray(reader.predict(images.reshape(len(images), -1)))


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians of two sets of vectors.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Dowson and Landau (1982). FID (Heusel et al.
    2017) is this distance of Inception's features; of raw pixels it is not FID. Estimated from
    few vectors it is too large, so only sets of equal sizes compare.

    Args:
      one: [N,E], or any [N,...], which is flattened.
      other: [M,E].

    Raises:
      ValueError: vectors of different sizes, or fewer than two in a set.
    """
    sets = [np.asarray(x, np.float64).reshape(len(x), -1) for x in (one, other)]
    if sets[0].shape[1] != sets[1].shape[1] or min(map(len, sets)) < 2:
        raise ValueError(
            "expected two sets of at least two vectors of one size, got shapes "
            f"{sets[0].shape} and {sets[1].shape}"
        )
    means = [x.mean(axis=0) for x in sets]
    covariances = [np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in sets]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # C1 C2 has the eigenvalues of this symmetric matrix.
    joint = np.linalg.eigvalsh(root @ covariances[1] @ root)
    spread = sum(np.trace(c) for c in covariances) - 2 * np.sqrt(np.maximum(joint, 0)).sum()
    return float(np.sum((means[0] - means[1]) ** 2) + spread)
