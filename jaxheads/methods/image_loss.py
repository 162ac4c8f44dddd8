"""The loss of a classifier of images that may route its heads, and how its images are shifted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.methods.variants import Fixed
from jaxheads.model.config import ModelConfig
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Output, Transformer
from jaxheads.train.step import Metrics

Array = jax.Array
BACKGROUND = -1.0
"""The pixel that comes in where an image is shifted: black, in -1 to 1."""


@struct.dataclass
class Setup:
    """What the loss needs beside what is trained; all static.

    Attributes:
      config: of the model.
      shift: most pixels by which an image is shifted in training.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    shift: int = struct.field(pytree_node=False, default=0)


def image_loss(
    trainable: Tree, fixed: Fixed, item: Any, key: Array | None
) -> tuple[Array, Metrics]:
    """Mean cross entropy of images' classes plus the routing penalty.

    While training, images are shifted at random and a random router draws anew at each step.

    Args:
      trainable: {"params": the model's, "edits": the routers' weights}.
      fixed: the rest of the variant; `fixed.rest` is a `Setup`.
      item: images, float32 [B,height,width,C], and their classes, int32 [B].
      key: of shifts and draws; None when measuring, for none of either.

    Returns:
      The loss, float32 [], in nats per image, and the metrics "weight", the number of images;
      "accuracy"; and of a routed model those of its penalty and "task_loss", the loss without it.
    """
    images, labels = item
    draws = None
    if key is not None:
        shifts, draws = jax.random.split(key)
        images = random_shifts(images, shifts, fixed.rest.shift)
    model = Transformer(fixed.rest.config, trainable["params"])
    output = model(images, edits=fixed.acting(trainable["edits"], draws), taps=fixed.taps)
    losses, right = class_scores(output, labels)
    metrics = {"weight": jnp.float32(len(labels)), "accuracy": jnp.mean(right)}
    return fixed.total(jnp.mean(losses), metrics, output.taps)


def class_scores(output: Output, labels: Array) -> tuple[Array, Array]:
    """How well each image is classified: cross entropy in nats, and 1 where right.

    Args:
      output: of a model with the head "classes".
      labels: int [B].

    Returns:
      Two float32 [B].
    """
    logits = output.logits[:, 0]
    chosen = jax.nn.one_hot(labels, logits.shape[-1])
    losses = -jnp.sum(chosen * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return losses, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def random_shifts(images: Array, key: Array, most: int) -> Array:
    """Images [B,height,width,C], each moved by up to `most` pixels in each direction.

    What comes in is background, what goes out is lost.

    Args:
      images: in -1 to 1.
      key: random key.
      most: in pixels; 0 leaves all as they are.
    """
    for axis, part in zip((1, 2), jax.random.split(key), strict=True):
        shift = jax.random.randint(part, (len(images), 1, 1, 1), 0, 2 * most + 1)
        edges = [(0, 0)] * images.ndim
        edges[axis] = (most, most)
        padded = jnp.pad(images, edges, constant_values=BACKGROUND)
        # A choice among few whole shifts: slices that differ between images would be gathered.
        for start in range(2 * most + 1):
            moved = jax.lax.slice_in_dim(padded, start, start + images.shape[axis], axis=axis)
            images = jnp.where(shift == start, moved, images)
    return images
