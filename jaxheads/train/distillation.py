"""Distillation: training a model, or edits, to do what a frozen teacher does.

Source: Hinton, Vinyals and Dean (2015), "Distilling the Knowledge in a Neural Network", for the
divergence at a temperature; Romero et al. (2015), "FitNets", for hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.model.batch import Batch
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer
from jaxheads.sites import find_site
from jaxheads.token_scores import (
    before_logits,
    check_predicts,
    mean,
    next_tokens,
    over_slots,
    targets,
)
from jaxheads.train.losses import Metrics

Array = jax.Array
Edits = Mapping[str, Edit]


def distillation_loss(
    student: Transformer,
    teacher: Transformer,
    batch: Batch,
    *,
    edits: Edits | None = None,
    teacher_edits: Edits | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    remat: str = "none",
) -> tuple[Array, Metrics]:
    """The mean over target tokens of temperature^2 * KL(teacher || student).

    Both distributions are softmax(logits / temperature); the factor keeps the size of gradients
    about the same at every temperature. No gradient flows to the teacher.

    Args:
      student: what is trained, or is trained by its edits.
      teacher: the model to follow; may be the student itself, with other edits.
      batch: tokens; what counts is as in `losses.language_loss`.
      edits: of the student.
      teacher_edits: of the teacher.
      temperature: above 1 gives unlikely tokens more say.
      chunk: as for `losses.language_loss`, for both models' logits.
      remat: as for the model.

    Returns:
      The loss, float32 [], in nats (0 for equal models), and the metrics "weight", the number of
      targets, and "agreement", the share of targets where both find the same token most likely.

    Raises:
      ValueError: vocabularies of different sizes, a temperature that is not positive, and
        what `losses.language_loss` refuses.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has a vocabulary of {sizes[0]}, expected the teacher's {sizes[1]}"
        )
    teacher, teacher_edits = jax.lax.stop_gradient((teacher, teacher_edits))
    _, counted = next_tokens(batch)
    if chunk is None:
        for model in (student, teacher):
            check_predicts(model)
        ours = student(batch, edits=edits, remat=remat).logits
        theirs = teacher(batch, edits=teacher_edits).logits
        divergence, same = _divergence(ours, theirs, temperature)
    else:
        ours, unembed, _ = before_logits(student, batch, edits=edits, remat=remat)
        theirs, teacher_unembed, _ = before_logits(teacher, batch, edits=teacher_edits)

        def compare(x: Array, y: Array) -> tuple[Array, Array]:
            return _divergence(unembed(x), teacher_unembed(y), temperature)

        divergence, same = over_slots(compare, chunk, ours, theirs)
    metrics = {
        "weight": jnp.sum(counted, dtype=jnp.float32),
        "agreement": mean(same, counted),
    }
    return mean(divergence, counted), jax.lax.stop_gradient(metrics)


def _divergence(student: Array, teacher: Array, temperature: float) -> tuple[Array, Array]:
    """temperature^2 * KL of each slot, [B,T], and whether the most likely tokens agree."""
    ours = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    theirs = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    # A token that the teacher rules out (probability 0) adds nothing.
    terms = jnp.where(theirs > -jnp.inf, jnp.exp(theirs) * (theirs - ours), 0.0)
    same = jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1)
    return temperature**2 * jnp.sum(terms, axis=-1), same


def hidden_loss(
    student: Transformer,
    teacher: Transformer,
    batch: Batch,
    site: str,
    *,
    edits: Edits | None = None,
    teacher_edits: Edits | None = None,
    remat: str = "none",
) -> tuple[Array, Metrics]:
    """Mean squared difference of both models' values at a site.

    Args:
      student: what is trained, or is trained by its edits.
      teacher: the model to follow. No gradient flows to it.
      batch: tokens. Real tokens count that follow a real one: the first is an attention sink,
        whose norm would outweigh all others; see docs/architecture.md.
      site: where, e.g. "resid_post" or "final"; all layers count alike.
      edits: of the student.
      teacher_edits: of the teacher.
      remat: as for the model.

    Returns:
      The loss, float32 [], the mean over tokens, layers and features, and the metric "weight",
      the number of tokens.

    Raises:
      ValueError: an unknown site, or values of different shapes.
    """
    wanted = find_site(site)
    teacher, teacher_edits = jax.lax.stop_gradient((teacher, teacher_edits))
    ours = student(batch, edits=edits, taps=site, remat=remat).taps[site]
    theirs = teacher(batch, edits=teacher_edits, taps=site).taps[site]
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{site!r} has shape {ours.shape} in the student, expected the teacher's {theirs.shape}"
        )
    squares = jnp.square(ours.astype(jnp.float32) - theirs.astype(jnp.float32))
    axes = ("L",) * wanted.stacked + wanted.axes
    others = tuple(i for i, axis in enumerate(axes) if axis not in ("B", "T"))
    counted = targets(replace(batch, targets=None))
    metrics: dict[str, Any] = {"weight": jnp.sum(counted, dtype=jnp.float32)}
    return mean(jnp.mean(squares, axis=others), counted), metrics
