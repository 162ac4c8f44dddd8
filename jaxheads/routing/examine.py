"""`examine`: what a router does over many tokens and in one sentence, to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.model.batch import Batch
from jaxheads.model.context import Context, Edit, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.routing.specialities import CATEGORIES, category_loads, members, specialities
from jaxheads.routing.statistics import (
    RoutingSums,
    add_sums,
    decided,
    find_route,
    head_gates,
    heads_chosen,
    load,
    overlap,
    routing_sums,
)
from jaxheads.routing.view import RoutingView, Sentence

if TYPE_CHECKING:
    from jaxheads.data.rows import Rows
    from jaxheads.text import Tokenizer

Array = jax.Array
SENTENCE = (
    "In 1969 Neil Armstrong stepped onto the Moon; the rover that landed on Mars in 2012 "
    "is still driving (slowly)."
)
"""Names, numbers, punctuation and common words, for those who have no sentence of their own."""


def examine(
    model: Transformer,
    batches: Iterable[Batch],
    edits: Mapping[str, Edit],
    tokenizer: Tokenizer,
    sentence: str = SENTENCE,
    *,
    minimum: int = 16,
    best: int = 6,
    shuffles: int = 5,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> RoutingView:
    """Looks at what a router does.

    Which heads are on at which token, bool [L,N,H] for N tokens, is kept on the host.

    Args:
      model: the model.
      batches: rows of text; those of one shape share one compiled program. See `in_batches`.
      edits: with one `Route` at `z`; other edits act too.
      tokenizer: of the model.
      sentence: to be shown token by token, as far as the model's context reaches.
      minimum: least occurrences of a token that has a lift.
      best: tokens listed for a head.
      shuffles: how often the tokens' identities are shuffled.
      seed: of the shuffles.
      on_batch: told how many batches are done.

    Raises:
      ValueError: no `Route` or several, a router of another model, a sentence without tokens, no
        real tokens in the batches, a count below 1.
    """
    for name, value in {"minimum": minimum, "best": best, "shuffles": shuffles}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    route = find_route(edits.get("z"))
    shown = _sentence(model, edits, tokenizer, sentence)
    sums, gates, seen = _look(model, batches, edits, on_batch)
    loads = np.asarray(load(sums))
    layers, heads = loads.shape
    shared = np.array(np.broadcast_to(route.shared, (layers, heads)))
    found, ids = np.unique(seen.ids, return_inverse=True)
    names = tokenizer.pieces(found)
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(ids)) for _ in range(shuffles)]
    # A head that is always on or never has no lift.
    choosing = ~shared & seen.on.any(axis=0) & ~seen.on.all(axis=0)
    special = specialities(
        seen.on[:, choosing],
        ids,
        names,
        [(int(layer), int(head)) for layer, head in np.argwhere(choosing)],
        orders,
        minimum=minimum,
        best=best,
    )
    kinds = members(names, ids, seen.positions)
    at_kinds, chance = category_loads(seen.on.reshape(len(ids), -1), kinds, orders)
    every = jnp.ones((1, len(ids)), bool)
    alike = overlap(jnp.asarray(seen.on.swapaxes(0, 1)[:, None]), jnp.asarray(shared), every)
    tokens, chosen = np.asarray(sums.tokens), np.asarray(sums.chosen)
    return RoutingView(
        tokens=len(ids),
        load=loads,
        shared=shared,
        top_k=np.asarray(sums.top_k).astype(np.int32),
        entropy=np.asarray(sums.entropy) / tokens,
        overlap=np.asarray(alike),
        gates=np.where(chosen > 0, np.asarray(gates) / np.maximum(chosen, 1), np.nan),
        sentence=shown,
        minimum=minimum,
        specialities=special,
        categories=CATEGORIES,
        category_tokens=kinds.sum(axis=0).astype(np.int32),
        category_load=at_kinds.reshape(-1, layers, heads).astype(np.float32),
        category_chance=chance.astype(np.float32),
    )


def in_batches(rows: Rows, count: int, size: int) -> Iterator[Batch]:
    """The first rows, so many at a time, all batches of one shape: the last is filled up.

    Args:
      rows: items are `Batch`es of numpy arrays.
      count: most rows.
      size: B, rows of a batch. What fills up the last is masked, as padding is.
    """
    count = min(count, len(rows))
    for first in range(0, count, size):
        taken = np.arange(first, first + size)
        batch: Batch = rows[np.minimum(taken, count - 1)]
        yield batch.replace(mask=batch.mask & (taken < count)[:, None])  # type: ignore[attr-defined]


class _Seen(NamedTuple):
    """Every real token: on bool [N,L,H], and its id and position in its text, int [N]."""

    on: np.ndarray
    ids: np.ndarray
    positions: np.ndarray


def _look(
    model: Transformer,
    batches: Iterable[Batch],
    edits: Mapping[str, Edit],
    on_batch: Callable[[int], None],
) -> tuple[RoutingSums, Array, _Seen]:
    """Sums, sums of gates [L,H], and the tokens."""
    sums: RoutingSums | None = None
    gates: Any = 0
    parts = []
    for done, batch in enumerate(batches):
        found = _routing(model, batch, edits)
        sums = found["sums"] if sums is None else add_sums(sums, found["sums"])
        gates = gates + found["gates"]
        real = np.asarray(batch.mask)
        on = np.moveaxis(np.asarray(found["chosen"]), 0, 2)[real]
        parts.append(_Seen(on, np.asarray(batch.tokens)[real], np.asarray(found["places"])[real]))
        on_batch(done + 1)
    if sums is None or not sum(len(part.ids) for part in parts):
        raise ValueError("no tokens to look at: expected batches with at least one real token")
    return sums, gates, _Seen(*map(np.concatenate, zip(*parts, strict=True)))


def _sentence(
    model: Transformer, edits: Mapping[str, Edit], tokenizer: Tokenizer, sentence: str
) -> Sentence:
    ids = tokenizer.encode(sentence)
    if not ids:
        raise ValueError(f"the sentence {sentence!r} has no tokens")
    ids = ids[: model.config.context_length]
    tokens = np.asarray([ids], np.int32)
    found = _decisions(model, Batch(tokens, np.ones(tokens.shape, bool)), edits)
    chosen, gates = (np.asarray(found[name])[:, 0] for name in ("chosen", "gates"))
    return Sentence(tuple(tokenizer.pieces(ids)), chosen, gates)


@jax.jit
def _routing(model: Transformer, batch: Batch, edits: Mapping[str, Edit]) -> dict[str, Any]:
    taps = {
        "sums": Tap("attn_out", routing_sums),
        "gates": Tap("attn_out", _gate_sums),
        "chosen": Tap("attn_out", heads_chosen),
        "places": Tap("embed", lambda value, context: context.positions),
    }
    return _taps(model, batch, edits, taps)


@jax.jit
def _decisions(model: Transformer, batch: Batch, edits: Mapping[str, Edit]) -> dict[str, Any]:
    taps = {"chosen": Tap("attn_out", heads_chosen), "gates": Tap("attn_out", head_gates)}
    return _taps(model, batch, edits, taps)


def _taps(
    model: Transformer, batch: Batch, edits: Mapping[str, Edit], taps: Mapping[str, Tap]
) -> dict[str, Any]:
    """What is tapped; nothing is unembedded."""
    nothing = jnp.zeros((batch.tokens.shape[0], 0), jnp.int32)
    return model(batch, edits=edits, taps=taps, logits_at=nothing).taps


def _gate_sums(value: Array, context: Context) -> Array:
    """Reducer: [H], sums of the gates over real tokens."""
    return jnp.einsum("bt,bth->h", context.token_mask.astype(jnp.float32), decided(context).gates)
