"""Direct preference optimisation: training on pairs of a better and a worse answer.

Source: Rafailov et al. (2023), "Direct Preference Optimization", equation 7. The log-probabilities
of the reference are computed once, before training, as in LoFiT's recipe for TruthfulQA
(Yin et al. 2024): beta 0.5, prompts and answers of at most 128 tokens each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxheads.model.batch import Batch, pack
from jaxheads.model.context import Edit
from jaxheads.model.transformer import Transformer
from jaxheads.tasks.example import Tokenizer
from jaxheads.token_scores import mean, token_scores
from jaxheads.train.losses import Metrics

Array = jax.Array
Edits = Mapping[str, Edit]
SIDES = ("chosen", "rejected")


@struct.dataclass
class Preferences:
    """Pairs of answers to one prompt each; on axis 1 the chosen one, then the rejected one.

    Attributes:
      pairs: a batch whose leaves are [N,2,T]; `targets` marks the answers.
      reference: float32 [N,2], log-probabilities of the answers under the reference, or None
        until `with_reference` has computed them.
    """

    pairs: Batch
    reference: Array | np.ndarray | None = None


def encode_preferences(
    examples: Sequence[tuple[str, str, str]],
    tokenizer: Tokenizer,
    *,
    max_prompt: int = 128,
    max_answer: int = 128,
    length: int | None = None,
) -> Preferences:
    """Tokenises pairs into one rectangle, on the host.

    Prompt and answer are tokenised apart and then joined, as `tasks.encode` does. No token that
    ends the text is added.

    Args:
      examples: N triples (prompt, chosen answer, rejected answer).
      tokenizer: turns text into token ids.
      max_prompt: most tokens of a prompt; the last ones are kept.
      max_answer: most tokens of an answer; the first ones are kept.
      length: T; default the longest row. Fix it to keep one compiled program.

    Raises:
      ValueError: no examples; a limit below 1; a text without tokens; two answers that are
        the same tokens, which have nothing to teach; a row longer than `length`.
    """
    for name, limit in (("max_prompt", max_prompt), ("max_answer", max_answer)):
        if limit < 1:
            raise ValueError(f"{name} must be at least 1 token, got {limit}")
    rows, targets = [], []
    for index, (text, *answers) in enumerate(examples):
        prompt = tokenizer.encode(text)[-max_prompt:]
        ids = [tokenizer.encode(a, add_special_tokens=False)[:max_answer] for a in answers]
        for part, tokens in zip(("prompt", *SIDES), (prompt, *ids), strict=True):
            if not tokens:
                raise ValueError(f"the {part} text of pair {index} has no tokens")
        if ids[0] == ids[1]:
            raise ValueError(
                f"chosen and rejected answer of pair {index} are the same {len(ids[0])} tokens "
                f"(of at most {max_answer}): {answers[0]!r}"
            )
        for answer in ids:
            rows.append([*prompt, *answer])
            targets.append([False] * len(prompt) + [True] * len(answer))
    batch = pack(rows, targets, length=length)
    return Preferences(jax.tree.map(lambda leaf: leaf.reshape(-1, 2, leaf.shape[1]), batch))


def sequence_logprobs(
    model: Transformer,
    batch: Batch,
    *,
    edits: Edits | None = None,
    chunk: int | None = None,
    remat: str = "none",
) -> Array:
    """Log-probability of the target tokens of each row, summed, float32 [B] in nats.

    Args are those of `losses.language_loss`.
    """
    scores, counted = token_scores(model, batch, edits=edits, chunk=chunk, remat=remat)
    return -jnp.sum(jnp.where(counted, scores.loss, 0.0), axis=1)


def with_reference(
    model: Transformer,
    preferences: Preferences,
    *,
    edits: Edits | None = None,
    batch_size: int = 8,
) -> Preferences:
    """The pairs with the log-probabilities that the reference gives to their answers.

    Args:
      model: the reference, usually the model before training.
      preferences: N pairs.
      edits: of the reference.
      batch_size: pairs that run together; the last ones are repeated to fill a batch.
    """
    count = preferences.pairs.tokens.shape[0]
    found = []
    for first in range(0, count, batch_size):
        rows = np.minimum(np.arange(first, first + batch_size), count - 1)
        part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], preferences.pairs)
        found.append(np.asarray(_pair_logprobs(model, part, edits)))
    return replace(preferences, reference=np.concatenate(found)[:count])


@jax.jit
def _pair_logprobs(model: Transformer, pairs: Batch, edits: Edits | None) -> Array:
    return pair_logprobs(model, pairs, edits=edits)


def pair_logprobs(
    model: Transformer,
    pairs: Batch,
    *,
    edits: Edits | None = None,
    chunk: int | None = None,
    remat: str = "none",
) -> Array:
    """`sequence_logprobs` of both answers of each pair [N,2,T] in one run: float32 [N,2]."""
    rows = jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, leaf.shape[2])), pairs)
    found = sequence_logprobs(model, rows, edits=edits, chunk=chunk, remat=remat)
    return found.reshape(-1, 2)


def dpo_loss(
    model: Transformer,
    preferences: Preferences,
    *,
    beta: float = 0.5,
    edits: Edits | None = None,
    chunk: int | None = None,
    remat: str = "none",
) -> tuple[Array, Metrics]:
    """The mean over pairs of -log sigmoid(r_chosen - r_rejected).

    The reward of an answer is r = beta * (log p(answer) - log p_reference(answer)).

    Args:
      model: the model.
      preferences: pairs with their reference.
      beta: how much the model is held to the reference.
      edits: what to change.
      chunk: as for `losses.language_loss`.
      remat: as for the model.

    Returns:
      The loss, float32 [] (log 2 where the model is the reference), and the metrics "weight",
      the number of pairs; "reward_margin", the mean of r_chosen - r_rejected;
      "reward_accuracy", the share of pairs where that is positive; "chosen_reward" and
      "rejected_reward", means.

    Raises:
      ValueError: pairs without reference, a beta that is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if preferences.reference is None:
        raise ValueError("the pairs have no reference: call with_reference(model, pairs) first")
    logprobs = pair_logprobs(model, preferences.pairs, edits=edits, chunk=chunk, remat=remat)
    return preference_loss(logprobs, jnp.asarray(preferences.reference), beta)


def preference_loss(logprobs: Array, reference: Array, beta: float) -> tuple[Array, Metrics]:
    """Equation 7 for log-probabilities [N,2] of the model and of the reference."""
    rewards = beta * (logprobs - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    every = jnp.ones_like(margin, bool)
    metrics = {
        "weight": jnp.float32(margin.size),
        "reward_margin": mean(margin, every),
        "reward_accuracy": mean(margin > 0, every),
        "chosen_reward": mean(rewards[:, 0], every),
        "rejected_reward": mean(rewards[:, 1], every),
    }
    return -mean(jax.nn.log_sigmoid(margin), every), jax.lax.stop_gradient(metrics)
