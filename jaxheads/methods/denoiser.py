"""A class-conditional denoiser of images from scratch: dense, and with mixtures of its heads.

Sources: Peebles and Xie (2023), DiT, for the model (`jaxheads.methods.dit`); Jin et al. (2024),
MoH, section 4.2, which trains DiT with 90 % and 75 % of its heads and finds the first better than
the dense model and the second worse. Trained to predict noise, with the class left out at times
for classifier-free guidance (`jaxheads.methods.diffusion`), by the weights' moving average.

All variants start from the same weights and see the same batches and noise. The control draws the
heads of each token, at each step anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.data import Source
from jaxheads.methods.diffusion import NoiseSchedule, noised
from jaxheads.methods.dit import dit_config, grid_positions, new_condition, none_of, predict_noise
from jaxheads.methods.image_samples import (
    ROWS,
    Weights,
    frechet_distance,
    measured_rows,
    recognised,
    row_losses,
    sample,
)
from jaxheads.methods.image_shape import Shape
from jaxheads.methods.measure import apply, in_parts
from jaxheads.methods.method import Data, ImageData, Tuned
from jaxheads.methods.moh import Routed
from jaxheads.methods.objective import rows_of
from jaxheads.methods.variants import Fixed, fit_variants
from jaxheads.model.config import ModelConfig
from jaxheads.model.layout import axes_of, lay
from jaxheads.model.parameters import Tree, random_parameters
from jaxheads.model.transformer import Transformer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """How images are made to be measured.

    Attributes:
      images: how many, in equal parts of the classes.
      steps: timesteps visited.
      guidance: of `diffusion.guided`; DiT takes 1.5.

    Raises:
      ValueError: fewer than two images.
    """

    images: int = 360
    steps: int = 50
    guidance: float = 1.5

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError(f"sampling.images must be at least 2, got {self.images}")


@dataclass(frozen=True)
class Denoiser:
    """Settings.

    Attributes:
      shape: of the model.
      routing: which heads stay on, and how they are chosen.
      controls: whether the dense model and random heads are trained too.
      noise: the schedule.
      drop: probability with which an image's class is left out in training.
      sampling: how images are made.
      fit: how all are trained.

    Raises:
      ValueError: a `drop` outside [0, 1), more sampling steps than timesteps.
    """

    shape: Shape = field(default_factory=lambda: Shape(d_mlp=256))
    routing: Routed = field(default_factory=lambda: Routed(shares=(0.9, 0.75)))
    controls: bool = True
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)
    drop: float = 0.1
    sampling: Sampling = field(default_factory=Sampling)
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=1000,
            batch_size=64,
            average=0.99,
            optimizer=Optimizer(
                learning_rate=3e-3, schedule="cosine", warmup=50, end=0.1, clip=1.0
            ),
        )
    )

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must lie in [0, 1), got {self.drop}")
        self.noise.spaced(self.sampling.steps)

    def create(self, source: Source, seed: int) -> tuple[Transformer, None]:
        """The random blocks that training starts from.

        Raises:
          ValueError: what are no images, sizes that do not fit together.
        """
        images, _ = source.images()
        config = dit_config(self.shape, images.shape[1:])
        params = random_parameters(config, jax.random.key(seed))
        params["embed"]["positions"] = grid_positions(config)
        return Transformer(config, params), None

    def train(self, job: Job, model: Transformer, tokenizer: Any, data: Data) -> dict[str, Tuned]:
        """Trains the shares and the controls.

        Returns:
          "moh 0.9", ...; with controls "dense" and "random 0.9", ...

        Raises:
          ValueError: data that are no images, shares that the heads do not allow.
        """
        data = _images(data)
        start = {
            "blocks": model.params,
            "condition": starting_condition(model, data.classes, job.seed),
        }
        key = jax.random.key(job.seed)
        tuned = fit_variants(
            job,
            denoising_loss,
            start,
            self.routing.variants(model.config, key, controls=self.controls),
            rest=Setup(model.config, self.noise, self.drop),
            penalty=self.routing.penalty,
            fit=self.fit,
            rows=rows_of(data),
        )
        return {name: _divided(one) for name, one in tuned.items()}

    def measure(self, job: Job, model: Transformer, data: Data, tuned: Tuned) -> dict[str, float]:
        """How well noise is predicted, and what is made from noise.

        All variants of a seed get the same timesteps and noise.

        Returns:
          "loss", mean squared error of the noise in held-out images over evenly spread timesteps;
          of samples "frechet_distance", to the held-out images in pixels of -1 to 1 (it is not
          FID), and "class_accuracy", the share of samples in which a logistic regression on the
          pixels of the training images finds the class that was asked for.
        """
        data = _images(data)
        weights = _weights(job.seed, model, data.classes, tuned)
        images, labels = data.held_out[np.arange(len(data.held_out))]
        rows = measured_rows(images, labels, self.noise, job.seed)
        loss = in_parts(job, row_losses, weights, tuned.edits, rows, ROWS)
        asked = np.arange(self.sampling.images, dtype=np.int32) % data.classes
        start = np.random.default_rng(job.seed).standard_normal((len(asked), *images.shape[1:]))
        noise = (start.astype(np.float32), asked)
        made = in_parts(job, self._sampler(), weights, tuned.edits, noise, ROWS)
        return {
            "loss": float(loss.mean()),
            "frechet_distance": frechet_distance(made, images),
            "class_accuracy": float(np.mean(recognised(data, made) == asked)),
        }

    def examine(
        self, model: Transformer, tokenizer: Any, data: Data, tuned: Tuned
    ) -> dict[str, Any]:
        """Samples to be looked at: "classes" [N] and "images" [N][height][width][C], -1 to 1."""
        data = _images(data)
        count = 6
        classes = np.repeat(np.arange(data.classes, dtype=np.int32), count)
        shape = data.held_out[np.arange(1)][0].shape[1:]
        start = np.random.default_rng(0).standard_normal((len(classes), *shape))
        weights = _weights(0, model, data.classes, tuned)
        made = self._sampler()(weights, tuned.edits, (start.astype(np.float32), classes))
        images = np.round(np.asarray(made, np.float64), 2).tolist()
        return {"kind": "samples", "classes": classes.tolist(), "images": images}

    def _sampler(self) -> Callable[..., Array]:
        how = self.sampling
        return partial(sample, noise=self.noise, steps=how.steps, guidance=how.guidance)


@struct.dataclass
class Setup:
    """What the loss needs beside what is trained; all static.

    Attributes:
      config: of the blocks.
      noise: the schedule.
      drop: as in `Denoiser`.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    noise: NoiseSchedule = struct.field(pytree_node=False)
    drop: float = struct.field(pytree_node=False)


