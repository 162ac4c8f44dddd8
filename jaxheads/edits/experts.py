"""`Experts` and `OwnTokens`: attention and MLP as unions of experts, each with its own tokens.

Source: Yang et al., "Union of Experts" (UoE), known from its released code. Attention is cut by
heads and the MLP by hidden neurons into n equal parts, as tensor parallelism cuts them: all of
them together are the layer. A router scores each token, p = softmax(x W_g) over the experts, with x
the input of the branch (`attn_in`, `mlp_in`). Who chooses whom:

| choice | who | gate of a token's expert e | where |
|---|---|---|---|
| token | each token its `top_k` best experts | k p_e / (sum of p over its experts) | any model |
| expert | each expert its ceil(capacity * real tokens) best tokens of the row | n p_e | encoders |

The gate of an expert that does not have the token is 0. With a router of zeros every other gate
is exactly 1. The second form is that of Zhou et al. (2022), "Mixture-of-Experts with Expert Choice
Routing", times n: it is not divided by what the token's experts sum to, so that the router of a
token with one expert has a gradient. For the same reason `top_k = 1` is refused.

An attention expert sees only its own tokens (`OwnTokens`): its heads do not see the keys of others.
Biases of the output projection and of `down` are added once, outside of the experts.

What the released code does otherwise, and why this does not:

- Gates only pick tokens and never multiply an output, so that W_g has no gradient: it would stay
  random. Here they multiply.
- Gates are normalised over the batch, so that an output depends on batch mates. Here over the
  experts of a token.
- Experts take their best tokens of the whole sequence in causal models too, where later tokens
  then decide about earlier ones. Here an expert's choice is refused for causal models.
- An expert numbers its tokens 0..c-1 for the rotary encoding. Here they keep their positions:
  distances stay those of the text, and what a key is does not depend on who reads it, so that
  experts can share key/value heads.
- It can also choose experts for a whole sequence, by a matrix applied to all its tokens in a row.
  That is left out: it is made for one length, and reads the future.

Texts packed into one row compete with one another where experts choose. Generation over a key/value
cache is refused: the cache does not hold which expert took a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.edits.route import Routing, layer_keys, softmax_among, top_k_among
from jaxheads.model.attention import MASKED
from jaxheads.model.config import ModelConfig
from jaxheads.model.context import Context
from jaxheads.model.layout import axes_of, contract, lay, whole
from jaxheads.names import choose

Array = jax.Array

SITES = {"attn_in": "z", "mlp_in": "neurons"}
"""Where the experts of a branch act, by what its router reads."""
FINEST = 10_000
"""A capacity counts as the nearest fraction with a denominator up to this."""


@struct.dataclass
class Experts:
    """z or neurons times the gates of their experts.

    For the sites `z` (with `OwnTokens` at `scores`) and `neurons`. See the module for the gates.
    Exactly one of `gating` and `keys`, and of `top_k` and `capacity`, is given. In the block
    stack the leading axis L is sliced away.

    Attributes:
      gating: float32 [L,D,n], W_g, the weights of the router.
      keys: uint32 [L,2], the data of random keys: tokens and experts are matched by draws for
        each row and slot, with gates of 1. A control.
      source: "attn_in" at `z`, "mlp_in" at `neurons`. Static.
      n_experts: n. Expert e has the e-th n-th of the heads or of the neurons. Static.
      top_k: experts of each token. Static.
      capacity: share of a row's real tokens that each expert takes. Static.
    """

    gating: Array | None = None
    keys: Array | None = None
    source: str = struct.field(pytree_node=False, default="attn_in")
    n_experts: int = struct.field(pytree_node=False, default=1)
    top_k: int | None = struct.field(pytree_node=False, default=None)
    capacity: float | None = struct.field(pytree_node=False, default=None)

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns z [B,T,H,Dh] or neurons [B,T,F] times the gates.

        Raises:
          ValueError: another site than the experts' own, or as `routing`.
        """
        if context.site != SITES.get(self.source):
            raise ValueError(
                f"experts that read {self.source!r} act at {SITES.get(self.source)!r}, "
                f"got {context.site!r}"
            )
        gates = _parts(self.routing(context).gates, value.shape[2])
        gates = lay(gates, axes_of(value)[:3]).astype(value.dtype)
        return value * (gates[..., None] if value.ndim == 4 else gates)

    @property
    def weights(self) -> dict[str, Array]:
        """What is trained: "gating", unless experts are random."""
        return {} if self.gating is None else {"gating": self.gating}

    def with_weights(self, weights: Mapping[str, Any]) -> Experts:
        """The experts with other weights, as `weights` gives them."""
        return dataclasses.replace(self, **weights)

    def without_weights(self) -> Experts:
        """The experts without what is trained."""
        return dataclasses.replace(self, gating=None)

    def redrawn(self, key: Array) -> Experts:
        """Random experts that draw anew, others in each branch; any other as they are."""
        if self.keys is None:
            return self
        mine = jax.random.fold_in(key, list(SITES).index(self.source))
        return dataclasses.replace(self, keys=layer_keys(mine, len(self.keys)))

    def routing(self, context: Context) -> Routing:
        """Which experts have which tokens; the last axis of all is n.

        A token whose scores are NaN has gates of NaN.

        Args:
          context: knows `source`.

        Raises:
          ValueError: experts that do not fit the model; those that choose, in a causal one.
        """
        self._check(context.config)
        scores, draws = self._scores(context)
        probabilities = softmax_among(scores, True)
        ranking = probabilities if draws is None else draws
        if self.capacity is None:
            chosen = top_k_among(ranking, self.top_k or 0)
            gates = softmax_among(scores, chosen, self.top_k or 0)
        else:
            chosen = best_tokens(ranking, context.token_mask, self.capacity)
            gates = softmax_among(scores, True, self.n_experts)
        gates = jnp.where(chosen | jnp.isnan(probabilities), gates, 0.0)
        log_z = jax.nn.logsumexp(scores, axis=-1)
        return Routing(probabilities, chosen, gates, log_z)

    def _scores(self, context: Context) -> tuple[Array, Array | None]:
        """The router's scores, float32 [B,T,n], and as many draws of random experts."""
        x = getattr(context, self.source)
        if self.gating is not None:
            # Not rounded to bfloat16, and on every device of a mesh whole over experts.
            gating = self.gating.astype(jnp.float32)
            return whole(contract("btd,dn->btn", x.astype(jnp.float32), gating), 2), None
        assert self.keys is not None
        shape, axes = (*x.shape[:2], self.n_experts), (*axes_of(x)[:2], ())
        drawn = jax.random.uniform(jax.random.wrap_key_data(self.keys), shape)
        return lay(jnp.zeros(shape), axes), lay(drawn, axes)

    def _check(self, config: ModelConfig) -> None:
        check_experts(config, self.source, self.n_experts, top_k=self.top_k, capacity=self.capacity)
        if (self.gating is None) == (self.keys is None):
            raise ValueError("experts need one of gating and keys")
        expected = (config.d_model, self.n_experts)
        if self.gating is not None and jnp.shape(self.gating) != expected:
            raise ValueError(
                f"gating has shape {jnp.shape(self.gating)} per layer, expected {expected} of "
                f"this model and {self.n_experts} experts: it was made for others"
            )


