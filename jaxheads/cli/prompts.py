"""Pairs of prompts for the commands that compare two runs: a task's, or one's own in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxheads.cli.eval import parse_options
from jaxheads.cli.terminal import say
from jaxheads.names import unknown

if TYPE_CHECKING:
    from jaxheads.model import Transformer
    from jaxheads.sweep.metrics import Metric
    from jaxheads.tasks import Example, Pairs
    from jaxheads.text import Tokenizer

KEYS = ("prompt", "answer", "wrong", "corrupted")
"""What a line of a file of prompts holds."""
MetricName = Literal["logit-difference", "probability", "loss", "rank", "kl"]


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts are run: of a task, or of a file."""

    task: str | None = None
    """A task with pairs, such as ioi, greater_than or capitals."""
    option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")
    ] = ()
    """An option of the task, such as template=went; may be given several times."""
    prompts: Path | None = None
    """Your own prompts instead: a JSON object on each line with prompt, answer, wrong and
    corrupted, where answers are single tokens with their leading space."""
    count: int | None = None
    """Prompts; default 8 of a task, all of a file."""
    seed: int = 0
    """Of the task's examples and of random controls."""
    rows: int = 8
    """Prompts that are run together; more need more memory."""

    def read(self) -> Given:
        """The examples, before any model is read.

        Raises:
          ValueError: neither a task nor a file, or both; numbers out of range; an unknown task
            or option; a task without pairs; a line that is not an example.
        """
        if (self.task is None) == (self.prompts is None):
            raise ValueError("give --task NAME or --prompts FILE, one of the two")
        for name, value in {"--count": self.count, "--rows": self.rows}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.prompts is None:
            return Given(_of_task(self), ())
        if self.option:
            raise ValueError("--option is for --task, not for --prompts")
        found = list(_of_file(self.prompts))[: self.count]
        if not found:
            raise ValueError(f"{self.prompts} holds no prompts")
        names = tuple(f"{self.prompts} line {line}" for line, _ in found)
        return Given(tuple(example for _, example in found), names)

    def facts(self) -> dict[str, Any]:
        """What was asked, for files and pages."""
        source = {"task": self.task} if self.task else {"prompts": str(self.prompts)}
        return source | parse_options(self.option) | {"seed": self.seed}


@dataclass(frozen=True)
class Given:
    """Examples, and where each stands in a file (of a task's, nowhere)."""

    examples: tuple[Example, ...]
    places: tuple[str, ...]

    def encode(self, tokenizer: Tokenizer, *, aligned: bool) -> tuple[list[Example], Pairs]:
        """Tokenises the examples that fit, and says so where some do not.

        A task's examples are left out where an answer is not a single token or the two prompts
        differ in length; one's own have to fit.

        Args:
          tokenizer: the model's.
          aligned: whether all prompts must have one length, so that slots can be compared.

        Raises:
          ValueError: an example of a file that does not fit; no example of a task that fits.
        """
        from jaxheads import tasks

        if not self.places:
            kept = tasks.single_token(self.examples, tokenizer)
            kept = tasks.same_length(kept, tokenizer) if aligned else kept
            if len(kept) < len(self.examples):
                also = ", and all prompts of one length too" * aligned
                say(
                    f"{len(kept)} of {len(self.examples)} examples fit: single-token answers, "
                    f"both prompts of one length{also}"
                )
            return kept, tasks.encode_pairs(kept, tokenizer)
        lengths = []
        for place, example in zip(self.places, self.examples, strict=True):
            try:
                pair = tasks.encode_pairs([example], tokenizer)
            except ValueError as error:
                raise ValueError(f"{place}: {str(error).removesuffix(' (example 0)')}") from error
            lengths.append(pair.clean.tokens.shape[1])
            if aligned and lengths[-1] != lengths[0]:
                raise ValueError(
                    f"{place} has {lengths[-1]} tokens and {self.places[0]} has {lengths[0]}: "
                    "positions can be compared only in prompts of equal length"
                )
        return list(self.examples), tasks.encode_pairs(self.examples, tokenizer)


def batches(pairs: Pairs, rows: int) -> list[Pairs]:
    """The pairs, `rows` at a time."""
    import jax

    size = len(pairs.answer_slot)
    return [
        jax.tree.map(lambda leaf, start=start: leaf[start : start + rows], pairs)
        for start in range(0, size, rows)
    ]


def make_metric(name: MetricName, model: Transformer, pairs: Pairs) -> Metric:
    """The metric called `name`, of the clean prompts; `kl` is the divergence from that run."""
    from jaxheads.sweep.metrics import (
        AnswerLoss,
        Divergence,
        LogitDifference,
        Probability,
        Rank,
    )

    if name == "kl":
        return Divergence.of(model, pairs.clean)
    if name == "logit-difference":
        return LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)
    kinds: dict[str, Any] = {"probability": Probability, "loss": AnswerLoss, "rank": Rank}
    return kinds[name].of(pairs.clean, pairs.answers)


def refuse_metric(name: MetricName, *, flat: bool, by: str) -> None:
    """Refuses metrics without the first derivative that a method lives on.

    Args:
      name: the metric.
      flat: whether the derivative is taken in the clean run, where kl is at its minimum.
      by: the method, for the error.

    Raises:
      ValueError: such a metric.
    """
    if name == "rank":
        raise ValueError(f"--metric rank has no derivative, which {by} needs")
    if name == "kl" and flat:
        raise ValueError(
            f"--metric kl is at its minimum in the clean run, where {by} takes its derivative: "
            "that is zero"
        )


def _of_task(asked: PromptOptions) -> tuple[Example, ...]:
    from jaxheads import tasks

    name, options = asked.task or "", parse_options(asked.option)
    examples = tasks.generate(
        name, 8 if asked.count is None else asked.count, asked.seed, **options
    )
    if any(example.corrupted is None or example.wrong is None for example in examples):
        known = [task for task in tasks.TASKS if tasks.generate(task, 1, 0)[0].corrupted]
        raise ValueError(
            f"task {name!r} has no pairs of a clean and a corrupted prompt; these have: "
            f"{', '.join(known)}"
        )
    return tuple(examples)


def _of_file(path: Path) -> Iterator[tuple[int, Example]]:
    """Line numbers and examples; empty lines are skipped."""
    from jaxheads.tasks import Example

    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{where} is not a JSON object with {_listed(KEYS)}")
        for key, value in found.items():
            if key not in KEYS:
                raise ValueError(f"{where}: {unknown('key', key, KEYS)}")
            if not isinstance(value, str) or not value:
                raise ValueError(f"{where}: {key!r} must be text, got {value!r}")
        missing = [key for key in KEYS if key not in found]
        if missing:
            raise ValueError(f"{where} lacks {_listed(missing)}")
        yield number, Example(**found)


def _listed(names: Sequence[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} and {last}" if most else last


Prompts = Annotated[PromptOptions, tyro.conf.arg(name="")]
