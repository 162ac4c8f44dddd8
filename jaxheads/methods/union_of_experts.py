"""A small language model from scratch whose attention and MLP are unions of experts.

Source: Yang et al., "Union of Experts" (UoE), known from its released code; what is done here and
why it differs is in `jaxheads.edits.experts`, the tokenizer and the random start in
`jaxheads.methods.from_scratch`. The released code has a router for each layer and branch too, keeps
half of the experts of attention and 2 of 4 of the MLP; it has no load-balance loss.

Two controls are trained from the same start, for as many steps on the same batches: the dense
model, and random routing, where the experts of each token are drawn and not chosen. What came out
is in docs/methods.md. Everything is computed densely and then multiplied by gates: `flops_share`
says what a routed execution would need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.edits import Edits
from jaxheads.edits.experts import SITES, Experts, OwnTokens, check_experts, find_experts
from jaxheads.edits.mixture import STD
from jaxheads.edits.route import layer_keys
from jaxheads.methods.fine_tuning import Rest
from jaxheads.methods.from_scratch import FromScratch, Shape
from jaxheads.methods.method import TextData, Tuned
from jaxheads.methods.objective import rows_of
from jaxheads.methods.variants import fit_variants, routed_loss
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context, Tap
from jaxheads.model.parameters import parameter_table
from jaxheads.model.transformer import Transformer
from jaxheads.routing import RoutingPenalty, RoutingSums, sums_of
from jaxheads.train.step import Metrics

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "uoe"
BRANCHES = {"attention": "attn_in", "mlp": "mlp_in"}
"""The branches of a block, and what their routers read."""


@dataclass(frozen=True)
class Selection:
    """How a branch is cut into experts, and how they are matched with tokens.

    Attributes:
      experts: n.
      top_k: experts of each token, which it chooses; or
      capacity: share of a row's tokens that each expert takes, which it chooses (encoders only).
    """

    experts: int = 4
    top_k: int | None = None
    capacity: float | None = None

    @property
    def share(self) -> float:
        """Mean share of the tokens that an expert has."""
        return self.capacity or (self.top_k or 0) / self.experts

    def check(self, config: ModelConfig, branch: str) -> None:
        """Refuses what does not fit a model, as `check_experts` does."""
        source = BRANCHES[branch]
        try:
            check_experts(config, source, self.experts, top_k=self.top_k, capacity=self.capacity)
        except ValueError as error:
            raise ValueError(f"{branch}: {error}") from error


def union_of_experts(
    config: ModelConfig,
    key: Array,
    *,
    attention: Selection | None = None,
    mlp: Selection | None = None,
    random: bool = False,
) -> Edits:
    """Attention and MLP as unions of experts; see `jaxheads.edits.experts`.

    Args:
      config: of the model.
      key: of the routers' weights, normal with standard deviation 0.02, or of the draws.
      attention: how attention is cut by heads; None leaves it alone.
      mlp: how the MLP is cut by neurons; None leaves it alone.
      random: match experts and tokens by draws instead, with gates of 1. A control.

    Returns:
      Edits of `scores` and `z`, and of `neurons`.

    Raises:
      ValueError: neither branch, or as `check_experts`.
    """
    selections = {"attention": attention, "mlp": mlp}
    if attention is None and mlp is None:
        raise ValueError("give attention, mlp or both: a union of no experts does nothing")
    edits: dict[str, Any] = {} if attention is None else {"scores": OwnTokens()}
    for index, (branch, selection) in enumerate(selections.items()):
        if selection is None:
            continue
        selection.check(config, branch)
        source, mine = BRANCHES[branch], jax.random.fold_in(key, index)
        shape = (config.n_layers, config.d_model, selection.experts)
        edits[SITES[source]] = Experts(
            gating=None if random else STD * jax.random.normal(mine, shape),
            keys=layer_keys(mine, config.n_layers) if random else None,
            source=source,
            n_experts=selection.experts,
            top_k=selection.top_k,
            capacity=selection.capacity,
        )
    return Edits(edits)


def expert_sums(value: Array, context: Context) -> RoutingSums:
    """Reducer for taps of `attn_out` and `mlp_out`: sums over real tokens of the branch's experts.

    As `jaxheads.routing.routing_sums`, with experts in the place of heads.
    """
    experts = find_experts(context.edits, {"attn_out": "z", "mlp_out": "neurons"}[context.site])
    kept = experts.top_k or experts.n_experts * (experts.capacity or 0.0)
    return sums_of(experts.routing(context), context.token_mask, experts.n_experts, kept)


@struct.dataclass
class ExpertPenalty:
    """Load-balance and z-losses of both branches, for losses that take a `penalty`.

    Attributes:
      weights: of the losses. The balance loss of a branch is k where its load is even.
    """

    weights: RoutingPenalty

    @property
    def taps(self) -> Mapping[str, Tap]:
        """What is read: sums over the tokens of the batch."""
        reduce = jax.tree_util.Partial(expert_sums)
        return {"attention": Tap("attn_out", reduce), "mlp": Tap("mlp_out", reduce)}

    def __call__(self, tapped: Mapping[str, Any]) -> tuple[Array, Metrics]:
        """The weighted sum, and the metrics of `RoutingPenalty` for each branch, such as
        "mlp_balance" and "attention_largest_load".
        """
        value, metrics = jnp.zeros(()), dict[str, Array]()
        for branch in BRANCHES:
            term, found = self.weights({"routing": tapped[branch]})
            value = value + term
            metrics |= {f"{branch}_{name}": metric for name, metric in found.items()}
        return value, metrics


@dataclass(frozen=True)
class UnionOfExperts(FromScratch):
    """Settings: those of `FromScratch` and more.

    Attributes:
      shape: of the model; 8 heads.
      attention: how attention is cut by heads.
      mlp: how the MLP is cut by neurons.
      balance: weight of the load-balance loss.
      z: weight of the routers' z-loss.
      controls: whether the dense model and random routing are trained too.

    Raises:
      ValueError: a negative weight.
    """

    shape: Shape = field(default_factory=lambda: Shape(n_heads=8))
    attention: Selection = field(default_factory=lambda: Selection(8, top_k=4))
    mlp: Selection = field(default_factory=lambda: Selection(4, top_k=2))
    balance: float = 0.01
    z: float = 0.0
    controls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        RoutingPenalty(self.balance, self.z)

    def train(
        self, job: Job, model: Transformer, tokenizer: Any, data: TextData
    ) -> dict[str, Tuned]:
        """Trains every parameter of what `create` made, with experts and as the controls.

        Returns:
          "uoe"; with controls "random" and "dense".

        Raises:
          ValueError: experts that the model cannot be cut into.
        """
        # Not the key of which the parameters were drawn.
        key = jax.random.fold_in(jax.random.key(job.seed), 1)
        experts: dict[str, Any] = {"attention": self.attention, "mlp": self.mlp}
        variants: dict[str, Edits | None] = {NAME: union_of_experts(model.config, key, **experts)}
        if self.controls:
            variants["random"] = union_of_experts(model.config, key, **experts, random=True)
            variants["dense"] = None
        return fit_variants(
            job,
            routed_loss,
            model.params,
            variants,
            rest=Rest({}, model.config, self.remat, self.chunk, self.z_loss),
            penalty=ExpertPenalty(RoutingPenalty(self.balance, self.z)),
            fit=self.fit,
            rows=rows_of(data),
        )


def flops_share(config: ModelConfig, length: int, *, attention: Selection, mlp: Selection) -> float:
    """Operations of the blocks' products that a routed execution needs, over those of all tokens.

    An expert with the share a of the tokens needs a of the products with its weights and, of
    queries with keys and of weights with values, a^2, whatever the causal mask hides. A key/value
    head that m experts share is needed at 1 - (1 - a)^m of the tokens, if they choose
    independently. Routers add D n for each token and branch.

    Args:
      config: of the model, a stack without cross-attention.
      length: T, tokens of a row.
      attention: experts of attention.
      mlp: experts of the MLP.
    """
    a, b = attention.share, mlp.share
    sharing = max(1, attention.experts // config.n_kv_heads)
    heads, width = config.n_heads * config.head_dim, config.d_model
    queries, keys = 2 * heads * width, 2 * config.n_kv_heads * config.head_dim * width
    products = 2 * length * heads
    matrices = 3 if "blocks/mlp/gate" in parameter_table(config) else 2
    hidden = matrices * width * config.d_mlp
    routers = width * (attention.experts + mlp.experts)
    routed = a * queries + (1 - (1 - a) ** sharing) * keys + a**2 * products + b * hidden
    return (routed + routers) / (queries + keys + products + hidden)
