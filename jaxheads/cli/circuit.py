"""`jaxheads circuit`: the edges between heads and MLPs that carry a behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jaxheads.cli.options import Dtype, Model, load_model, parse
from jaxheads.cli.prompts import (
    MetricName,
    PromptOptions,
    Prompts,
    batches,
    make_metric,
    refuse_metric,
)
from jaxheads.cli.terminal import print_table, progress_bar, say
from jaxheads.files import check_target, write_json

if TYPE_CHECKING:
    from jaxheads.circuits import Circuit
    from jaxheads.model import Transformer
    from jaxheads.sweep.named import NamedArray
    from jaxheads.tasks import Pairs

Method = Literal["eap-ig", "eap", "acdc"]
CURVE = (10, 30, 100, 300)
T = TypeVar("T")


def main(argv: list[str]) -> None:
    """Parses and runs."""
    parse(circuit, "circuit", argv)


def circuit(
    model: Model,
    prompts: Prompts = PromptOptions(),  # noqa: B008 - frozen
    method: Method = "eap-ig",
    edges: int = 100,
    steps: int | None = None,
    tau: float | None = None,
    metric: MetricName = "logit-difference",
    curve: tuple[int, ...] | None = None,
    draws: int = 5,
    top: int = 10,
    json: Path | None = None,
    report: Path | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Find the edges between heads and MLPs that carry a behaviour, and test them.

    Example: jaxheads circuit smollm2-135m-instruct --task ioi --edges 100 --report circuit.html

    Args:
        model: A name, a directory or a .gguf file.
        prompts: Which prompts.
        method: eap-ig: edge attribution with integrated gradients. eap: with one gradient.
            acdc: the best edges by eap-ig, then those removed that are not needed; it runs
            all prompts at once.
        edges: How many of the best edges to take; those that lie on no path from the
            embedding to the logits are left out.
        steps: eap-ig, acdc: gradients to average; default 5.
        tau: acdc: an edge goes if the metric moves by less, in the metric's unit; default 0.03.
        metric: What the behaviour is, after each prompt: right minus wrong answer in logits,
            probability or loss of the right answer, or the divergence (KL) from the model.
        curve: Numbers of edges at which faithfulness is measured, besides --edges; default
            10 30 100 300, as far as the model has so many.
        draws: Random circuits for each of them.
        top: Edges to show.
        json: Save the circuit and the curve here; `Circuit.load` reads it.
        report: Write an HTML page with the circuit's drawing here.
        dtype: Of parameters and activations.
    """
    for name, value in {"--edges": edges, "--draws": draws, "--top": top}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    asked = _settings(method, steps, tau)
    refuse_metric(metric, flat=method == "eap", by=f"--method {method}")
    if curve is not None and (len(set(curve)) < len(curve) or min(curve, default=0) < 1):
        raise ValueError(f"--curve must be different numbers of edges from 1, got {list(curve)}")
    for path in (json, report):
        check_target(path)
    given = prompts.read()
    if method == "acdc" and len(given.examples) > prompts.rows:
        raise ValueError(
            f"--method acdc runs all {len(given.examples)} prompts at once, more than --rows "
            f"{prompts.rows}: raise --rows or lower --count"
        )
    loaded, tokenizer = load_model(model, dtype)
    counts = _counts(loaded, edges, curve)
    examples, pairs = given.encode(tokenizer, aligned=False)
    parts = batches(pairs, prompts.rows)
    scores = _scores(loaded, parts, metric, asked["steps"])
    every, found = _found(loaded, parts, metric, scores, edges, asked.get("tau"))
    measured = _measured(loaded, every, parts, metric, counts, draws, prompts.seed)
    facts = {"model": model, **prompts.facts(), "count": len(examples), **asked,
             "metric": scores.info["metric"], "edges asked": edges}  # fmt: skip
    if method == "acdc":
        alone = _measured(loaded, found, parts, metric, [len(found)], draws, prompts.seed)
        facts["random, highest"] = round(float(alone.values[1:].max()), 4)
    else:
        alone = measured.sel(edges=edges)
    facts["faithfulness"] = float(alone.values.ravel()[0])
    _tell(found, measured, facts, top)
    if json:
        _write_json(json, found, measured, facts)
        say(f"circuit in {json}")
    if report:
        from jaxheads.circuits import node_scores
        from jaxheads.report import write
        from jaxheads.report.circuit_page import METHODS, circuit_page

        shown = {**facts, "method": METHODS[method]}
        write(circuit_page(found, node_scores(scores), measured, shown, examples, top), report)
        say(f"report in {report}")


def _settings(method: Method, steps: int | None, tau: float | None) -> dict[str, Any]:
    """The options of a method, defaults filled in.

    Raises:
      ValueError: an option of another method, or a number out of range.
    """
    if steps is not None and method == "eap":
        raise ValueError("--steps is for --method eap-ig or acdc: eap takes one gradient")
    if tau is not None and method != "acdc":
        raise ValueError(f"--tau is for --method acdc, not for --method {method}")
    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    if tau is not None and not tau > 0:
        raise ValueError(f"--tau must be positive, got {tau}")
    found: dict[str, Any] = {"method": method, "steps": 1 if method == "eap" else steps or 5}
    return found | ({"tau": tau or 0.03} if method == "acdc" else {})


