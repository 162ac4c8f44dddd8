"""Every score of heads by its name: what it means, its unit, and what measures it.

Scores that one pass over the same data gives share a probe, which runs once for all of them.
Nothing heavy is imported before a score is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxheads.names import choose

if TYPE_CHECKING:
    from jaxheads.model.transformer import Transformer
    from jaxheads.sweep.named import NamedArray
    from jaxheads.text import Tokenizer

Progress = Callable[[str, int, int], None]
ROWS = 4
"""Rows of one forward pass: their attention maps are in memory together."""


@dataclass(frozen=True)
class Request:
    """What a probe is asked to measure.

    Attributes:
      model: the model.
      tokenizer: its tokenizer.
      count: prompts, or rows of tokens, to average over.
      seed: of generated prompts.
      text: read by the probe of text.
      on_progress: called as (rows done, rows in all).
    """

    model: Transformer
    tokenizer: Tokenizer
    count: int
    seed: int
    text: str
    on_progress: Callable[[int, int], None]

    @property
    def first_id(self) -> int:
        """The token in front of rows that are not prompts: BOS where there is one."""
        return self.tokenizer.bos_id or 0


@dataclass(frozen=True)
class Score:
    """One score of heads.

    Attributes:
      probe: what measures it, a name of `PROBES`.
      meaning: one line for people, with the source.
      unit: of the values.
    """

    probe: str
    meaning: str
    unit: str


def _repeats(request: Request) -> dict[str, NamedArray]:
    """Random tokens twice over."""
    from jaxheads.sweep.scores import repeat_scores

    config = request.model.config
    return repeat_scores(
        request.model,
        count=request.count,
        length=min(64, (config.context_length - 1) // 2, config.vocab_size - 1),
        seed=request.seed,
        first_id=request.first_id,
        batch_size=ROWS,
        on_progress=request.on_progress,
    )


def _text(request: Request) -> dict[str, NamedArray]:
    """Plain text, cut into at most `count` rows of up to 256 tokens."""
    from jaxheads.sweep.scores import text_rows, text_scores

    length = min(256, request.model.config.context_length)
    ids = request.tokenizer.encode(request.text, add_special_tokens=False)
    ids = ids[: request.count * (length - 1)]
    batches = text_rows(ids, length=length, first_id=request.first_id, batch_size=ROWS)
    rows = sum(int(batch.mask.any(axis=1).sum()) for batch in batches)
    return text_scores(
        request.model, batches, lambda done: request.on_progress(min(done, rows), rows)
    )


def _lookups(request: Request) -> dict[str, NamedArray]:
    """Values to look up in JSON."""
    import jax
    import numpy as np

    from jaxheads import tasks
    from jaxheads.methods.retrieval_heads import retrieval_scores
    from jaxheads.sweep.scores import by_head

    examples = tasks.generate("lookup", request.count, request.seed)
    encoded = tasks.encode(examples, request.tokenizer)
    config = request.model.config
    total = np.zeros((config.n_layers, config.n_heads))
    for first in range(0, request.count, ROWS):
        rows = slice(first, first + ROWS)
        part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], encoded)
        size = len(part.answer_start)
        total = total + retrieval_scores(request.model, part) * size
        request.on_progress(first + size, request.count)
    info = {"prompts": request.count, "seed": request.seed}
    return {"retrieval": by_head("retrieval", total / request.count, config, info)}


def _copying(request: Request) -> dict[str, NamedArray]:
    """The weights alone."""
    from jaxheads.circuits.token_circuits import copying_scores
    from jaxheads.sweep.scores import by_head

    values = copying_scores(request.model)
    request.on_progress(1, 1)
    return {"copying": by_head("copying", values, request.model.config)}


def _successor(request: Request) -> dict[str, NamedArray]:
    """The weights alone, on words that have an order."""
    from jaxheads.circuits.successor import successor_scores
    from jaxheads.sweep.scores import by_head

    found = successor_scores(request.model, request.tokenizer, seed=request.seed)
    request.on_progress(1, 1)
    info = {"words": sum(found.counts.values()), "random_orders": float(found.control.max())}
    return {"successor": by_head("successor", found.scores, request.model.config, info)}


def _check_copying(model: Transformer, tokenizer: Tokenizer) -> None:
    from jaxheads.circuits.token_circuits import check_logits

    check_logits(model)


def _check_successor(model: Transformer, tokenizer: Tokenizer) -> None:
    from jaxheads.circuits.successor import SUCCESSION, successions
    from jaxheads.circuits.token_circuits import check_logits

    check_logits(model)
    successions(tokenizer, SUCCESSION)


PROBES: Mapping[str, Callable[[Request], dict[str, NamedArray]]] = MappingProxyType(
    {
        "repeats": _repeats,
        "lookups": _lookups,
        "text": _text,
        "copying": _copying,
        "successor": _successor,
    }
)
"""What measures the scores, by name."""

_CHECKS: Mapping[str, Callable[[Transformer, Tokenizer], None]] = MappingProxyType(
    {"copying": _check_copying, "successor": _check_successor}
)
"""Of probes that not every model has: raises ValueError for those it refuses."""

SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "retrieval": Score(
            "lookups",
            "share of the answer's tokens copied out of the context (Wu et al. 2024)",
            "share",
        ),
        "induction": Score(
            "repeats",
            "attention to the token after an earlier occurrence (Olsson et al. 2022)",
            "share of attention",
        ),
        "previous": Score("repeats", "attention to the token before", "share of attention"),
        "duplicate": Score(
            "repeats",
            "attention to an earlier occurrence of the same token",
            "share of attention",
        ),
        "distance": Score(
            "text", "how far back the attention lies on average (Li et al. 2025)", "tokens"
        ),
        "entropy": Score("text", "entropy of the attention", "nats"),
        "evenness": Score(
            "text",
            "entropy of the attention over that of uniform attention",
            "share",
        ),
        "sink": Score(
            "text", "attention to the first token (Xiao et al. 2024)", "share of attention"
        ),
        "copying": Score(
            "copying",
            "eigenvalues of the token-to-logit circuit, their sum over the sum of their sizes "
            "(Elhage et al. 2021)",
            "between -1 and 1",
        ),
        "successor": Score(
            "successor",
            "share of ordered words whose successor the head raises most (Gould et al. 2024)",
            "share",
        ),
    }
)
"""Scores by name, in the order in which they are shown."""


def choose_scores(names: Iterable[str]) -> tuple[str, ...]:
    """The scores named, "all" for every one, each once and in the order of `SCORES`.

    Raises:
      ValueError: an unknown name, or none.
    """
    names = [choose("score", name, (*SCORES, "all")) for name in names]
    if not names:
        raise ValueError(f"no score named: expected one of {', '.join(SCORES)}, or all")
    return tuple(name for name in SCORES if name in names or "all" in names)


def refused(model: Transformer, tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, str]:
    """Those of the scores that this model cannot have, and why."""
    found = {}
    for name in names:
        check = _CHECKS.get(SCORES[name].probe)
        try:
            if check is not None:
                check(model, tokenizer)
        except ValueError as error:
            found[name] = str(error)
    return found


def score_heads(
    model: Transformer,
    tokenizer: Tokenizer,
    names: Iterable[str] = ("all",),
    *,
    count: int = 16,
    seed: int = 0,
    text: str | None = None,
    on_progress: Progress = lambda probe, done, total: None,
) -> dict[str, NamedArray]:
    """Scores of every head.

    Args:
      model: a causal language model.
      tokenizer: its tokenizer.
      names: names of `SCORES`, or "all", which leaves out what this model is `refused`.
      count: prompts, or rows of tokens, to average over; scores of weights have none.
      seed: of generated prompts.
      text: for the scores of text; default the sample text.
      on_progress: called as (probe, rows done, rows in all).

    Returns:
      float32 [L,H] by name, in the order of `SCORES`.

    Raises:
      ValueError: an unknown score, or one that this model cannot have; a count below 1; text
        without tokens; prompts longer than the model's context.
    """
    names = list(names)
    wanted = choose_scores(names)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    absent = refused(model, tokenizer, wanted)
    for name in names:
        if name in absent:
            raise ValueError(f"score {name!r}: {absent[name]}")
    wanted = tuple(name for name in wanted if name not in absent)
    if text is None:
        from jaxheads.text import sample_text

        text = sample_text()
    found: dict[str, NamedArray] = {}
    for probe in dict.fromkeys(SCORES[name].probe for name in wanted):

        def show(done: int, total: int, probe: str = probe) -> None:
            on_progress(probe, done, total)

        found |= PROBES[probe](Request(model, tokenizer, count, seed, text, show))
    return {name: replace(found[name], name=f"{name} ({SCORES[name].unit})") for name in wanted}
