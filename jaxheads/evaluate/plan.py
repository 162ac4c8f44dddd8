"""`Plan`: which caches are compared on what, checked before a model is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from jaxheads.evaluate.contexts import ANSWER
from jaxheads.evaluate.methods import METHODS, KindOptions, Setting
from jaxheads.evaluate.tasks import DEPTHS, TASKS, check_depths
from jaxheads.model.config import ModelConfig
from jaxheads.names import choose, unknown
from jaxheads.tasks.checks import at_least


@dataclass(frozen=True)
class Variant:
    """One cache that is measured.

    Attributes:
      method: a name of `METHODS`.
      budget: share of the tokens of a full cache; 1 for "full".
      draw: which random set of heads; None for other methods.
      compensate: whether heads that stream compensate.
    """

    method: str
    budget: float
    draw: int | None = None
    compensate: bool = False

    @property
    def name(self) -> str:
        """The method, for people, with "+c" where it compensates and need not."""
        always = METHODS[self.method].compensate
        return f"{self.method}+c" if self.compensate and not always else self.method


@dataclass(frozen=True)
class Plan:
    """A comparison.

    "full" is measured always, once at each length; with head-wise methods come random sets of as
    many heads, with the same options.

    Attributes:
      methods: names of `METHODS`.
      budgets: shares of the tokens of a full cache.
      lengths: tokens of contexts.
      tasks: names of `evaluate.TASKS`.
      count: rows of each task at each length.
      depths: of answers in their contexts.
      controls: random sets of heads.
      options: of kinds of heads.
      seed: of rows, scores and random sets.
      rows: contexts that are read together.
      chunk: tokens that are read at a time.

    Raises:
      ValueError: an unknown name, nothing of something or a thing twice, a number out of range, a
        budget too small for a method.
    """

    methods: tuple[str, ...] = ("razor",)
    budgets: tuple[float, ...] = (0.25,)
    lengths: tuple[int, ...] = (512,)
    tasks: tuple[str, ...] = ("needle", "copy")
    count: int = 10
    depths: tuple[float, ...] = DEPTHS
    controls: int = 5
    options: KindOptions = field(default_factory=KindOptions)
    seed: int = 0
    rows: int = 4
    chunk: int = 512

    def __post_init__(self) -> None:
        for method in self.methods:
            choose("cache method", method, METHODS)
        for task in self.tasks:
            choose("task", task, TASKS)
        for name in ("methods", "budgets", "lengths", "tasks"):
            given = getattr(self, name)
            if not given:
                raise ValueError(f"{name} must be one or more, got none")
            for value in given:
                if given.count(value) > 1:
                    raise ValueError(f"{name}: {value} is given twice")
        check_depths(self.depths)
        for name, number in (
            ("count", self.count),
            ("controls", self.controls),
            ("rows", self.rows),
            ("chunk", self.chunk),
            *(("length", length) for length in self.lengths),
        ):
            at_least(name, number, 1)
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"budget must lie in (0, 1], got {budget}")
        self._check_policies()

    def variants(self) -> Iterator[Variant]:
        """What is measured at each length."""
        yield Variant("full", 1.0)
        compensated = {
            self.options.compensate or METHODS[name].compensate
            for name in self.methods
            if METHODS[name].by_head
        }
        for budget in self.budgets:
            for name in self.methods:
                if name not in ("full", "random"):
                    method = METHODS[name]
                    streams = method.by_head or name == "streaming"
                    yield Variant(
                        name,
                        budget,
                        compensate=streams and (self.options.compensate or method.compensate),
                    )
            for compensate in sorted(compensated):
                for draw in range(self.controls):
                    yield Variant("random", budget, draw, compensate)

    def check_scores(self, given: Mapping[str, np.ndarray]) -> None:
        """Finds methods whose scores are missing, and scores that no method has.

        Args:
          given: scores by the name of their method.

        Raises:
          ValueError: such a method.
        """
        wanted = [name for name in self.methods if METHODS[name].by_head and name != "random"]
        for name in given:
            if name not in wanted:
                raise ValueError(unknown("head-wise method with scores:", name, wanted))
        for name in wanted:
            if METHODS[name].scored is None and name not in given:
                raise ValueError(
                    f"cache method {name!r} needs the scores of a file: train its gates with "
                    f"`jaxheads train` and give {name}=RUN/scores.json"
                )

    def check_model(self, config: ModelConfig, given: Mapping[str, np.ndarray]) -> None:
        """Finds what does not go with a model.

        Args:
          config: of the model.
          given: scores by the name of their method.

        Raises:
          ValueError: contexts longer than the model's, scores of another model.
        """
        longest = max(self.lengths)
        if longest + ANSWER > config.context_length:
            raise ValueError(
                f"length {longest} and {ANSWER} tokens of an answer exceed the model's context of "
                f"{config.context_length}"
            )
        shape = (config.n_layers, config.n_kv_heads)
        for name, scores in given.items():
            if scores.shape != shape:
                raise ValueError(
                    f"scores of {name!r} are {list(scores.shape)}, expected {list(shape)} of this "
                    "model: they were made for another one"
                )

    def _check_policies(self) -> None:
        """Makes the policies of a model of one head."""
        for length in self.lengths:
            for variant in self.variants():
                options = replace(self.options, compensate=variant.compensate)
                setting = Setting((1, 1), variant.budget, length, ANSWER, options, np.zeros((1, 1)))
                try:
                    METHODS[variant.method].policy(setting)
                except ValueError as error:
                    raise ValueError(f"{variant.method} at length {length}: {error}") from error
