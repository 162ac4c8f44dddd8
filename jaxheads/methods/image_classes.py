"""A small vision transformer that classifies images, dense and with mixture-of-head attention.

Source: Dosovitskiy et al. (2021), "An Image is Worth 16x16 Words": patches and a class token
through a pre-norm encoder, a linear classifier of the class token. Jin et al. (2024), "MoH:
Multi-Head Attention as Mixture-of-Head Attention", section 4.1 and the released ViT code: routers
trained with the model from the start, with renormalised gates and load-balance weight 0.01, and
shallow layers in which all heads are always on (`whole_layers`). The paper's backbone is TransNeXt
on ImageNet-1K, where 75 % of the heads reach 84.9 % and 50 % reach 84.7 %, against 84.8 % for all.

A layer with K = 1 has renormalised gates of 1, so that the task teaches its router nothing: choose
shared heads and whole layers such that two or more are routed.

Every variant begins with the same parameters and sees the same batches for as many steps: the
routed models, the dense one, and models whose heads are drawn at random for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxheads.data import Source
from jaxheads.edits import Edits
from jaxheads.edits.mixture import heads_on
from jaxheads.methods.image_loss import Setup, class_scores, image_loss
from jaxheads.methods.image_shape import Shape
from jaxheads.methods.measure import apply, in_parts
from jaxheads.methods.method import ImageData, Tuned
from jaxheads.methods.moh import Routed
from jaxheads.methods.objective import rows_of
from jaxheads.methods.variants import fit_variants
from jaxheads.model.layout import whole
from jaxheads.model.transformer import Transformer
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array


@dataclass(frozen=True)
class ImageClasses:
    """Settings.

    Attributes:
      shape: of the model.
      routing: which heads stay on, and how they are chosen.
      controls: whether the dense model and random routing are trained too.
      shift: most pixels by which a training image is shifted, at random, in each direction.
      fit: how all are trained.

    Raises:
      ValueError: shares that the layers do not allow, a negative shift.
    """

    shape: Shape = field(default_factory=lambda: Shape(n_layers=5))
    routing: Routed = field(default_factory=lambda: Routed(shared=0.35, whole_layers=1))
    controls: bool = True
    shift: int = 0
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=200,
            batch_size=64,
            optimizer=Optimizer(
                learning_rate=4e-3, schedule="cosine", warmup=20, end=0.01, weight_decay=0.05,
                clip=1.0,
            ),
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {self.shift}")
        for share in self.routing.shares:
            heads_on(self.shape.n_layers, self.shape.n_heads, share, self.routing.whole_layers)

    def create(self, source: Source, seed: int) -> tuple[Transformer, None]:
        """The random model that training starts from; it has no tokenizer.

        Args:
          source: training images, by which image size and number of classes are known.
          seed: of the parameters.

        Raises:
          ValueError: a source of something else, images that are not cut evenly into patches.
        """
        images, labels = source.images()
        config = self.shape.config(
            images.shape[1:],
            prefix=1,
            family="vit",
            activation="gelu",
            norm_bias=True,
            head="classes",
            vocab_size=1 + int(labels.max()),
            tied=False,
            unembed_bias=True,
        )
        return Transformer.random(config, jax.random.key(seed)), None

    def train(
        self, job: Job, model: Transformer, tokenizer: None, data: ImageData
    ) -> dict[str, Tuned]:
        """Trains the shares and the controls.

        Returns:
          "moh 0.75", ...; with controls "random 0.75", ... and "dense".

        Raises:
          ValueError: shares that the model's heads do not allow.
        """
        # Not the key of which the parameters were drawn.
        key = jax.random.fold_in(jax.random.key(job.seed), 1)
        return fit_variants(
            job,
            image_loss,
            model.params,
            self.routing.variants(model.config, key, controls=self.controls),
            rest=Setup(model.config, self.shift),
            penalty=self.routing.penalty,
            fit=self.fit,
            rows=rows_of(data),
        )

    def measure(
        self,
        job: Job,
        model: Transformer,
        data: ImageData,
        tuned: Tuned,
        batch_size: int = 128,
    ) -> dict[str, float]:
        """Means over the held-out images.

        Args:
          job: the devices.
          model: the model before training.
          data: whose held-out side is measured.
          tuned: what was changed.
          batch_size: images at a time, a multiple of what the mesh divides rows by.

        Returns:
          "loss", nats per image, and "accuracy", the share of images whose class is the most
          likely one.
        """
        rows = data.held_out[np.arange(len(data.held_out))]
        loss, right = in_parts(job, _scores, apply(model, tuned), tuned.edits, rows, batch_size)
        return {"loss": float(loss.mean()), "accuracy": float(right.mean())}


@jax.jit
def _scores(
    model: Transformer, edits: Edits | None, rows: tuple[Array, Array]
) -> tuple[Array, Array]:
    images, labels = rows
    loss, right = class_scores(model(images, edits=edits), labels)
    return whole(loss, 0), whole(right, 0)
