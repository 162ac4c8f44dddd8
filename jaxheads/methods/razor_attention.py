"""RazorAttention: the whole context only for induction and echo heads, found without training.

Source: Tang et al. (2024), "RazorAttention: Efficient KV Cache Compression Through Retrieval
Heads", Algorithm 1 and section 3; the released mindspore-gs code for what the paper leaves open.

Random tokens r are repeated (S tokens, four copies). At a query in a later copy a head's

* echo score is the attention to the earlier occurrences of the same token, sum_m A[t, t-mS];
* induction score is that to the tokens after them, sum_m A[t, t-mS+1];

means over all queries that have an earlier occurrence, and over rows. A key/value head has the
highest score of the query heads that read it. The best 14 % by induction and the best 1 % by echo
keep the whole context. The others keep sinks, recent tokens, and the mean of what they drop as one
token (`HeadKinds.compensate`). Published sizes: S = 2,500 with ids from a range of 2,500; recent
tokens max(4,000, a fifth of the context).

What the reference does differently: its loop that adds echo heads returns in the first layer, so
no echo head of another layer is ever added; here all layers are ranked together. Both average over
the whole score matrix, queries of the first copy included, which ranks heads the same. Shares are
rounded to the nearest number of heads. Heads of models with ALiBi, whose size of context the paper
bounds by the slope, are not treated apart.

Measured: docs/caches.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.decode.kinds import HeadKinds
from jaxheads.model.context import Context, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.tasks.checks import at_least
from jaxheads.tasks.repeats import repeated_tokens

Array = jax.Array
INDUCTION, ECHO = 0.14, 0.01
"""Shares of the key/value heads that are kept by each score."""
COMMON = 20_000
"""The first ids of byte-pair vocabularies are the frequent tokens."""


def copied_tokens(tokens: np.ndarray, copies: int) -> np.ndarray:
    """Rows of `repeated_tokens` [B,1+2S] with more copies, int32 [B,1+copies*S]."""
    length = (tokens.shape[1] - 1) // 2
    return np.concatenate([tokens[:, :1], np.tile(tokens[:, 1 : 1 + length], copies)], axis=1)


def copy_scores(
    model: Transformer,
    *,
    first_id: int,
    count: int = 8,
    length: int = 120,
    copies: int = 4,
    seed: int = 0,
    ids: int = COMMON,
) -> tuple[np.ndarray, np.ndarray]:
    """Induction and echo score of every key/value head.

    Args:
      model: a causal language model.
      first_id: the token in front of each row, the attention sink: BOS where there is one. With
        another one SmolLM2 hardly copies.
      count: rows of random tokens.
      length: S, tokens of a copy.
      copies: how often they come.
      seed: of the tokens.
      ids: tokens are drawn from the first so many of the vocabulary.

    Returns:
      Two float32 [L,K], shares of attention between 0 and 1.

    Raises:
      ValueError: fewer than 2 copies, rows longer than the model's context, and what
        `repeated_tokens` refuses.
    """
    at_least("copies", copies, 2)
    config = model.config
    if 1 + copies * length > config.context_length:
        raise ValueError(
            f"{copies} times {length} tokens and one in front exceed the model's context of "
            f"{config.context_length}"
        )
    tokens = repeated_tokens(
        count, length=length, seed=seed, vocab_size=min(ids, config.vocab_size), first_id=first_id
    )
    rows = copied_tokens(tokens, copies)[:, None]
    found = np.mean([np.asarray(_of_copies(model, row, length, copies)) for row in rows], axis=0)
    # The head that attends most of each group.
    of_groups = found.reshape(config.n_layers, 2, config.n_kv_heads, -1).max(axis=-1)
    return of_groups[:, 0], of_groups[:, 1]


def ranks(
    induction: np.ndarray,
    echo: np.ndarray,
    shares: tuple[float, float] = (INDUCTION, ECHO),
) -> np.ndarray:
    """One score for both, for any budget: heads enter in the proportion of the shares.

    Args:
      induction: [L,K].
      echo: [L,K].
      shares: of all heads, kept by induction and by echo.

    Returns:
      float64 [L,K], higher is better: minus the factor by which both shares must be multiplied for
      the head to be kept. Those at -1 or above are what the shares themselves keep.

    Raises:
      ValueError: a share outside [0, 1], or both 0; scores of different shapes.
    """
    if not all(0 <= share <= 1 for share in shares) or not any(shares):
        raise ValueError(f"shares must lie in [0, 1] and not both be 0, got {shares}")
    if induction.shape != echo.shape:
        raise ValueError(
            f"echo has shape {list(echo.shape)}, expected that of induction, "
            f"{list(induction.shape)}"
        )
    factors = [
        (_places(scores) + 0.5) / (share * scores.size)
        for scores, share in zip((induction, echo), shares, strict=True)
        if share
    ]
    best: np.ndarray = -np.min(factors, axis=0)
    return best


def scores(model: Transformer, **options: Any) -> np.ndarray:
    """How much each key/value head needs the whole context, for `HeadKinds.keeping`.

    Args:
      model: a causal language model.
      **options: of `copy_scores`.

    Returns:
      float64 [L,K]: `ranks` at the published shares.

    Raises:
      ValueError: as `copy_scores`.
    """
    return ranks(*copy_scores(model, **options))


def razor_kinds(
    model: Transformer,
    *,
    induction: float = INDUCTION,
    echo: float = ECHO,
    sinks: int = 4,
    recent: int = 4000,
    bits: int | None = None,
    **options: Any,
) -> HeadKinds:
    """The kinds of heads of the paper: two shares of full heads, the others with compensation.

    Args:
      model: a causal language model.
      induction: share of the key/value heads that is kept by induction score.
      echo: by echo score; a head may be kept by both.
      sinks: first tokens that the others keep.
      recent: last tokens that they keep.
      bits: as for `HeadKinds`.
      **options: of `copy_scores`.

    Raises:
      ValueError: as `ranks`, `copy_scores` and `HeadKinds`.
    """
    none = HeadKinds.all_streaming(
        model.config, sinks=sinks, recent=recent, compensate=True, bits=bits
    )
    ranked = ranks(*copy_scores(model, **options), (induction, echo))
    return none.keeping(ranked, heads=int((ranked >= -1).sum()))


def _places(scores: np.ndarray) -> np.ndarray:
    """The place of each score among all, 0 for the highest; ties to the earlier head."""
    places = np.empty(scores.size)
    places[np.argsort(-scores.ravel(), kind="stable")] = np.arange(scores.size)
    return places.reshape(scores.shape)


@partial(jax.jit, static_argnames=("length", "copies"))
def _of_copies(model: Transformer, tokens: Array, length: int, copies: int) -> Array:
    """float32 [L,2,H], mean induction and echo attention."""

    def attended(pattern: Array, offset: int) -> Array:
        """The sum over earlier copies: [B,H,T,S] -> [H], sums over queries."""
        parts = [
            # Column i of the diagonal is the query i + back; the first `offset` + 1 columns are
            # keys in front of the first copy's.
            jnp.diagonal(pattern, offset - m * length, axis1=2, axis2=3)[..., offset + 1 :]
            for m in range(1, copies)
        ]
        return sum(part.sum(axis=(0, 2)) for part in parts)

    def reduce(pattern: Array, _: Context) -> Array:
        """Runs inside the layer scan: [B,H,T,S] -> [2,H]."""
        queries = pattern.shape[0] * (copies - 1) * length
        return jnp.stack([attended(pattern, 1), attended(pattern, 0)]) / queries

    nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    return model(tokens, taps={"scores": Tap("pattern", reduce)}, logits_at=nothing).taps["scores"]
