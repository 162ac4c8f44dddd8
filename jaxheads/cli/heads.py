"""`jaxheads heads`: score every head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxheads.cli.options import Dtype, Model, head_name, load_model, parse
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.files import check_target, write_json

if TYPE_CHECKING:
    import numpy as np

    from jaxheads.model import Transformer
    from jaxheads.text import Tokenizer

Score = Literal["retrieval", "induction", "previous", "duplicate"]
MEANING = {
    "retrieval": "share of the answer's tokens copied out of the context (Wu et al. 2024)",
    "induction": "attention to the token after an earlier occurrence (Olsson et al. 2022)",
    "previous": "attention to the token before",
    "duplicate": "attention to an earlier occurrence of the same token",
}
ROWS = 4
"""Prompts of one forward pass: their attention maps are in memory together."""


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(heads, "heads", argv)


def heads(
    model: Model,
    score: Score = "retrieval",
    count: int = 16,
    seed: int = 0,
    top: int = 10,
    json: Path | None = None,
    report: Path | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Score every head of a model and show the best.

    Example: jaxheads heads smollm2-135m-instruct --score induction --report heads.html

    Args:
        model: A name, a directory or a .gguf file.
        score: What is scored. retrieval uses lookups in JSON; the others random tokens twice.
        count: Prompts to average over.
        seed: Of the prompts.
        top: Heads to show.
        json: Save the scores of all heads here.
        report: Write an HTML page with a heatmap here.
        dtype: Of parameters and activations.
    """
    for name, value in {"--count": count, "--top": top}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_target(json)
    check_target(report)
    from jaxheads.methods.retrieval_heads import top_heads

    loaded, tokenizer = load_model(model, dtype)
    values = score_heads(loaded, tokenizer, score, count, seed)
    best = top_heads(values, min(top, values.size))
    rows = [(head_name(head), float(values[head])) for head in best]
    print_table(f"{score}: {MEANING[score]}", ("head", "score"), rows)
    if json:
        found = {"score": score, "model": model, "count": count, "seed": seed}
        write_json(json, found | {"axes": ["layer", "head"], "values": values.tolist()})
        say(f"scores in {json}")
    if report:
        _write_report(report, model, score, count, values, rows, best)
        say(f"report in {report}")


def score_heads(
    model: Transformer, tokenizer: Tokenizer, score: Score, count: int, seed: int
) -> np.ndarray:
    """float32 [L,H], with a progress bar."""
    with progress_bar() as progress:
        task = progress.add_task(f"{score} scores", total=count)

        def show(done: int, _: int) -> None:
            progress.update(task, completed=done)

        if score != "retrieval":
            from jaxheads.methods.pattern_scores import pattern_scores

            config = model.config
            return pattern_scores(
                model,
                count=count,
                length=min(64, (config.context_length - 1) // 2, config.vocab_size - 1),
                seed=seed,
                first_id=tokenizer.bos_id or 0,
                batch_size=ROWS,
                on_progress=show,
            )[score]
        import jax
        import numpy as np

        from jaxheads import tasks
        from jaxheads.methods.retrieval_heads import retrieval_scores

        encoded = tasks.encode(tasks.generate("lookup", count, seed), tokenizer)
        total = np.zeros((model.config.n_layers, model.config.n_heads))
        for first in range(0, count, ROWS):
            rows = slice(first, first + ROWS)
            part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], encoded)
            size = len(part.answer_start)
            total = total + retrieval_scores(model, part) * size
            show(first + size, count)
        return total / count


def _write_report(
    path: Path,
    model: str,
    score: str,
    count: int,
    values: np.ndarray,
    rows: list[tuple[str, float]],
    best: list[tuple[int, int]],
) -> None:
    from jaxheads.report import Report, head_heatmap, write

    figure = head_heatmap(values, title=f"{score} score of every head", label=score, mark=best)
    page = (
        Report(f"{score.capitalize()} heads of {model}", MEANING[score])
        .section("All heads", f"Mean over {count} prompts; the heads of the table are outlined.")
        .figure(figure, "Layers from the top, heads across.")
        .table(("head", "score"), rows, f"The {len(rows)} best heads")
    )
    write(page, path)
