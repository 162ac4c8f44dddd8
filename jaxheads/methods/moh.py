"""MoH: a dense model continue-tuned to use a part of its heads at each token.

Source: Jin et al. (2024), "MoH: Multi-Head Attention as Mixture-of-Head Attention", section 4.4
(LLaMA3-8B), and its released model; the forms of routing are in `jaxheads.edits.route`. In the
paper half of all heads are shared, two thirds of those that stay on, and 8 of the other 16 are
chosen by the norm of the query before its rotary encoding, with gates of 0 or 1 and a
straight-through gradient; load-balance weight 0.01. The released code has inference only.

Two controls are trained for as many steps on the same batches: the dense model, because the paper's
own table G shows that it gains as much from the further training; and random routing, where the
heads of each token are drawn and not chosen.

The paper's 100 billion tokens are not for a laptop: what a few dozen steps recover of the loss
that routing costs at first is in docs/methods.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxheads.data.rows import ArrayRows
from jaxheads.edits import Edits, Route, mixture_of_heads
from jaxheads.edits.mixture import heads_on
from jaxheads.edits.route import GATES, SCORES
from jaxheads.methods.fine_tuning import Rest
from jaxheads.methods.measure import apply, readable
from jaxheads.methods.method import Data, TaskData, Tuned
from jaxheads.methods.objective import rows_of
from jaxheads.methods.variants import fit_variants, routed_loss
from jaxheads.model.config import ModelConfig
from jaxheads.model.layout import REMAT
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.routing import RoutingPenalty, examine, in_batches
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import select

if TYPE_CHECKING:
    from jaxheads.text import Tokenizer
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "moh"
EXAMINED = 32
"""Held-out rows whose routing is looked at after training."""


@dataclass(frozen=True)
class Routed:
    """Settings of routing.

    Attributes:
      shares: mean shares of heads that stay on; the first is the one that is saved.
      shared: share of those that are on which is on at every token; the first heads of a layer.
      whole_layers: how many of the first layers keep all heads; the others keep fewer, so that the
        mean over layers is the share.
      gates: one of `jaxheads.edits.route.GATES`.
      scores: one of `jaxheads.edits.route.SCORES`.
      balance: weight of the load-balance loss.
      z: weight of the routers' z-loss.

    Raises:
      ValueError: an unknown form, no shares or one outside (0, 1], a negative number of layers
        or weight.
    """

    shares: tuple[float, ...] = (0.75, 0.5)
    shared: float = 0.6
    whole_layers: int = 0
    gates: str = "renormalised"
    scores: str = "linear"
    balance: float = 0.01
    z: float = 0.0

    def __post_init__(self) -> None:
        choose("gates", self.gates, GATES)
        choose("scores", self.scores, SCORES)
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares must lie in (0, 1], at least one, got {self.shares}")
        if len(set(self.shares)) < len(self.shares):
            raise ValueError(f"shares must differ, got {self.shares}")
        if not 0 <= self.shared <= 1:
            raise ValueError(f"shared must lie in [0, 1], got {self.shared}")
        if self.whole_layers < 0:
            raise ValueError(f"whole_layers must be at least 0, got {self.whole_layers}")
        RoutingPenalty(self.balance, self.z)

    @property
    def penalty(self) -> RoutingPenalty:
        """What is added to the task loss."""
        return RoutingPenalty(self.balance, self.z)

    def route(self, config: ModelConfig, share: float, key: Array) -> Route:
        """A new router for a model.

        Raises:
          ValueError: as `heads_on` and `mixture_of_heads`.
        """
        layers, heads, whole = config.n_layers, config.n_heads, self.whole_layers
        counts = heads_on(layers, heads, share, whole)
        mean = heads * (share * layers - whole) / max(layers - whole, 1)
        shared = np.minimum(counts, int(self.shared * mean + 0.5))
        # Nothing is left to choose in a whole layer.
        shared[:whole] = heads
        edits = mixture_of_heads(
            config,
            key,
            shared=shared.tolist(),
            top_k=(counts - shared).tolist(),
            gates=self.gates,
            scores=self.scores,
        )
        route: Route = edits["z"]  # type: ignore[assignment]
        return route

    def variants(
        self, config: ModelConfig, key: Array, *, controls: bool
    ) -> dict[str, Edits | None]:
        """A new router for each share, for `fit_variants`.

        Returns:
          "moh 0.75", ...; with controls "random 0.75", ... and "dense", which has no edits.

        Raises:
          ValueError: as `route`.
        """
        ways = {NAME: self}
        if controls:
            ways["random"] = dataclasses.replace(self, scores="random")
        routed: dict[str, Edits | None] = {
            f"{name} {share:g}": Edits(z=way.route(config, share, key))
            for name, way in ways.items()
            for share in way.shares
        }
        return routed | ({"dense": None} if controls else {})


@dataclass(frozen=True)
class Moh:
    """Settings.

    Attributes:
      routing: which heads stay on, and how they are chosen.
      patterns: which parameters are trained beside the router, as in `jaxheads.train.select`.
      controls: whether the dense model and random routing are trained too.
      remat: what blocks keep for the backward pass, as in `Transformer`.
      chunk: tokens of a row unembedded at a time; None for all.
      fit: how all are trained.

    Raises:
      ValueError: an unknown `remat`.
    """

    routing: Routed = field(
        default_factory=lambda: Routed(gates="straight_through", scores="query_norm")
    )
    patterns: tuple[str, ...] = ("*",)
    controls: bool = True
    remat: str = "none"
    chunk: int | None = None
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=100,
            optimizer=Optimizer(learning_rate=1e-4, schedule="cosine", warmup=5, end=0.1, clip=1.0),
        )
    )

    def __post_init__(self) -> None:
        choose("remat", self.remat, REMAT)

    def train(self, job: Job, model: Transformer, tokenizer: Any, data: Data) -> dict[str, Tuned]:
        """Trains the shares and the controls.

        Returns:
          "moh 0.75", ...; with controls "dense" and "random 0.75", ...; and as they are before
          training "moh 0.75 at first", ...

        Raises:
          ValueError: a pattern that chooses nothing, shares that the model's heads do not allow.
        """
        key = jax.random.key(job.seed)
        variants = self.routing.variants(model.config, key, controls=self.controls)
        chosen = select(model.params, self.patterns)
        tuned = fit_variants(
            job,
            routed_loss,
            chosen.trainable,
            variants,
            rest=Rest(chosen.frozen, model.config, self.remat, self.chunk),
            penalty=self.routing.penalty,
            fit=self.fit,
            rows=rows_of(data),
        )
        before = {f"{name} at first": Tuned(edits) for name, edits in variants.items() if edits}
        return tuned | before

    def examine(
        self, model: Transformer, tokenizer: Tokenizer, data: Data, tuned: Tuned
    ) -> dict[str, Any]:
        """What the router does on held-out rows, as JSON; see `jaxheads.routing.examine`."""
        return examine_routing(model, tokenizer, data, tuned)


def examine_routing(
    model: Transformer, tokenizer: Tokenizer, data: Data, tuned: Tuned
) -> dict[str, Any]:
    """`RoutingView.to_json` of a routed variant on the first `EXAMINED` held-out rows.

    Computed on one device.

    Args:
      model: before training.
      tokenizer: of the model.
      data: whose held-out rows are read.
      tuned: edits with a `Route`, and the parameters that changed.
    """
    rows = ArrayRows(data.held_out_batch) if isinstance(data, TaskData) else data.held_out
    assert tuned.edits is not None
    # By way of the host: arrays keep the mesh that they are divided over in their types.
    parts = jax.device_get(readable((apply(model, tuned), tuned.edits)))
    changed, edits = jax.device_put(parts, jax.local_devices()[0])
    return examine(changed, in_batches(rows, EXAMINED, 8), edits, tokenizer).to_json()
