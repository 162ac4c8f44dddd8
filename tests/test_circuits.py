"""Circuits: their edges and files, how faithful they are, and their search."""

import json

import numpy as np
import planted
import pytest
from prompt_pairs import (
    CLEAN,
    CORRUPTED,
    METRIC,
    planted_pair,
    planted_scores,
    runner,
)
from tiny import tiny_model

from jaxheads.circuits.circuit import Circuit
from jaxheads.circuits.edge_attribution import edge_attribution, edge_effects
from jaxheads.circuits.edge_forward import Runner
from jaxheads.circuits.faithfulness import faithfulness_curve, random_circuit
from jaxheads.circuits.graph import Graph
from jaxheads.circuits.search import acdc, cdt_search, heads_alone, heads_by_cdt
from jaxheads.sweep.agreement import agreement
from jaxheads.sweep.metrics import LogitDifference
from jaxheads.tasks.ioi import ioi
from jaxheads.tasks.pairs import encode_pairs


def scored() -> Circuit:
    return Circuit.of_scores(planted_pair()[0], planted_scores(1))


def test_circuit_of_scores_keeps_the_best():
    best = scored().keep(5)
    assert set(best.edges) == set(planted.EDGES)
    assert best.nodes == ("embed", "a0.1", "a1.2")
    assert set(best.connected().edges) == set(planted.EDGES)
    broken = Circuit(best.graph, {e: s for e, s in best.scores.items() if e[1] != "a0.0.v"})
    assert ("a0.1", "a1.1.k") not in broken.connected().scores


def test_circuit_files(tmp_path):
    circuit = scored().keep(7)
    circuit.save(tmp_path / "circuit.json")
    read = Circuit.load(tmp_path / "circuit.json")
    assert read == circuit and read.edges == circuit.edges
    (tmp_path / "other.json").write_text(json.dumps({"edges": []}))
    with pytest.raises(ValueError, match=r"other.json holds no circuit"):
        Circuit.load(tmp_path / "other.json")


def test_faithfulness_of_the_planted_circuit():
    """What carries positions is alike in both runs, so it need not be in the circuit."""
    model, clean, corrupted, metric = planted_pair()
    circuit = Circuit.of(model, planted.EDGES)
    assert circuit.faithfulness(model, clean, corrupted, metric) == pytest.approx(1, abs=0.02)
    for edge in planted.EDGES:
        less = Circuit.of(model, set(planted.EDGES) - {edge})
        assert less.faithfulness(model, clean, corrupted, metric) < 0.1


def test_faithfulness_curve_beats_random_circuits():
    model, clean, corrupted, metric = planted_pair()
    every = len(scored())
    curve = faithfulness_curve(
        model, scored(), clean, corrupted, metric, [1, 5, 20, every], at_once=8
    )
    found, random = curve.sel(circuit="found").values, curve.values[1:]
    assert random.shape == (5, 4) and np.abs(random[:, :3]).max() < 0.5
    assert found[0] == pytest.approx(0, abs=0.01)  # one edge is no path
    assert found[1] == pytest.approx(1, abs=0.02) and found[-1] == pytest.approx(1, abs=1e-5)
    assert curve.info["remaining"][:2] == [0, 5]


def test_random_circuits_are_paths():
    graph, rng = Graph(3, 6, 2), np.random.default_rng(0)
    for count in (0, 1, 30, 140, int(graph.allowed.sum())):
        mask = random_circuit(graph, count, rng)
        assert mask.sum() == count and not mask[~graph.allowed].any()
    mask = random_circuit(graph, 30, rng)
    assert mask.sum() - graph.connected(mask).sum() <= 6  # only the last path may be cut


# Searches.


@pytest.mark.parametrize("measured", [None, "planted"])
def test_acdc_finds_the_planted_edges(measured):
    model, clean, corrupted, metric = planted_pair()
    metric = None if measured is None else metric
    found = acdc(model, clean, corrupted, 0.1, metric=metric, at_once=8)
    assert set(found.edges) == set(planted.EDGES)


