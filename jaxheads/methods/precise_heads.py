"""Precise fine-tuning: only the weights of the heads that a task uses are trained.

Source: Zhang et al. (2024), "Interpreting and Improving Large Language Models in Arithmetic
Calculation". No code was released. Two stages:

1. heads: path patching from each head to the logits. The paper's score is the relative change of
   the answer's logit when the head takes its value from a prompt without the calculation; here it
   is the fall of the difference between the logits of the right and of the wrong answer, when the
   head takes its value from a prompt with another operand (`Example.corrupted`), directly and
   through the MLPs above.
2. tuning: the slices of W_Q, W_K, W_V and W_O of the best heads are trained on the answers, and
   everything else is frozen. In the paper it improves arithmetic and leaves other skills alone.

Learning rate and steps are not in what we have read of the paper. A key/value head belongs to a
group of query heads: its slices are trained if any of them is chosen (`jaxheads.train.select`).
Slices that are not trained are the model's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxheads.methods.fine_tuning import Rest, as_stored, in_float32, parameters_loss
from jaxheads.methods.method import TaskData, Tuned
from jaxheads.methods.objective import rows_of
from jaxheads.methods.retrieval_heads import Head, random_heads, top_heads
from jaxheads.model.transformer import Transformer
from jaxheads.names import choose
from jaxheads.sweep import LogitDifference, ablate_heads, attribution_patching, path_patch
from jaxheads.tasks import Example, Tokenizer, encode_pairs, single_token
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.select import restore, select

if TYPE_CHECKING:
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "precise heads"
SCORES = ("path", "ablation", "attribution")


@dataclass(frozen=True)
class PreciseHeads:
    """Settings.

    Attributes:
      heads: how many are tuned.
      score: how heads are found: by "path" patching to the logits, by "ablation" (zero) of each,
        or by "attribution" patching, the first-order estimate.
      examples: training examples that score them.
      controls: draws of as many random heads, tuned likewise.
      fit: how the slices are trained.

    Raises:
      ValueError: an unknown `score`, or numbers below their least.
    """

    heads: int = 14
    score: str = "path"
    examples: int = 32
    controls: int = 5
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=40, optimizer=Optimizer(learning_rate=3e-4, schedule="linear", clip=1.0)
        )
    )

    def __post_init__(self) -> None:
        choose("score", self.score, SCORES)
        for name, least in (("heads", 1), ("examples", 1), ("controls", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def train(
        self, job: Job, model: Transformer, tokenizer: Tokenizer, data: TaskData
    ) -> dict[str, Tuned]:
        """Finds heads, and tunes them and the controls.

        Returns:
          "precise heads" and "random 1", ..., each with the parameters that changed.

        Raises:
          ValueError: examples without a corrupted prompt or a wrong answer of one token, or
            more heads asked for than there are.
        """
        config = model.config
        shape = (config.n_layers, config.n_heads)
        scores = key_heads(model, data.train[: self.examples], tokenizer, self.score)
        chosen = top_heads(scores, self.heads)
        controls = random_heads(shape, self.heads, self.controls, job.seed, chosen)
        sets = {NAME: chosen} | {f"random {n}": heads for n, heads in enumerate(controls, 1)}
        tuned = {name: self.tune(job, name, model, data, heads) for name, heads in sets.items()}
        return tuned | {NAME: replace(tuned[NAME], scores=scores)}

    def tune(
        self, job: Job, name: str, model: Transformer, data: TaskData, heads: Sequence[Head]
    ) -> Tuned:
        """Trains the slices of `heads`, as the stage `name` of the job."""
        chosen = select(model.params, heads=heads)
        rest, start = Rest(chosen.frozen, model.config), in_float32(chosen.trainable)
        trained = job.fit(
            name, parameters_loss, start, rest, fit=self.fit, mask=chosen.mask, **rows_of(data)
        )
        params = restore(chosen.mask, as_stored(trained, chosen.trainable), chosen.trainable)
        return Tuned(params=params, heads=list(heads), trained=chosen.count)


def key_heads(
    model: Transformer, examples: Sequence[Example], tokenizer: Tokenizer, score: str = "path"
) -> np.ndarray:
    """How much each head does for the right answer.

    Args:
      model: the model.
      examples: with corrupted prompts and wrong answers; those whose answers are not single
        tokens are passed over.
      tokenizer: turns text into token ids.
      score: one of `SCORES`; see `PreciseHeads`.

    Returns:
      float32 [L,H]: the mean fall, in logits, of right minus wrong answer without the head.

    Raises:
      ValueError: no example can be used, or an unknown `score`.
    """
    choose("score", score, SCORES)
    if score == "ablation":
        # Corrupted prompts are not needed, and not every task has them.
        examples = [replace(one, corrupted=one.prompt) for one in examples]
    pairs = encode_pairs(single_token(examples, tokenizer), tokenizer)
    metric = LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)
    if score == "path":
        found = path_patch(model, pairs.clean, pairs.corrupted, metric)
    elif score == "ablation":
        found = ablate_heads(model, pairs.clean, metric)
    else:
        found = attribution_patching(model, pairs.clean, pairs.corrupted, metric, direction="noise")
    return -np.asarray(found.values)
