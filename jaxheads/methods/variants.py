"""Variants of one model, trained from the same start: with routers of heads or experts, or dense.

A variant is an `Edits`, whose `Route` and `Experts` at their sites are trained beside the model's
parameters, or None for the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import struct

from jaxheads.edits import Edits, Experts, Route
from jaxheads.methods.fine_tuning import as_stored, in_float32
from jaxheads.methods.method import Tuned
from jaxheads.methods.objective import fit_loss
from jaxheads.model.context import Tap
from jaxheads.model.parameters import Tree
from jaxheads.train.fit import Fit
from jaxheads.train.losses import Penalty
from jaxheads.train.step import Loss, Metrics

if TYPE_CHECKING:
    from jaxheads.data import Rows
    from jaxheads.train.job import Job

Array = jax.Array
Weights = Mapping[str, Mapping[str, Array]]
"""What of the routers is trained: by site, then by name."""


@struct.dataclass
class Fixed:
    """What of a variant is not trained; the second argument of its loss.

    Attributes:
      rest: what else the loss needs, such as the frozen parameters and the config.
      edits: with routers without their weights; None for the dense model.
      penalty: of what the routers do; None for the dense model.
    """

    rest: Any
    edits: Edits | None = None
    penalty: Penalty | None = None

    def acting(self, weights: Weights, key: Array | None) -> Edits | None:
        """The edits with weights that are trained.

        Args:
          weights: as `router_weights` gives them.
          key: random key of a training step, at each of which random routers draw anew; None
            when measuring.
        """
        if self.edits is None:
            return None
        made = {site: self.edits[site].with_weights(weights[site]) for site in weights}  # type: ignore[attr-defined]
        if key is not None:
            made = {site: router.redrawn(key) for site, router in made.items()}
        return Edits({**self.edits, **made})

    @property
    def taps(self) -> Mapping[str, Tap]:
        """What the penalty reads."""
        return {} if self.penalty is None else self.penalty.taps

    def total(self, loss: Array, metrics: Metrics, tapped: Mapping[str, Any]) -> Any:
        """The loss plus the penalty, and the metrics with those of the penalty.

        Args:
          loss: of the task, float32 [].
          metrics: of the task; with a penalty "task_loss", the loss without it, is added.
          tapped: what `taps` gave.
        """
        if self.penalty is not None:
            value, more = self.penalty(tapped)
            loss, metrics = loss + value, metrics | more | {"task_loss": loss}
        return loss, jax.lax.stop_gradient(metrics)


def router_weights(edits: Edits | None) -> dict[str, dict[str, Array]]:
    """What of the routers of a variant is trained: a dict for each, by its site."""
    return {site: router.weights for site, router in _routers(edits).items()}


def split_variant(
    start: Tree, edits: Edits | None, rest: Any, penalty: Penalty | None
) -> tuple[dict[str, Any], Fixed]:
    """What of a variant is trained, {"params": start, "edits": weights}, and what is not."""
    trainable = {"params": start, "edits": router_weights(edits)}
    if edits is None:
        return trainable, Fixed(rest)
    bare = {site: router.without_weights() for site, router in _routers(edits).items()}
    return trainable, Fixed(rest, Edits({**edits, **bare}), penalty)


def fit_variants(
    job: Job,
    loss: Loss,
    start: Tree,
    variants: Mapping[str, Edits | None],
    *,
    rest: Any,
    penalty: Penalty,
    fit: Fit,
    rows: Mapping[str, Rows],
) -> dict[str, Tuned]:
    """Trains parameters and routers together for each variant, each as a stage of a job.

    All begin with the same parameters and see the same batches.

    Args:
      job: the devices and the loop.
      loss: of ({"params": ..., "edits": ...}, `Fixed`, item, key), a function at module level.
      start: the parameters to train; they are trained in float32.
      variants: the routers to begin with, or None, by name of the variant.
      rest: of `Fixed`.
      penalty: of the routing.
      fit: steps, batch size and optimizer.
      rows: `rows` and `held_out` of `Job.fit`.

    Returns:
      The variants, with parameters in the dtypes of `start`.
    """
    begin, tuned = in_float32(start), {}
    for name, edits in variants.items():
        trainable, fixed = split_variant(begin, edits, rest, penalty)
        found = job.fit(name, loss, trainable, fixed, fit=fit, **rows)
        tuned[name] = Tuned(
            edits=fixed.acting(found["edits"], None),
            params=as_stored(found["params"], start),
            trained=sum(leaf.size for leaf in jax.tree.leaves(trainable)),
        )
    return tuned


def routed_loss(
    trainable: Tree, fixed: Fixed, item: Any, key: Array | None
) -> tuple[Array, Metrics]:
    """Task loss of a language model plus the penalty; `fixed.rest` is a `Rest`."""
    rest = fixed.rest
    return fit_loss(
        rest.model(trainable["params"]),
        item,
        edits=fixed.acting(trainable["edits"], key),
        remat=rest.remat,
        chunk=rest.chunk,
        z_loss=rest.z_loss,
        penalty=fixed.penalty,
    )


def _routers(edits: Edits | None) -> dict[str, Route | Experts]:
    if edits is None:
        return {}
    return {site: edit for site, edit in edits.items() if isinstance(edit, Route | Experts)}