@struct.dataclass
class OwnTokens:
    """Hides from the heads of each expert the keys of tokens that it does not have.

    For the site `scores`. Who has which token is read off the `Experts` at `z`, so that there is
    one router, and computed from the same values, so that the compiler computes it once. Every
    token sees itself: what an expert computes for a token that it does not have is defined, and
    then multiplied by 0.
    """

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns the logits [B,H,T,S], those of hidden keys being `MASKED`.

        Raises:
          ValueError: no `Experts` at `z`, or keys in a cache.
        """
        heads, queries, keys = value.shape[1:]
        if context.site != "scores" or queries != keys:
            raise ValueError(
                f"an expert's own tokens are known among {queries} tokens computed together, got "
                f"keys of {keys} at {context.site!r}: generation over a key/value cache, which "
                "does not hold which expert has a token, and cross-attention are not possible"
            )
        taken = whole(find_experts(context.edits, "z").routing(context).chosen, 1)
        seen = _parts(taken, heads).transpose(0, 2, 1)[:, :, None]
        rows, over, _, columns = axes_of(value)
        seen = lay(seen, (rows, over, (), columns))
        own = jnp.arange(keys) == context.slots[:, None, :, None]
        return jnp.where(seen | own, value, MASKED)


def find_experts(edits: Mapping[str, Any], site: str) -> Experts:
    """The `Experts` among the edits of a site, also inside chains and gates.

    Raises:
      ValueError: none, or several.
    """
    nodes = jax.tree.leaves(edits.get(site), is_leaf=_is_experts)
    found = [node for node in nodes if _is_experts(node)]
    if len(found) != 1:
        raise ValueError(f"expected one Experts among the edits of {site!r}, found {len(found)}")
    return found[0]


def best_tokens(ranking: Array, mask: Array, capacity: float) -> Array:
    """The ceil(capacity * real tokens) highest of each row and expert; ties to the earlier.

    Args:
      ranking: [B,T,n].
      mask: bool [B,T], real tokens; the others are never taken.
      capacity: share in (0, 1], see `FINEST`.

    Returns:
      bool [B,T,n].
    """
    share = Fraction(capacity).limit_denominator(FINEST)
    # In whole numbers: 0.55 * 100 is more than 55 in floating point.
    real = jnp.sum(mask, axis=1, dtype=jnp.int32)
    counts = (share.numerator * real + share.denominator - 1) // share.denominator
    mask = mask[..., None]
    ranking = whole(jax.lax.stop_gradient(ranking), 1)
    order = jnp.argsort(jnp.where(mask, -ranking, jnp.inf), axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    return (place < counts[:, None, None]) & mask


def check_experts(
    config: ModelConfig,
    source: str,
    n_experts: int,
    *,
    top_k: int | None = None,
    capacity: float | None = None,
) -> None:
    """Refuses experts that a model cannot be cut into, or cannot use.

    Args:
      config: of the model.
      source: "attn_in" or "mlp_in".
      n_experts: n.
      top_k: experts of each token, or
      capacity: share of the tokens of each expert.

    Raises:
      ValueError: n does not divide the heads or neurons; an expert would have parts of two
        groups of heads that share keys; k beyond 2 to n (or 1 = n), a capacity outside (0, 1],
        both or neither; a capacity for a causal model.
    """
    choose("input of experts", source, SITES)
    sizes = {"attn_in": ("n_heads", config.n_heads), "mlp_in": ("d_mlp", config.d_mlp)}
    name, size = sizes[source]
    if n_experts < 1 or size % n_experts:
        raise ValueError(f"n_experts must divide {name} = {size}, got {n_experts}")
    kv = config.n_kv_heads
    if source == "attn_in" and kv % n_experts and n_experts % kv:
        raise ValueError(
            f"n_experts must divide n_kv_heads = {kv} or be a multiple of it, so that no expert "
            f"has parts of two groups of heads, got {n_experts}"
        )
    if (top_k is None) == (capacity is None):
        raise ValueError(f"give one of top_k and capacity, got {top_k} and {capacity}")
    if top_k is not None and not min(2, n_experts) <= top_k <= n_experts:
        raise ValueError(
            f"top_k must lie between 2 and the {n_experts} experts, got {top_k}: the gate of a "
            "token's only expert is 1 whatever the router says, so it would learn nothing"
        )
    if capacity is not None:
        if not 1 / FINEST <= capacity <= 1:
            raise ValueError(f"capacity must lie in [{1 / FINEST:g}, 1], got {capacity}")
        if config.causal:
            raise ValueError(
                f"capacity = {capacity}: in a causal model experts cannot choose their tokens, "
                "because later tokens would decide about earlier ones; give top_k"
            )


def _is_experts(node: Any) -> bool:
    return isinstance(node, Experts)


def _parts(x: Array, size: int) -> Array:
    """A value of each expert [B,T,n] at each of its heads or neurons [B,T,size]."""
    b, t, n = x.shape
    return jnp.broadcast_to(x[..., None], (b, t, n, size // n)).reshape(b, t, size)