def sequential(run: Runner, tau: float) -> set:
    """Algorithm 1, one edge at a time."""
    graph = Graph.of(run.model.config)
    mask = graph.allowed.astype(np.float32)
    goal = run([mask])[0]
    distance = 0.0
    for v in range(graph.shape[1])[::-1]:
        for u in np.flatnonzero(graph.allowed[:, v])[::-1]:
            mask[u, v] = 0
            found = abs(run([mask])[0] - goal)
            if found - distance < tau:
                distance = found
            else:
                mask[u, v] = 1
    return set(graph.names(np.argwhere(mask)))


def test_acdc_is_the_sequential_algorithm():
    """On a random model, where edges by the dozen matter and interact."""
    run = runner()
    tau = 0.05
    found = acdc(run.model, CLEAN, CORRUPTED, tau, metric=METRIC, at_once=8)
    assert set(found.edges) == sequential(run, tau)
    assert 5 < len(found) < Graph.of(run.model.config).allowed.sum() / 2
    assert all(score >= tau for score in found.scores.values())
    again = acdc(run.model, CLEAN, CORRUPTED, tau, metric=METRIC, start=found, at_once=8)
    assert set(again.edges) <= set(found.edges)


def test_cdt_search_picks_level_by_level():
    planned = {(): {(2, 1): 5.0, (2, 0): 4.0, (0, 0): 1.0}}
    planned[(2, 1), (2, 0)] = {(1, 1): 0.2, (0, 0): 0.3, (1, 0): 0.1, (2, 1): 9.0}
    planned[(0, 0), (1, 1)] = planned[(1, 1), (0, 0)] = {(0, 1): 0.4}
    asked = []

    def relevance(targets):
        asked.append(targets)
        found = np.zeros((3, 2))
        for head, value in planned[targets].items():
            found[head] = value
        return found

    def measure(sets):  # (2, 0) is harmful, (0, 0) useless
        worth = {(2, 1): 1.0, (2, 0): -0.5, (1, 1): 0.7, (0, 0): 0.0, (0, 1): 0.2}
        return np.array([sum(worth[head] for head in heads) for heads in sets])

    found = cdt_search(relevance, measure)
    # Layer 0 has one relevant head, so that in its layer it stands out: 0.3 / 0.15.
    assert found.levels == (((2, 1), (2, 0)), ((0, 0), (1, 1)), ((0, 1),))
    assert asked[-1] == ((0, 0), (1, 1))
    assert found.removed == ((2, 0),)
    assert found.heads == ((2, 1), (0, 0), (1, 1), (0, 1)) and found.value == pytest.approx(1.9)


def test_cdt_search_with_contextual_decomposition_finds_the_planted_heads():
    model, pairs = planted.planted_model(), planted.planted_pairs()
    metric = planted.planted_metric(pairs)
    z = model(pairs.corrupted, taps="z").taps["z"]
    relevance = heads_by_cdt(model, pairs.clean, pairs.answers[:, 0], pairs.wrong[:, 0], {"z": z})
    assert relevance(()).shape == (model.config.n_layers, model.config.n_heads)
    measure = heads_alone(model, pairs.clean, pairs.corrupted, metric)
    found = cdt_search(relevance, measure, per_level=1)
    assert found.levels == ((planted.INDUCTION,), (planted.PREVIOUS,))
    assert set(found.heads) == {planted.INDUCTION, planted.PREVIOUS}


