"""`Route`: per-token gates over heads, mixture-of-head attention as an edit of `z`.

Source: Jin et al. (2024), "MoH: Multi-Head Attention as Mixture-of-Head Attention", and its
released code. Some heads of a layer are shared: on at every token. Of the others, the routed ones,
each token keeps the K with the highest router probability. The output projection then sums
g_h z_h W_O^h over heads (eq. 3), with gates g that are zero where a head was not chosen.

With x the input of attention (`attn_in`, `cross.attn_in` for `cross.z`), p = softmax(router scores)
over the routed heads, s = softmax(x W_s) over the shared ones and [a1, a2] = softmax(x W_h),
the documented gates are:

| gates | shared head | chosen routed head | where from |
|---|---|---|---|
| `two_stage` | a1 s | a2 p | the paper, eqs. 5 and 6 |
| `renormalised` | 2 a1 n s | 2 a2 K p / (sum of p over the chosen) | released ViT and DiT code |
| `straight_through` | 1 | 1, with the gradient of p | LLaMA3-8B continue-tuning |

n is the number of shared heads. With weights of zero, `renormalised` gates are 1 at every active
head. Layers in which all heads are shared, or none, have no a1 and a2 (a factor of 1 instead).

The gradient of `straight_through` gates is that of p at every routed head, also at those that were
not chosen (Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons").

Ties go to the head with the lower index, as in `jax.lax.top_k`. A token whose scores are NaN has
gates of NaN at its routed heads, in every form: a choice among them would mean nothing, and a
training step that meets it stops.

The scores of a "random" router are equal, and its heads are drawn. What is drawn picks heads and
does not weigh them, so that as a control it differs from a router in nothing but the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.model.attention import MASKED, Keys, Slots
from jaxheads.model.chosen import Logits, attend_chosen, check_alone
from jaxheads.model.context import Context
from jaxheads.model.layout import axes_of, contract, lay, whole
from jaxheads.names import choose

Array = jax.Array

GATES = ("two_stage", "renormalised", "straight_through")
SCORES = ("linear", "query_norm", "random")
PLACES = ("z", "cross.z")
"""The sites where heads can be routed."""
WEIGHTS = ("router", "shared_router", "balance")
"""What of a `Route` is trained, where it has it."""


@struct.dataclass
class Routing:
    """What a router decides at each token.

    Attributes:
      probabilities: float32 [B,T,H], softmax over the routed heads; 0 at shared ones.
      chosen: bool [B,T,H], the heads that are on: the shared ones and the K routed.
      gates: float32 [B,T,H], 0 where not chosen.
      log_z: float32 [B,T], log of the sum of exp of the router's scores.
    """

    probabilities: Array
    chosen: Array
    gates: Array
    log_z: Array


@struct.dataclass
class Route:
    """z * gates: each token uses the shared heads and the K best of the others.

    For the site `z` (or `cross.z`). See the module for the gates. In the block stack the leading
    axis L is sliced away.

    Attributes:
      shared: bool [L,H], heads that are always on.
      top_k: int32 [L], K, how many of the others each token keeps.
      router: float32 [L,D,H], W_r of a "linear" router; the columns of shared heads are unused.
      shared_router: float32 [L,D,H], W_s; None with `straight_through` gates.
      balance: float32 [L,D,2], W_h; None with `straight_through` gates.
      keys: uint32 [L,2], the data of random keys of a "random" router: heads are drawn for each
        row and slot, whatever is there. A control.
      gates: one of `GATES`. Static.
      scores: one of `SCORES`. Static. "query_norm" has no weights: the norms of the queries
        before their position encoding, divided by their unbiased standard deviation over the
        routed heads of the token.
      skip: (queries of a block, most heads on at a token in any layer) where heads that are not
        chosen are not computed, see `skipping`; None for the masked form. Static.
    """

    shared: Array
    top_k: Array
    router: Array | None = None
    shared_router: Array | None = None
    balance: Array | None = None
    keys: Array | None = None
    gates: str = struct.field(pytree_node=False, default="renormalised")
    scores: str = struct.field(pytree_node=False, default="linear")
    skip: tuple[int, int] | None = struct.field(pytree_node=False, default=None)

    def __call__(self, value: Array, context: Context) -> Array:
        """Returns z [B,T,H,Dh] times the gates.

        Raises:
          ValueError: another site than `PLACES`; a router made for other sizes than the model's;
            one that skips heads, with other edits of the site.
        """
        choose("site of a Route", context.site, PLACES)
        if self.skip is not None and value.shape[1] > self.skip[0]:
            raise ValueError(
                "a Route that skips heads must be the only edit of its site, without `when`: "
                "there is no z for another one to change. Use the Route without skipping()"
            )
        gates = lay(self.routing(context).gates, axes_of(value)[:3])
        return value * gates[..., None].astype(value.dtype)

    @property
    def weights(self) -> dict[str, Array]:
        """What is trained: the leaves of `WEIGHTS` that there are, by name."""
        return {name: leaf for name in WEIGHTS if (leaf := getattr(self, name)) is not None}

    def with_weights(self, weights: Mapping[str, Any]) -> Route:
        """The router with other weights, as `weights` gives them."""
        return dataclasses.replace(self, **weights)

    def without_weights(self) -> Route:
        """The router without what is trained."""
        return self.with_weights(dict.fromkeys(WEIGHTS))

    def redrawn(self, key: Array) -> Route:
        """A "random" router that draws anew, from a random key; any other as it is."""
        if self.keys is None:
            return self
        return dataclasses.replace(self, keys=layer_keys(key, len(self.keys)))

    def skipping(self, block: int = 128) -> Route:
        """The same router, run without computing the heads that a token did not choose.

        The values are those of the masked form; see `jaxheads.model.chosen` for what is saved,
        and for the gradient of `straight_through` gates, which differs. Sequences of up to
        `block` tokens, as in decoding, take the masked form.

        Args:
          block: queries of one head that are computed together: short against T A / H, the mean
            number of tokens at which a head is on, and long enough for fast matrix products.

        Raises:
          ValueError: a block of no queries, or numbers of heads that are not known because the
            router is traced.
        """
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        if isinstance(self.shared, jax.core.Tracer) or isinstance(self.top_k, jax.core.Tracer):
            raise ValueError(
                "skipping() must know how many heads stay on, which are traced here: call it "
                "outside of jit"
            )
        most = np.sum(np.asarray(self.shared), axis=-1) + np.asarray(self.top_k)
        return dataclasses.replace(self, skip=(block, int(most.max())))

    def attend(
        self,
        q: Array,
        keys: Keys,
        weight: Array,
        context: Context,
        allowed: Array,
        bias: Array | None,
        prefix: str,
    ) -> Array:
        """Attention of the chosen heads through `weight`, W_O [H,Dh,D], of a Route that skips.

        Args:
          q: [B,T,H,Dh].
          keys: what the queries see: `Slots`.
          weight: [H,Dh,D].
          context: the place in the computation.
          allowed: bool [B,1,T or 1,S].
          bias: [1 or B,H,T,S], or None.
          prefix: of the names of the sites: "" or "cross.".

        Returns:
          [B,T,D]; zero at padding.

        Raises:
          ValueError: something else edits, taps or reads what is not computed; heads or tokens
            are divided over a mesh; keys in a head-wise cache.
        """
        assert self.skip is not None
        if not isinstance(keys, Slots):
            raise ValueError(
                "a Route that skips heads reads the keys of every head at all slots, which a "
                "head-wise cache does not hold. Use the Route without skipping()"
            )
        check_alone(context, prefix)
        block, most = self.skip
        routing = self.routing(dataclasses.replace(context, site=prefix + "z"))
        logits = Logits(context.config.attn_scale, context.config.attn_softcap)
        chosen = routing.chosen & context.token_mask[..., None]
        return attend_chosen(
            q, keys.k, keys.v, weight, chosen, routing.gates, allowed, bias,
            block=block, most=most, logits=logits,
        )  # fmt: skip

    def routing(self, context: Context) -> Routing:
        """What is decided at the tokens of a block, of values known before attention.

        Args:
          context: knows `attn_in` [B,T,D] and `q_pre` [B,T,H,Dh]; at a site under "cross." their
            counterparts `cross.attn_in` and `cross.q` (no position encoding there).

        Raises:
          ValueError: a router made for other sizes than the model's.
        """
        choose("gates", self.gates, GATES)
        self._check(context)
        among = ~self.shared
        scores = self._scores(context)
        probabilities = softmax_among(scores, among)
        ranking = self._draws(context) if self.scores == "random" else probabilities
        picked = top_k_among(ranking, self.top_k, among)
        if self.gates == "straight_through":
            # Adding zero with a gradient: the value stays exactly 0 or 1.
            through = probabilities - jax.lax.stop_gradient(probabilities)
            gates = jnp.where(self.shared, 1.0, picked.astype(jnp.float32) + through)
        else:
            gates = self._weighted(context, scores, picked)
        log_z = jax.nn.logsumexp(jnp.where(among, scores, -jnp.inf), axis=-1)
        # Without routed heads there is nothing to normalise.
        log_z = jnp.where(among.any(), log_z, 0.0)
        return Routing(probabilities, picked | self.shared, gates, log_z)

    def _scores(self, context: Context) -> Array:
        """float32 [B,T,H], on every device of a mesh whole over heads."""
        choose("scores", self.scores, SCORES)
        if self.scores == "query_norm":
            q = getattr(context, "cross.q") if _crosses(context) else context.q_pre
            return whole(query_norms(q, ~self.shared), 2)
        x = _input(context)
        if self.scores == "linear":
            assert self.router is not None
            return whole(_linear(x, self.router), 2)
        shape = (*x.shape[:2], self.shared.shape[0])
        return lay(jnp.zeros(shape), (*axes_of(x)[:2], ()))

    def _draws(self, context: Context) -> Array:
        """What a "random" router picks by, float32 [B,T,H]."""
        assert self.keys is not None
        x = _input(context)
        rows, length = x.shape[:2]
        # A key for each slot of the whole sequence: a step of decoding draws what a pass over
        # the whole sequence draws there.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.wrap_key_data(self.keys), context.start + jnp.arange(length)
        )
        shape = (rows, self.shared.shape[0])
        drawn = jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)(keys)
        return lay(drawn, (*axes_of(x)[:2], ()))

    def _weighted(self, context: Context, scores: Array, picked: Array) -> Array:
        """The gates that have sizes: those of `two_stage` and `renormalised`."""
        assert self.shared_router is not None and self.balance is not None
        x = _input(context)
        shared_scores = whole(_linear(x, self.shared_router), 2)
        parts = jax.nn.softmax(_linear(x, self.balance), axis=-1)
        if self.gates == "renormalised":
            routed = softmax_among(scores, picked, self.top_k)
            shared = softmax_among(shared_scores, self.shared, jnp.sum(self.shared))
            parts = 2 * parts
        else:
            routed = jnp.where(picked, softmax_among(scores, ~self.shared), 0.0)
            shared = softmax_among(shared_scores, self.shared)
        both = jnp.any(self.shared) & (self.top_k > 0)
        parts = jnp.where(both, parts, 1.0)
        return jnp.where(self.shared, parts[..., :1] * shared, parts[..., 1:] * routed)

    def _check(self, context: Context) -> None:
        heads, width = context.config.n_heads, context.config.d_model
        expected = {
            "shared": (heads,),
            "top_k": (),
            "router": (width, heads),
            "shared_router": (width, heads),
            "balance": (width, 2),
        }
        for name, shape in expected.items():
            leaf = getattr(self, name)
            if leaf is not None and jnp.shape(leaf) != shape:
                raise ValueError(
                    f"{name} has shape {jnp.shape(leaf)} per layer, expected {shape} of this "
                    "model: the router was made for another one"
                )
        wanted = {"linear": "router", "random": "keys"}.get(self.scores)
        needed = [wanted] if wanted else []
        if self.gates != "straight_through":
            needed += ["shared_router", "balance"]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name} is missing: scores={self.scores!r} and gates={self.gates!r} need it"
                )


def layer_keys(key: Array, n_layers: int) -> Array:
    """uint32 [L,2], the data of one random key for each layer."""
    return jax.random.key_data(jax.random.split(key, n_layers))


def softmax_among(scores: Array, among: Array | bool, total: Array | float = 1.0) -> Array:
    """`total` times the softmax over the last axis of scores, among some: 0 at the others.

    Where there are none, all are 0. n equal scores with a total of n give exactly 1.

    Args:
      scores: float32 [...,E].
      among: bool that broadcasts to it.
      total: what the values sum to.
    """
    # Finite, so that no heads at all give zeros and not NaN.
    scores = jnp.where(among, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = jnp.where(among, weights, 0.0)
    kept = weights.sum(axis=-1, keepdims=True)
    return total * weights / jnp.where(kept == 0, 1.0, kept)


def top_k_among(scores: Array, k: Array | int, among: Array | bool = True) -> Array:
    """bool [...,E], True at the k highest scores [...,E] among some.

    Equal to `jax.lax.top_k`, ties to the lower index, but k may be an array that broadcasts to
    [...], so that layers with different k share a program; and nothing is sorted: a place is the
    number of scores ahead of it.

    Args:
      scores: [...,E].
      k: how many.
      among: bool that broadcasts to `scores`; the others are never chosen.
    """
    scores = jnp.where(among, jax.lax.stop_gradient(scores), -jnp.inf)
    index = jnp.arange(scores.shape[-1])
    mine, other = scores[..., :, None], scores[..., None, :]
    ahead = (other > mine) | ((other == mine) & (index < index[:, None]))
    place = jnp.sum(ahead, axis=-1)
    return (place < jnp.expand_dims(jnp.asarray(k), -1)) & among


def query_norms(q: Array, among: Array) -> Array:
    """The parameter-free router: norms of queries, divided by their deviation over some heads.

    Source: card of the LLaMA3-8B release of MoH; queries before rotary encoding, the unbiased
    standard deviation over the routed heads of a token.

    Args:
      q: [B,T,H,Dh].
      among: bool [H], the routed heads.

    Returns:
      float32 [B,T,H].
    """
    squares = jnp.sum(jnp.square(q.astype(jnp.float32)), axis=-1)
    # The norm has no gradient at zero; a query of zero gets none.
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) * (squares > 0)
    count = jnp.sum(among)
    mean = jnp.sum(jnp.where(among, norms, 0), axis=-1, keepdims=True) / jnp.maximum(count, 1)
    spread = jnp.sum(jnp.where(among, jnp.square(norms - mean), 0), axis=-1, keepdims=True)
    variance = spread / jnp.maximum(count - 1, 1)
    return norms / jnp.sqrt(jnp.where(variance > 0, variance, 1.0))


def _crosses(context: Context) -> bool:
    return context.site.startswith("cross.")


def _input(context: Context) -> Array:
    """[B,T,D], what the attention that is routed reads."""
    return getattr(context, "cross.attn_in") if _crosses(context) else context.attn_in


def _linear(x: Array, weight: Array) -> Array:
    """float32 [B,T,E] of x [B,T,D] and weight [D,E]: routers do not round to bfloat16."""
    return contract("btd,de->bte", x.astype(jnp.float32), weight.astype(jnp.float32))