def starting_condition(model: Transformer, classes: int, seed: int) -> Tree:
    """The weights of the condition before training, `dit.new_condition`."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return new_condition(model.config, classes, key)


def _weights(seed: int, model: Transformer, classes: int, tuned: Tuned) -> Weights:
    beside = tuned.beside
    if beside is None:
        beside = starting_condition(model, classes, seed)
    return Weights(apply(model, tuned), beside)


def _divided(tuned: Tuned) -> Tuned:
    """A variant whose `params` are those of the blocks, the condition being beside."""
    assert tuned.params is not None
    both = tuned.params
    return dataclasses.replace(tuned, params=both["blocks"], beside=both["condition"])


def denoising_loss(
    trainable: Tree, fixed: Fixed, item: tuple[Array, Array], key: Array | None
) -> tuple[Array, Metrics]:
    """Mean squared error of the predicted noise at random timesteps, plus the routing penalty.

    Args:
      trainable: {"params": {"blocks": ..., "condition": ...}, "edits": the routers' weights}.
      fixed: the rest of the variant; `fixed.rest` is a `Setup`.
      item: images [B,height,width,C] and classes int [B].
      key: of timesteps, noise, dropped classes and random heads; None for fixed ones, with no
        class dropped.

    Returns:
      The loss, and the metrics "weight", images; with a router those of the penalty and
      "task_loss".
    """
    images, classes = item
    times_key, noise_key, drop_key, head_key = jax.random.split(
        jax.random.key(0) if key is None else key, 4
    )
    setup, condition = fixed.rest, trainable["params"]["condition"]
    rows = axes_of(classes)
    times = jax.random.randint(times_key, classes.shape, 0, setup.noise.steps)
    shares = lay(jnp.asarray(setup.noise.alpha_bars)[times], rows)
    times = lay(times, rows)
    noise = lay(jax.random.normal(noise_key, images.shape), axes_of(images))
    if key is not None:
        dropped = lay(jax.random.bernoulli(drop_key, setup.drop, classes.shape), rows)
        classes = jnp.where(dropped, none_of(condition), classes)
    found, tapped = predict_noise(
        Transformer(setup.config, trainable["params"]["blocks"]),
        condition,
        noised(images, noise, shares),
        times,
        classes,
        edits=fixed.acting(trainable["edits"], None if key is None else head_key),
        taps=fixed.taps,
    )
    loss = jnp.mean(jnp.square(found - noise))
    return fixed.total(loss, {"weight": jnp.float32(len(classes))}, tapped)


def _images(data: Data) -> ImageData:
    if not isinstance(data, ImageData):
        raise ValueError(f"a denoiser learns from images, got {type(data).__name__}")
    return data
