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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax

from jaxheads.data.rows import ArrayRows
from jaxheads.edits import Edits, Route, mixture_of_heads
from jaxheads.edits.mixture import layer_keys
from jaxheads.edits.route import GATES, SCORES
from jaxheads.methods.fine_tuning import Rest, as_stored, in_float32, parameters_loss
from jaxheads.methods.measure import apply, readable
from jaxheads.methods.method import Data, TaskData, Tuned
from jaxheads.methods.objective import fit_loss, rows_of
from jaxheads.model.config import ModelConfig
from jaxheads.model.layout import REMAT
from jaxheads.model.parameters import Tree
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.routing import RoutingPenalty, examine, in_batches
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import select
from jaxheads.train.step import Metrics

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
      gates: one of `jaxheads.edits.route.GATES`.
      scores: one of `jaxheads.edits.route.SCORES`.
      balance: weight of the load-balance loss.
      z: weight of the routers' z-loss.

    Raises:
      ValueError: an unknown form, no shares or one outside (0, 1], a negative weight.
    """

    shares: tuple[float, ...] = (0.75, 0.5)
    shared: float = 0.6
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
        RoutingPenalty(self.balance, self.z)

    @property
    def penalty(self) -> RoutingPenalty:
        """What is added to the task loss."""
        return RoutingPenalty(self.balance, self.z)

    def route(self, config: ModelConfig, share: float, key: Array) -> Route:
        """A new router for a model.

        Raises:
          ValueError: as `mixture_of_heads`.
        """
        edits = mixture_of_heads(
            config,
            key,
            shared=int(self.shared * share * config.n_heads + 0.5),
            share=share,
            gates=self.gates,
            scores=self.scores,
        )
        route: Route = edits["z"]  # type: ignore[assignment]
        return route

    def routes(self, config: ModelConfig, key: Array, *, random: bool) -> dict[str, Route]:
        """A new router for each share: "moh 0.75", ...; and "random 0.75", ... as controls.

        Raises:
          ValueError: as `route`.
        """
        ways = {NAME: self}
        if random:
            ways["random"] = dataclasses.replace(self, scores="random")
        return {
            f"{name} {share:g}": way.route(config, share, key)
            for name, way in ways.items()
            for share in way.shares
        }


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
        routes = self.routing.routes(model.config, jax.random.key(job.seed), random=self.controls)
        chosen = select(model.params, self.patterns)
        rest = Rest(chosen.frozen, model.config, self.remat, self.chunk)
        penalty, rows = self.routing.penalty, rows_of(data)
        tuned = fit_variants(
            job, chosen.trainable, rest, routes, penalty, self.fit, rows, dense=self.controls
        )
        before = {f"{name} at first": Tuned(Edits(z=route)) for name, route in routes.items()}
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


def weights_of(route: Route) -> dict[str, Array]:
    """What of a router is trained."""
    names = ("router", "shared_router", "balance")
    return {name: leaf for name in names if (leaf := getattr(route, name)) is not None}


def fit_variants(
    job: Job,
    start: Tree,
    rest: Rest,
    routes: Mapping[str, Route],
    penalty: RoutingPenalty,
    fit: Fit,
    rows: Mapping[str, Any],
    *,
    dense: bool,
) -> dict[str, Tuned]:
    """Trains parameters and a router together for each router, each as a stage of a job.

    All begin with the same parameters and see the same batches.

    Args:
      job: the devices and the loop.
      start: the parameters to train; they are trained in float32.
      rest: the others.
      routes: the routers to begin with, by name of the variant.
      penalty: of the routing.
      fit: steps, batch size and optimizer.
      rows: `rows` and `held_out` of `Job.fit`.
      dense: whether the parameters are trained without a router too, as "dense".

    Returns:
      The variants, with parameters in the dtypes of `start` and the routers as edits of `z`.
    """
    begin = in_float32(start)
    count = sum(leaf.size for leaf in jax.tree.leaves(start))
    tuned = {}
    for name, route in routes.items():
        weights = weights_of(route)
        frozen = {
            "rest": rest,
            "route": dataclasses.replace(route, router=None, shared_router=None, balance=None),
            "penalty": penalty,
        }
        trainable = {"params": begin, "route": weights}
        found = job.fit(name, routed_loss, trainable, frozen, fit=fit, **rows)
        tuned[name] = Tuned(
            edits=Edits(z=dataclasses.replace(route, **found["route"])),
            params=as_stored(found["params"], start),
            trained=count + sum(leaf.size for leaf in weights.values()),
        )
    if dense:
        params = job.fit("dense", parameters_loss, begin, rest, fit=fit, **rows)
        tuned["dense"] = Tuned(params=as_stored(params, start), trained=count)
    return tuned


def routed_loss(
    trainable: Tree, frozen: Any, item: Any, key: Array | None
) -> tuple[Array, Metrics]:
    """Task loss plus the routing penalty, of parameters and a router that are trained.

    While training, a random router draws anew at each step.
    """
    rest = frozen["rest"]
    route = dataclasses.replace(frozen["route"], **trainable["route"])
    model = rest.model(trainable["params"])
    if route.keys is not None and key is not None:
        route = dataclasses.replace(route, keys=layer_keys(key, model.config.n_layers))
    return fit_loss(
        model,
        item,
        edits=Edits(z=route),
        remat=rest.remat,
        chunk=rest.chunk,
        z_loss=rest.z_loss,
        penalty=frozen["penalty"],
    )