def test_cdt_search_on_the_planted_model():
    model, clean, corrupted, metric = planted_pair()
    scores = planted_scores(1)
    graph = Graph.of(model.config)

    def relevance(targets):
        """First-order effects on what the targets read."""
        fed = [graph.senders.index(f"a{layer}.{head}") for layer, head in targets]
        columns = graph.feeds[:, fed].any(axis=1) if fed else np.arange(graph.shape[1]) == 18
        values = np.abs(np.nan_to_num(scores.values[:, columns])).sum(axis=1)[1:]
        return values.reshape(2, 5)[:, :4]

    measure = heads_alone(model, clean, corrupted, metric)
    found = cdt_search(relevance, measure, per_level=1)
    assert found.levels == ((planted.INDUCTION,), (planted.PREVIOUS,))
    assert found.heads == (planted.INDUCTION, planted.PREVIOUS) and not found.removed
    alone = measure([found.heads, [planted.INDUCTION], [planted.PREVIOUS]])
    assert alone[0] > 3.7 and np.abs(alone[1:]).max() < 0.4


# Bad input.


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        (("embed", "a9.0.q"), "unknown receiver 'a9.0.q'.*Known: a0.0.q"),
        (("a0.17", "logits"), "unknown sender 'a0.17'"),
        (("a2.0", "a1.0.q"), "a1.0.q reads before a2.0 is computed"),
        ("embed", "an edge is"),
    ],
)
def test_edges_that_do_not_exist_are_refused(edge, message):
    with pytest.raises(ValueError, match=message):
        Circuit.of(tiny_model(), [("embed", "logits"), edge])


def test_circuits_that_cannot_be_run_are_refused():
    model = tiny_model()
    pair = (model, CLEAN, CORRUPTED, METRIC)
    empty = Circuit.of(model, [])
    with pytest.raises(ValueError, match="no edges"):
        empty.faithfulness(*pair)
    with pytest.raises(ValueError, match="no edges"):
        edge_effects(*pair, [])
    with pytest.raises(ValueError, match="n_layers=2"):
        scored().faithfulness(*pair)
    with pytest.raises(ValueError, match="given twice"):
        Circuit.of(model, [("embed", "m0"), ("embed", "m0")])
    with pytest.raises(ValueError, match="not a finite number"):
        Circuit.of(model, {("embed", "m0"): np.nan})
    for count in (0, 2, True, 1.0):
        with pytest.raises(ValueError, match="from 1 to 1"):
            Circuit.of(model, [("embed", "logits")]).keep(count)


def test_searches_refuse_bad_arguments():
    pair = (tiny_model(), CLEAN, CORRUPTED)
    for tau in (0, -1, np.nan):
        with pytest.raises(ValueError, match="tau"):
            acdc(*pair, tau)
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="steps"):
            edge_attribution(*pair, METRIC, steps=steps)
    with pytest.raises(ValueError, match=r"\[L,H\]"):
        cdt_search(lambda targets: np.ones(3), lambda sets: np.ones(len(sets)))
    with pytest.raises(ValueError, match="per_level"):
        cdt_search(lambda targets: np.ones((1, 1)), lambda sets: np.ones(1), per_level=0)
    with pytest.raises(ValueError, match="draws"):
        circuit = Circuit.of(pair[0], [("embed", "logits")])
        faithfulness_curve(pair[0], circuit, CLEAN, CORRUPTED, METRIC, [1], draws=0)


# The real model.


@pytest.mark.slow
def test_ioi_edges_of_smollm2(smollm2):
    """EAP-IG ranks edges as exact corruption does, and its circuits beat random ones."""
    model, tokenizer = smollm2
    pairs = encode_pairs(ioi(8, seed=0, template="went"), tokenizer)
    metric = LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)
    pair = (model, pairs.clean, pairs.corrupted, metric)
    scores = edge_attribution(*pair, steps=5)
    best = scores.top(30)
    exact = edge_effects(*pair, [edge for edge, _ in best], at_once=1)
    assert agreement(np.array([score for _, score in best]), exact).spearman > 0.9
    curve = faithfulness_curve(model, Circuit.of_scores(model, scores), *pair[1:], [500], at_once=1)
    assert curve[0, 0] > 0.4
    assert np.abs(curve[1:]).max() < 0.1
