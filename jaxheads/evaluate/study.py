"""`run_study`: caches compared on tasks, at equal budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxheads.decode.policies import HeadWise, Policy
from jaxheads.evaluate.contexts import ANSWER, Contexts
from jaxheads.evaluate.measure import Measured, measure
from jaxheads.evaluate.methods import METHODS, method_scores, policy_of
from jaxheads.evaluate.plan import Plan, Variant
from jaxheads.evaluate.tasks import Request, contexts_of
from jaxheads.model.transformer import Transformer
from jaxheads.text import Tokenizer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Run:
    """One cache on one task at one length.

    Attributes:
      variant: the cache.
      task: the task.
      length: tokens of a context.
      measured: of each row.
      depths: float64 [B] of the rows; None where answers have no place.
    """

    variant: Variant
    task: str
    length: int
    measured: Measured
    depths: np.ndarray | None

    @property
    def loss(self) -> float:
        """Mean over rows, nats per token."""
        return float(self.measured.loss.mean())

    @property
    def exact(self) -> float:
        """Share of rows."""
        return float(self.measured.exact.mean())

    def to_json(self) -> dict[str, Any]:
        """As a row of JSON."""
        return {
            **asdict(self.variant),
            **{"name": self.variant.name, "task": self.task, "length": self.length},
            **{"loss": self.loss, "exact": self.exact},
            **{"bytes": self.measured.nbytes, "share": self.measured.share},
            "rows": {
                "loss": self.measured.loss.tolist(),
                "exact": self.measured.exact.tolist(),
                "depth": None if self.depths is None else self.depths.tolist(),
            },
        }


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but the random draw: several of "random", one of others.

    Attributes:
      runs: the runs.
    """

    runs: tuple[Run, ...]

    @property
    def one(self) -> Run:
        """The first, for what they have in common."""
        return self.runs[0]

    @property
    def losses(self) -> np.ndarray:
        """Mean loss of each, nats per token."""
        return np.array([run.loss for run in self.runs])

    @property
    def exacts(self) -> np.ndarray:
        """Share of exact answers of each."""
        return np.array([run.exact for run in self.runs])

    def loss_at(self, depth: float) -> float:
        """Mean loss of the rows at a depth; NaN where there is none."""
        rows = [run.measured.loss[np.isclose(depths_of(run), depth)] for run in self.runs]
        found = np.concatenate(rows)
        return float(found.mean()) if len(found) else math.nan


def depths_of(run: Run) -> np.ndarray:
    """Depths of a run's rows; NaN where answers have no place."""
    return np.full(len(run.measured.loss), np.nan) if run.depths is None else run.depths


@dataclass(frozen=True, eq=False)
class Study:
    """What a comparison found.

    Attributes:
      plan: what was compared.
      runs: for each length, each cache on each task.
      scores: float [L,K] by head-wise method.
      full_heads: bool [L,K] by variant and length, of head-wise caches.
    """

    plan: Plan
    runs: tuple[Run, ...]
    scores: Mapping[str, np.ndarray]
    full_heads: Mapping[tuple[Variant, int], np.ndarray]

    def groups(self, task: str, length: int | None = None) -> list[Group]:
        """Runs of a task at a length (None: any), those of random draws together."""
        found: dict[tuple[str, float, int], list[Run]] = {}
        for run in self.runs:
            if run.task == task and length in (None, run.length):
                key = (run.variant.name, run.variant.budget, run.length)
                found.setdefault(key, []).append(run)
        return [Group(tuple(runs)) for runs in found.values()]

    def to_json(self) -> dict[str, Any]:
        """As JSON; bytes are of one row, losses in nats per token."""
        return {
            "plan": asdict(self.plan),
            "runs": [run.to_json() for run in self.runs],
            "scores": {name: scores.tolist() for name, scores in self.scores.items()},
            "full_heads": [
                {**asdict(variant), "length": length, "heads": np.argwhere(full).tolist()}
                for (variant, length), full in self.full_heads.items()
            ],
        }


def run_study(
    model: Transformer,
    tokenizer: Tokenizer,
    plan: Plan,
    *,
    scores: Mapping[str, np.ndarray] | None = None,
    text: str = "",
    on_progress: Progress = lambda what, done, total: None,
) -> Study:
    """Measures every cache of a plan on every task, at every length.

    Args:
      model: a causal language model.
      tokenizer: its tokenizer.
      plan: what is compared.
      scores: [L,K] of head-wise methods by name; those of others are measured.
      text: for the task "text".
      on_progress: told (what, steps done, steps in all): scores of methods, then rows.

    Raises:
      ValueError: what does not go with the model (`Plan.check_model`), a method without scores, a
        length for which a task has no rows.
    """
    given = dict(scores or {})
    plan.check_scores(given)
    plan.check_model(model.config, given)
    rows = {
        length: {task: _contexts(task, length, model, tokenizer, plan, text) for task in plan.tasks}
        for length in plan.lengths
    }
    scored = _scores(model, tokenizer, plan, given, on_progress)
    shape = (model.config.n_layers, model.config.n_kv_heads)
    drawn = {
        draw: np.random.default_rng((plan.seed, draw)).random(shape)
        for draw in range(plan.controls)
    }
    variants = list(plan.variants())
    total = len(variants) * plan.count * len(plan.tasks) * len(plan.lengths)
    runs: list[Run] = []
    full_heads: dict[tuple[Variant, int], np.ndarray] = {}
    for length, tasks in rows.items():
        for variant in variants:
            chosen = scored.get(variant.method) if variant.draw is None else drawn[variant.draw]
            policy = policy_of(
                variant.method,
                model.config,
                budget=variant.budget,
                length=length,
                room=ANSWER,
                options=replace(plan.options, compensate=variant.compensate),
                scores=chosen,
            )
            if METHODS[variant.method].by_head:
                full_heads[variant, length] = _full(policy)
            for task, contexts in tasks.items():
                before = len(runs) * plan.count

                def show(done: int, before: int = before) -> None:
                    on_progress("rows", before + done, total)

                found = measure(
                    model, policy, contexts, rows=plan.rows, chunk=plan.chunk, on_rows=show
                )
                runs.append(Run(variant, task, length, found, contexts.depths))
    return Study(plan, tuple(runs), scored, full_heads)


def _contexts(
    task: str, length: int, model: Transformer, tokenizer: Tokenizer, plan: Plan, text: str
) -> Contexts:
    size = model.config.vocab_size
    request = Request(tokenizer, size, length, plan.count, plan.depths, plan.seed, text)
    return contexts_of(task, request)


def _scores(
    model: Transformer,
    tokenizer: Tokenizer,
    plan: Plan,
    given: Mapping[str, np.ndarray],
    on_progress: Progress,
) -> dict[str, np.ndarray]:
    """Of the head-wise methods that are not random."""
    wanted = [name for name in plan.methods if METHODS[name].by_head and name != "random"]
    found = {}
    for done, name in enumerate(wanted):
        on_progress("scores of heads", done, len(wanted))
        known = name in given
        found[name] = (
            given[name] if known else method_scores(name, model, tokenizer, seed=plan.seed)
        )
    if wanted:
        on_progress("scores of heads", len(wanted), len(wanted))
    return found


def _full(policy: Policy) -> np.ndarray:
    assert isinstance(policy, HeadWise)
    return policy.kinds.full
