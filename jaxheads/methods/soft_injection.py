"""Soft Injection: the average of few-shot prompts mixed into the heads of a zero-shot prompt.

Source: "Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning"
(arXiv 2507.20906, 2025); its released code for what the paper leaves open.

1. task embedding: t_h is the mean of z_h at the last token of M prompts of N examples each.
2. gates: z'_h = (1 - alpha_h) * z_h + alpha_h * t_h with alpha = sigmoid(a), one per head, at the
   last token of the prompt only; decode steps are left alone. Only a is trained, from 0, on the
   cross-entropy of the answer's first token after the prompt without examples.

Published settings, for models of 4B to 70B parameters: M = 50, N = 10, Adam with learning rate 0.2,
400 steps of batch 1, validation on 100 examples every 50 steps.

What the reference does differently:

- It means to keep the point of best validation, but never updates the best value, so it keeps the
  last point validated. Here the gates of every `validate_every` steps are kept (`KeepingOptimizer`)
  and the best are taken, by the validation loss.
- It puts prompts into `Q: {x} A: {y}`; here the examples' own prompts are joined by blank lines.
- Answers that begin with a digit needed care there, because a space is a token of its own before
  digits; here the answer's first token is whatever the tokenizer gives.

Where it acts: a variant's edits mix at every token, and `Tuned.acts` says that they belong at the
prompt's last one ("prompt_end"), where `placed` puts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxheads import tasks
from jaxheads.data.rows import ArrayRows
from jaxheads.edits import Edits, Mix
from jaxheads.methods.iti import last_values
from jaxheads.methods.measure import rows_scores
from jaxheads.methods.method import Tuned, placed
from jaxheads.methods.objective import fit_loss
from jaxheads.model.batch import Answers, Batch, pack
from jaxheads.model.transformer import Transformer
from jaxheads.tasks import Example
from jaxheads.train.fit import Fit
from jaxheads.train.optimizer import Optimizer
from jaxheads.train.rules import Rule

if TYPE_CHECKING:
    from jaxheads.methods.method import TaskData
    from jaxheads.train.job import Job

Array = jax.Array
NAME = "soft_injection"
BATCH = 32
"""Rows validated at a time."""


@dataclass(frozen=True)
class SoftInjection:
    """Settings.

    Attributes:
      prompts: M, few-shot prompts that the task embedding is a mean of.
      shots: N, examples before the question of each of them.
      validation: share of the training groups that picks the best gates.
      validate_every: steps between the gates it picks from.
      controls: draws of the trained gates dealt to other heads.
      fit: of the gates.
    """

    prompts: int = 50
    shots: int = 10
    validation: float = 0.2
    validate_every: int = 50
    controls: int = 5
    fit: Fit = field(
        default_factory=lambda: Fit(
            steps=400, batch_size=1, optimizer=Optimizer(name="adam", learning_rate=0.2)
        )
    )

    def __post_init__(self) -> None:
        least_of = {"prompts": 1, "shots": 1, "validate_every": 1, "controls": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.fit.average is not None:
            raise ValueError(
                f"fit.average must be left out, got {self.fit.average}: the gates kept on the way "
                "would be averaged too"
            )

    def train(
        self, job: Job, model: Transformer, tokenizer: tasks.Tokenizer, data: TaskData
    ) -> dict[str, Tuned]:
        """Makes the task embedding and trains the gates, both from the training examples.

        Returns:
          "soft_injection"; "all heads" (every gate 1); and "random 1", ... (the trained gates,
          dealt to the heads anew).

        Raises:
          ValueError: too few examples for `shots`, or too few groups to hold some back.
        """
        examples, held_back = tasks.split(data.train, self.validation, job.seed)
        width = data.train_batch.tokens.shape[1]
        rows, check = (
            first_target(tasks.encode(side, tokenizer, length=width).batch)
            for side in (examples, held_back)
        )
        prompts = few_shot(examples, tokenizer, self.shots, self.prompts, job.seed)
        embedding = last_values(job, model, prompts).mean(axis=1)
        gates = np.zeros((model.config.n_layers, model.config.n_heads), np.float32)
        count = math.ceil(self.fit.steps / self.validate_every)
        start = {"gates": gates, "step": np.float32(0), "kept": np.stack([gates] * count)}
        settings = asdict(self.fit.optimizer) | {"validate_every": self.validate_every}
        ruled = replace(job, rules=(*job.rules, Rule("gates|kept|embedding", None)))
        trained = ruled.fit(
            NAME,
            injection_loss,
            start,
            {"model": model, "embedding": embedding},
            ArrayRows((rows, rows.answers())),
            replace(self.fit, optimizer=KeepingOptimizer(**settings)),
            held_out=ArrayRows((check, check.answers())),
        )
        points = jax.device_get(trained["kept"])
        tried = [injected(embedding, np.asarray(jax.nn.sigmoid(point))) for point in points]
        losses = [
            rows_scores(job, model, check, placed(one, check), BATCH)["loss"].mean()
            for one in tried
        ]
        best = tried[int(np.argmin(losses))]
        alpha = np.asarray(best.scores)
        found = {NAME: best, "all heads": injected(embedding, np.ones_like(alpha))}
        rng = np.random.default_rng(job.seed)
        for n in range(1, self.controls + 1):
            dealt = rng.permutation(alpha.ravel()).reshape(alpha.shape)
            found[f"random {n}"] = injected(embedding, dealt)
        return found


@dataclass(frozen=True)
class KeepingOptimizer(Optimizer):
    """An optimizer for {"gates", "step", "kept"} that trains "gates" and keeps them on the way.

    "step" float32 [] is counted up, and "kept" [P,...] gets the gates after every
    `validate_every` steps and after the last one. A pure function of what is trained, so a run
    that was interrupted keeps what an uninterrupted one does.

    Attributes:
      validate_every: steps between the gates that are kept.
    """

    validate_every: int = 50

    def build(self, steps: int, mask: Any = None) -> optax.GradientTransformation:
        """The transformation; see `Optimizer.build`."""
        assert mask is None, "all gates are trained"
        inner = super().build(steps)

        def update(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
            change, state = inner.update(gradient["gates"], state, params["gates"])
            kept, step = params["kept"], params["step"] + 1
            marks = jnp.minimum((1 + jnp.arange(len(kept))) * self.validate_every, steps)
            here = (marks == step).reshape(-1, *(1,) * (kept.ndim - 1))
            new = jnp.where(here, params["gates"] + change - kept, 0)
            return {"gates": change, "step": jnp.ones_like(step), "kept": new}, state

        return optax.GradientTransformation(lambda params: inner.init(params["gates"]), update)


def injected(embedding: np.ndarray, alpha: np.ndarray) -> Tuned:
    """A variant: t [L,H,Dh] mixed in by alpha [L,H] at the prompt's last token."""
    edits = injection(embedding, alpha)
    return Tuned(edits=edits, trained=alpha.size, acts="prompt_end", scores=alpha)