def _counts(model: Transformer, edges: int, curve: Sequence[int] | None) -> list[int]:
    """Numbers of edges at which faithfulness is measured.

    Raises:
      ValueError: more edges than the model has, or a model without a graph.
    """
    from jaxheads.circuits import Graph

    total = int(Graph.of(model.config).allowed.sum())
    for name, most in {"--edges": edges, "--curve": max(curve or (0,))}.items():
        if most > total:
            raise ValueError(
                f"{name} must be at most {total}, the edges that the model has, got {most}"
            )
    return sorted({edges, *(curve or (count for count in CURVE if count <= total))})


def _scores(
    model: Transformer, parts: Sequence[Pairs], metric: MetricName, steps: int
) -> NamedArray:
    """Scores of all edges, averaged over prompts."""
    from jaxheads.circuits import edge_attribution

    def run(part: Pairs) -> NamedArray:
        made = make_metric(metric, model, part)
        return edge_attribution(model, part.clean, part.corrupted, made, steps=steps)

    found, weights = _each("scoring edges", parts, run)
    values = sum(one.values * weight for one, weight in zip(found, weights, strict=True))
    return replace(found[0], values=values)


def _found(
    model: Transformer,
    parts: Sequence[Pairs],
    metric: MetricName,
    scores: NamedArray,
    edges: int,
    tau: float | None,
) -> tuple[Circuit, Circuit]:
    """All edges with their scores, and the circuit of the best; pruned, if there is a tau."""
    from jaxheads.circuits import Circuit, acdc

    every = Circuit.of_scores(model, scores)
    best = every.keep(edges).connected()
    if not len(best):
        raise ValueError(
            f"none of the {edges} best edges lies on a path from the embedding to the logits: "
            "raise --edges"
        )
    if tau is None:
        return every, best

    def prune(part: Pairs) -> Circuit:
        made = make_metric(metric, model, part)
        return acdc(model, part.clean, part.corrupted, tau, metric=made, start=best)

    (pruned,), _ = _each(f"pruning {len(best)} edges", parts, prune)
    if not len(pruned.connected()):
        raise ValueError(f"no edge is needed by --tau {tau:g}: lower it, or raise --edges")
    return every, pruned


def _measured(
    model: Transformer,
    found: Circuit,
    parts: Sequence[Pairs],
    metric: MetricName,
    counts: Sequence[int],
    draws: int,
    seed: int,
) -> NamedArray:
    """The faithfulness curve of the metric's mean over all prompts."""
    from jaxheads.circuits import faithfulness_curve

    def run(part: Pairs) -> NamedArray:
        made = make_metric(metric, model, part)
        return faithfulness_curve(
            model, found, part.clean, part.corrupted, made, counts, draws=draws, seed=seed
        )

    each, weights = _each(f"running {len(counts) * (draws + 1)} circuits", parts, run)
    # Batches have the same circuits: the metric itself is averaged, then made a share again.
    ends = {
        end: sum(one.info[end] * w for one, w in zip(each, weights, strict=True))
        for end in ("clean", "corrupted")
    }
    values = sum(
        w * (one.info["corrupted"] + one.values * (one.info["clean"] - one.info["corrupted"]))
        for one, w in zip(each, weights, strict=True)
    )
    values = (values - ends["corrupted"]) / (ends["clean"] - ends["corrupted"])
    return replace(each[0], values=values, info={**each[0].info, **ends})


def _each(title: str, parts: Sequence[Pairs], run: Callable[[Pairs], T]) -> tuple[list[T], list]:
    """What each batch gives, with a progress bar, and the batches' shares of all prompts."""
    sizes = [len(part.answer_slot) for part in parts]
    with progress_bar() as progress:
        # Of a single batch nobody knows how far it is: the bar only moves.
        bar = progress.add_task(title, total=len(parts) if len(parts) > 1 else None)
        found = []
        for part in parts:
            found.append(run(part))
            progress.advance(bar)
    return found, [size / sum(sizes) for size in sizes]


def _tell(found: Circuit, curve: NamedArray, facts: dict[str, Any], top: int) -> None:
    from jaxheads.report.circuit_page import KEYS, curve_rows, readable

    say(
        f"{len(found)} edges among {len(found.nodes)} nodes, faithfulness "
        f"{facts['faithfulness']:.4f} ({facts['metric']} {curve.info['clean']:.4f} clean, "
        f"{curve.info['corrupted']:.4f} corrupted)"
    )
    edges = list(found.scores.items())[:top]
    rows = [(readable(sender), readable(receiver), score) for (sender, receiver), score in edges]
    title = f"the {len(rows)} edges of greatest magnitude; {KEYS}"
    print_table(title, ("from", "to", "score"), rows)
    before = ", before pruning" if facts["method"] == "acdc" else ""
    print_table(f"faithfulness of the best edges{before}, and of random ones", *curve_rows(curve))


def _write_json(path: Path, found: Circuit, curve: NamedArray, facts: dict[str, Any]) -> None:
    """What `Circuit.save` writes, with the curve and the settings beside it."""
    edges = [[*edge, score] for edge, score in found.scores.items()]
    measured = {
        "edges": list(curve.labels[1]),
        "circuits": list(curve.labels[0]),
        "faithfulness": curve.values.tolist(),
        **curve.info,
    }
    saved = {"graph": asdict(found.graph), "edges": edges, "curve": measured, "settings": facts}
    write_json(path, saved)
