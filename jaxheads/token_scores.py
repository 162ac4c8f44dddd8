"""How each token of a batch is predicted: what losses and metrics are made of.

Everything is float32 from the logits on. Labels are made by shifting token ids, so that the token
axis of the logits stays whole, and a label's logit is read by comparison rather than by indexing,
so that token and vocabulary axes may both be divided over a mesh. Logits of a large vocabulary need
not exist as a whole (Wijmans et al. 2024, "Cut Your Losses").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxheads.model.batch import Answers, Batch
from jaxheads.model.context import Edit, Tap, TapsLike, as_taps
from jaxheads.model.layout import axes_of, gathered, lay, whole
from jaxheads.model.transformer import Transformer

Array = jax.Array
Edits = Mapping[str, Edit]
_FINAL = "final, to be unembedded"


@struct.dataclass
class TokenScores:
    """How the token after each slot is predicted.

    Attributes:
      loss: float32 [B,N], negative log-likelihood in nats.
      log_z: float32 [B,N], log of the sum of exp of the logits.
      right: bool [B,N], whether no token is more likely.
      tapped: what `taps` handed back in the same pass, by name.
    """

    loss: Array
    log_z: Array
    right: Array
    tapped: dict[str, Any] = struct.field(default_factory=dict)


def token_scores(
    model: Transformer,
    batch: Batch,
    answers: Answers | None = None,
    *,
    edits: Edits | None = None,
    chunk: int | None = None,
    remat: str = "none",
    taps: TapsLike = (),
) -> tuple[TokenScores, Array]:
    """Scores the token after each slot.

    Args:
      model: the model.
      batch: tokens; padding, what follows it, the first token of a packed text and what
        `targets` leaves out do not count.
      answers: `batch.answers()`; then only the targets are unembedded.
      edits: what to change.
      chunk: most slots of a row whose logits exist at one time; they are computed again in
        the backward pass. None for all at once. Values and gradients are the same.
      remat: what each block keeps for the backward pass; see `Transformer.__call__`.
      taps: what to hand back of the pass; see `jaxheads.model.context.as_taps`.

    Returns:
      The scores, and bool [B,N], which of them count. N is T, or the number of answers.

    Raises:
      ValueError: a chunk below 1; edits of logits together with a chunk; a model that does
        not predict tokens; what the model refuses.
    """
    if answers is None:
        slots, (labels, counted) = None, next_tokens(batch)
    else:
        slots, labels, counted = map(jnp.asarray, (answers.slots, answers.ids, answers.mask))
    read: dict[str, Any] = {"edits": edits, "remat": remat, "logits_at": slots}
    if chunk is None:
        check_predicts(model)
        out = model(batch, taps=taps, **read)
        return score(out.logits, labels).replace(tapped=out.taps), counted  # type: ignore[attr-defined]
    x, unembedding, tapped = before_logits(model, batch, taps=taps, **read)
    scores = over_slots(lambda x, ids: score(unembedding(x), ids), chunk, x, labels)
    return scores.replace(tapped=tapped), counted


def next_tokens(batch: Batch) -> tuple[Array, Array]:
    """The token after each slot, int [B,T], and whether it is a target, bool [B,T].

    Divided over a mesh as the tokens are. The last slot has no token after it and does not count.
    """
    # The first token is no target, so what comes round to the last slot does not count.
    return _shifted(batch.tokens, batch, -1), _shifted(_targets(batch), batch, -1)


def targets(batch: Batch) -> Array:
    """`batch.target_mask`, divided over a mesh as the tokens are."""
    return _shifted(_targets(batch), batch, 0)


def _targets(batch: Batch) -> Array:
    batch = jax.tree.map(lambda leaf: whole(jnp.asarray(leaf), 1), batch)
    return jnp.asarray(batch.target_mask)


def _shifted(values: Any, batch: Batch, by: int) -> Array:
    """Values [B,T] rolled along the tokens, which a divided axis cannot be."""
    rolled = jnp.roll(whole(jnp.asarray(values), 1), by, axis=1)
    return lay(rolled, axes_of(jnp.asarray(batch.tokens)))


def score(logits: Array, labels: Array) -> TokenScores:
    """Scores labels [B,N] under logits [B,N,V]; NaN for a label outside the vocabulary."""
    logits = logits.astype(jnp.float32)
    size = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    hit = jnp.arange(size) == labels[..., None]
    label = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    label = jnp.where((labels >= 0) & (labels < size), label, jnp.nan)
    best = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    return TokenScores(log_z - label, log_z, label == best)


def mean(values: Array, counted: Array) -> Array:
    """Mean of the values [...] that count, float32; 0 if none does."""
    total = jnp.sum(jnp.where(counted, values, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(counted), 1)


def check_predicts(model: Transformer) -> None:
    """Raises ValueError unless the model gives logits of the token after each slot."""
    config = model.config
    if config.head != "lm" or not config.causal:
        raise ValueError(
            f"a model with config.head = {config.head!r} and config.causal = {config.causal} "
            "does not predict the next token, expected a causal model with head 'lm'"
        )


def before_logits(
    model: Transformer,
    batch: Batch,
    *,
    edits: Edits | None = None,
    taps: TapsLike = (),
    **read: Any,
) -> tuple[Array, Callable[[Array], Array], dict[str, Any]]:
    """The site `final`, [B,T,D], the map from parts of it to logits, and what was tapped.

    For `over_slots`: the logits themselves are not computed. On a mesh the unembedding is
    gathered here, once, and in its own dtype, so that its gradient is summed over chunks in it.

    Raises:
      ValueError: edits or taps of logits, which would be left out; a model that does not predict.
    """
    check_predicts(model)
    wanted = as_taps(taps)
    if "logits" in (edits or {}) or any(tap.site == "logits" for tap in wanted.values()):
        raise ValueError("edits and taps of 'logits' need all logits at once, expected chunk=None")
    tapped = model(batch, edits=edits, taps=wanted | {_FINAL: Tap("final")}, **read).taps
    x = tapped.pop(_FINAL)

    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        used = path[0].name == "unembed" or [key.name for key in path[:2]] == ["embed", "tokens"]
        return gathered(leaf, x, leaf.dtype) if used else leaf

    return x, jax.tree_util.tree_map_with_path(gather, model).logits_of, tapped


def over_slots(function: Callable[..., Any], chunk: int, *arrays: Array) -> Any:
    """function(*arrays), computed for a part of the slots at a time.

    Slots far apart share a part (slot t belongs to part t mod the number of parts): so each
    device has its share of every part where the token axis is divided over a mesh.

    Args:
      function: maps arrays [B,n,...] to a pytree of arrays [B,n,...], each slot for itself.
      chunk: most slots of a part, n; but at least one for each device over which the token
        axis is divided.
      *arrays: [B,T,...] each.

    Returns:
      The pytree for all T slots. In the backward pass the function is computed again.

    Raises:
      ValueError: a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 slot, got {chunk}")
    rows, slots = arrays[0].shape[:2]
    devices = _devices(arrays[0], axis=1)
    mine = slots // devices
    parts = math.ceil(mine / max(1, chunk // devices))
    width = devices * math.ceil(mine / parts)

    def divide(array: Array) -> Array:
        if width * parts > slots:
            array = jnp.pad(
                array, ((0, 0), (0, width * parts - slots), *[(0, 0)] * (array.ndim - 2))
            )
        return jnp.moveaxis(array.reshape(rows, width, parts, *array.shape[2:]), 2, 0)

    def join(array: Array) -> Array:
        array = jnp.moveaxis(array, 0, 2)
        joined = array.reshape(rows, width * parts, *array.shape[3:])
        return joined if width * parts == slots else joined[:, :slots]

    @jax.checkpoint
    def part(carry: None, given: tuple[Array, ...]) -> tuple[None, Any]:
        return carry, function(*given)

    _, results = jax.lax.scan(part, None, tuple(map(divide, arrays)))
    return jax.tree.map(join, results)


def _devices(x: Array, axis: int) -> int:
    """Over how many devices the type of x says that one of its axes is divided."""
    kind = jax.typeof(x)
    return math.prod(kind.sharding.mesh.shape[name] for name in axes_of(x)[axis])