def few_shot(
    examples: Sequence[Example],
    tokenizer: tasks.Tokenizer,
    shots: int,
    count: int,
    seed: int,
    separator: str = "\n\n",
) -> Batch:
    """Prompts with solved examples before them, and without an answer of their own.

    Each draws its examples and its question anew, all different, from `examples`. Every part is
    tokenised apart, as `tasks.encode` does it.

    Args:
      examples: what to draw from.
      tokenizer: turns text into token ids.
      shots: N, solved examples of a prompt.
      count: M, prompts.
      seed: decides the draws.
      separator: between an answer and the next prompt.

    Returns:
      A batch [M,T], padded on the right.

    Raises:
      ValueError: not more examples than `shots`.
    """
    if len(examples) <= shots:
        raise ValueError(
            f"{shots} shots and a question need {shots + 1} different examples, got {len(examples)}"
        )
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        *solved, asked = (examples[i] for i in rng.permutation(len(examples))[: shots + 1])
        texts = [part for e in solved for part in (e.prompt, e.answer, separator)] + [asked.prompt]
        first = tokenizer.encode(texts[0])
        rest = [tokenizer.encode(text, add_special_tokens=False) for text in texts[1:]]
        rows.append([*first, *(token for part in rest for token in part)])
    return pack(rows)


def first_target(batch: Batch) -> Batch:
    """The batch with only the first target of each row as a target; numpy arrays."""
    targets = np.asarray(batch.target_mask)
    return replace(batch, targets=targets & (np.cumsum(targets, axis=1) == 1))


def injection(embedding: Array | np.ndarray, alpha: Array | np.ndarray) -> Edits:
    """(1 - alpha) * z + alpha * t for t [L,H,Dh] and alpha [L,H], at every token."""
    value, weight = jnp.asarray(embedding), jnp.asarray(alpha)
    return Edits(z=Mix(value[:, None, None], weight[:, None, None, :, None]))


def injection_loss(
    trained: dict[str, Array], frozen: Any, data: tuple[Batch, Answers], key: Array | None
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the first answer token, in nats.

    Args:
      trained: a [L,H] as "gates".
      frozen: "model", and t [L,H,Dh] as "embedding".
      data: a batch from `first_target` with its answers.
      key: not used.
    """
    del key
    batch, answers = data
    edits = injection(frozen["embedding"], jax.nn.sigmoid(trained["gates"]))
    end = jnp.arange(batch.tokens.shape[1]) == jnp.asarray(answers.slots)[:, :1]
    return fit_loss(frozen["model"], data, edits=edits.when(end))
