"""Retrieval heads: the heads that copy an answer out of a long context.

Source: Wu et al. (2024), "Retrieval Head Mechanistically Explains Long-Context Factuality".
The score is the paper's set form, |g_h & k| / |k|: of the distinct tokens k of the needle, the
share that head h copies, where it copies the token being predicted if the key it attends to
most lies in the needle and holds that token. (The released code divides by the needle's length
at every step instead, so that a repeated token counts twice.) Answers are teacher forced here
rather than generated, so every prompt counts and one forward pass scores all heads.

Masking gives a head uniform attention (queries of zero after rotary, as the reference
implementation does) at every token; the reference masks only the decode loop, which
`when="decode"` does in `jaxheads.generate`. Random controls exclude the masked heads; the
reference means to exclude its top 100 but compares tuples with lists and excludes none.

Known numbers, SmolLM2-135M-Instruct: 16 of 270 heads score 0.1 or more on 5 lookups of 8 pairs
(`tasks.lookup`, seed 0), 22 on other lookups made like them; the paper finds 3 to 6 % in models of
7B to 34B parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.edits import Edits, mask_heads
from jaxheads.metrics import answer_scores, next_token_loss
from jaxheads.model.batch import Answers, Batch
from jaxheads.model.context import Context, Tap
from jaxheads.model.transformer import Transformer
from jaxheads.tasks.example import Encoded

Array = jax.Array
Head = tuple[int, int]


def retrieval_scores(model: Transformer, encoded: Encoded) -> np.ndarray:
    """Retrieval score of every head, float32 [L,H], between 0 and 1.

    Args:
      model: the model.
      encoded: prompts with their needle marked and the answer as targets, as
        `jaxheads.tasks.encode` returns them.

    Raises:
      ValueError: an example without a needle.
    """
    if not np.asarray(encoded.needle).any(axis=1).all():
        row = int(np.argmin(np.asarray(encoded.needle).any(axis=1)))
        raise ValueError(f"example {row} has no needle: retrieval needs a span to copy from")
    return np.asarray(_scores(model, encoded, encoded.batch.answers()))


@jax.jit
def _scores(model: Transformer, encoded: Encoded, answers: Answers) -> Array:
    batch, needle = encoded.batch, jnp.asarray(encoded.needle)
    tokens, ids = jnp.asarray(batch.tokens), jnp.asarray(answers.ids)
    tap = Tap("pattern", jax.tree_util.Partial(_copies, tokens, needle, answers))
    nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    copies = model(batch, taps={"copies": tap}, logits_at=nothing).taps["copies"]
    # Distinct tokens: a token counts once, if any step that predicts it copies it.
    same = (ids[:, :, None] == ids[:, None, :]) & jnp.asarray(answers.mask)[:, None, :]
    copied = jnp.any(copies[..., None, :] & same[None, :, None], axis=-1)
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    in_needle = jnp.any((ids[:, :, None] == tokens[:, None]) & needle[:, None], axis=-1)
    counted = jnp.asarray(answers.mask) & ~jnp.any(same & earlier, axis=-1) & in_needle
    distinct = _distinct(tokens, needle)
    shares = jnp.sum(copied & counted[None, :, None], axis=-1) / distinct[None, :, None]
    return shares.mean(axis=1)


def _copies(tokens: Array, needle: Array, answers: Answers, pattern: Array, _: Context) -> Array:
    """bool [B,H,N]: whether the head copies each target. Runs inside the layer scan."""
    slots = jnp.asarray(answers.slots)
    rows = jnp.take_along_axis(pattern, slots[:, None, :, None], axis=2)
    key = jnp.argmax(rows, axis=-1)
    read = jax.vmap(lambda row, index: row[index])
    right = read(tokens, key) == jnp.asarray(answers.ids)[:, None]
    return right & read(needle, key) & jnp.asarray(answers.mask)[:, None]


def _distinct(tokens: Array, needle: Array) -> Array:
    """int [B]: number of different tokens in each needle."""
    same = (tokens[:, :, None] == tokens[:, None, :]) & needle[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    return jnp.sum(needle & ~jnp.any(same & earlier, axis=-1), axis=-1)


def top_heads(scores: np.ndarray, count: int) -> list[Head]:
    """The `count` heads of highest score [L,H], best first.

    Raises:
      ValueError: more heads asked for than there are.
    """
    if not 0 < count <= scores.size:
        raise ValueError(f"count must lie in 1..{scores.size}, got {count}")
    best = np.argsort(-scores, axis=None, kind="stable")[:count]
    return [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in best]


def random_heads(
    shape: tuple[int, int], count: int, draws: int, seed: int, exclude: Sequence[Head] = ()
) -> list[list[Head]]:
    """Draws sets of `count` heads, none of them in `exclude`; sets may overlap.

    Raises:
      ValueError: fewer heads are left than asked for.
    """
    left = [(x, y) for x in range(shape[0]) for y in range(shape[1]) if (x, y) not in set(exclude)]
    if count > len(left):
        raise ValueError(f"{count} random heads asked for, but only {len(left)} are left")
    rng = np.random.default_rng(seed)
    return [sorted(left[i] for i in rng.permutation(len(left))[:count]) for _ in range(draws)]


def masking_experiment(
    model: Transformer,
    encoded: Encoded,
    heads: Sequence[Head],
    *,
    text: Batch,
    draws: int = 5,
    seed: int = 0,
    how: str = "uniform",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Masks chosen heads, and random sets of as many, on answers and on plain text.

    Args:
      model: the model.
      encoded: prompts with answers as targets.
      heads: the heads in question.
      text: plain text, to see what masking costs in general.
      draws: random sets of heads to compare with.
      seed: of the draws.
      how: as in `mask_heads`: "uniform" or "zero".
      on_progress: called as (runs done, runs in all).

    Returns:
      {"heads", "how", "runs"}; each run has "name" ("clean", "chosen", "random 1", ...),
      "heads", "answer_loss" (nats per token), "answer_accuracy" (share of tokens) and
      "text_loss" (nats per token).
    """
    config = model.config
    sets = {"clean": [], "chosen": list(heads)}
    controls = random_heads((config.n_layers, config.n_heads), len(heads), draws, seed, heads)
    sets |= {f"random {n}": control for n, control in enumerate(controls, 1)}
    answers = encoded.batch.answers()
    runs = []
    for done, (name, masked) in enumerate(sets.items(), 1):
        edits = mask_heads(config, masked, how)
        found = jax.device_get(_measure(model, encoded.batch, answers, text, edits))
        runs.append({"name": name, "heads": masked} | {k: float(v) for k, v in found.items()})
        on_progress(done, len(sets))
    return {"heads": list(heads), "how": how, "runs": runs}


@jax.jit
def _measure(
    model: Transformer, batch: Batch, answers: Answers, text: Batch, edits: Edits
) -> dict[str, Array]:
    scores = answer_scores(model, batch, answers, edits=edits)
    return {
        "answer_loss": scores["loss"].mean(),
        "answer_accuracy": scores["token_accuracy"].mean(),
        "text_loss": next_token_loss(model, text, edits=edits),
    }
