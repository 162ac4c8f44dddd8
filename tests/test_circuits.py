"""Edges: the graph, circuits as forward passes, edge attribution, circuits and their search."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from tiny import mostly_slow, tiny_model, tiny_tokens

from jaxheads import Batch
from jaxheads.circuits.circuit import Circuit
from jaxheads.circuits.edge_attribution import (
    edge_attribution,
    edge_effects,
    node_scores,
)
from jaxheads.circuits.edge_forward import Runner, masked_metric
from jaxheads.circuits.faithfulness import faithfulness_curve, random_circuit
from jaxheads.circuits.graph import Graph
from jaxheads.circuits.search import acdc, cdt_search, heads_alone, heads_by_cdt
from jaxheads.sweep.agreement import agreement
from jaxheads.sweep.metrics import LogitDifference
from jaxheads.tasks.ioi import ioi
from jaxheads.tasks.pairs import encode_pairs


@pytest.fixture(autouse=True)
def compile_in_haste(request: pytest.FixtureRequest) -> None:
    """All programs but those of the real model take longer to compile than to run."""
    if "slow" not in request.keywords:
        request.getfixturevalue("quickly_compiled")


VARIANTS = {
    "plain": {},
    "parallel": {"parallel": True},
    "rest": {
        "biases": True,
        "branch_scale": True,
        "first_attn_norm": False,
        "qk_norm": "head",
        "attn_softcap": 5.0,
        "norm": "layer",
        "norm_bias": True,
        "causal": False,
        "windows": (0, 5, 0),
    },
}


def batch(seed: int, padded: bool = True) -> Batch:
    tokens = tiny_tokens(rows=2, length=9, seed=seed)
    mask = np.ones(tokens.shape, bool)
    if padded:
        mask[1, :3] = False
    return Batch(tokens, mask)


CLEAN, CORRUPTED = batch(0), batch(1)
METRIC = LogitDifference.of(CLEAN, np.array([1, 2]), np.array([3, 4]))


@functools.cache
def runner(variant: str = "plain") -> Runner:
    return Runner.of(tiny_model(**VARIANTS[variant]), CLEAN, CORRUPTED, METRIC, at_once=8)


@functools.cache
def by_mask(variant: str = "plain"):
    """The gradient of a circuit's metric by its mask, compiled once."""
    run = runner(variant)

    def value(mask):
        return masked_metric(run.model, run.clean, run.corrupted, run.metric, mask).mean()

    return jax.jit(jax.grad(value))


@functools.cache
def planted_pair():
    pairs = planted.planted_pairs()
    return planted.planted_model(), pairs.clean, pairs.corrupted, planted.planted_metric(pairs)


@functools.cache
def planted_scores(steps: int):
    return edge_attribution(*planted_pair(), steps=steps)


@functools.cache
def tiny_scores(steps: int, variant: str = "plain"):
    return edge_attribution(runner(variant).model, CLEAN, CORRUPTED, METRIC, steps=steps)


def value_of(model, prompts) -> float:
    logits = np.asarray(model(prompts, logits_at=METRIC.slots).logits)
    chosen = np.take_along_axis(logits, np.asarray(METRIC.tokens)[:, None], axis=-1)
    return float(METRIC(chosen).mean())


# The graph.


def test_graph_names_and_counts():
    graph = Graph(3, 6, 2)
    assert graph.senders[:8] == ("embed", *(f"a0.{h}" for h in range(6)), "m0")
    assert graph.receivers[6:11] == ("a0.0.k", "a0.1.k", "a0.0.v", "a0.1.v", "m0")
    assert graph.shape == (1 + 3 * 7, 3 * 11 + 1) == (len(graph.senders), len(graph.receivers))
    # Layer l: 10 attention receivers of 1 + 7l senders, an MLP of 7 + 7l; all 22 to the logits.
    assert graph.allowed.sum() == sum(10 * (1 + 7 * i) + 7 + 7 * i for i in range(3)) + 22
    parallel = replace(graph, parallel=True)
    assert parallel.allowed.sum() == sum(11 * (1 + 7 * i) for i in range(3)) + 22


def test_keys_feed_their_group():
    graph = Graph(3, 6, 2)
    fed = {
        name: [graph.senders[u] for u in np.flatnonzero(row)]
        for name, row in zip(graph.receivers, graph.feeds, strict=True)
    }
    assert fed["a1.1.k"] == fed["a1.1.v"] == ["a1.3", "a1.4", "a1.5"]
    assert fed["a2.4.q"] == ["a2.4"] and fed["m1"] == ["m1"] and fed["logits"] == []


def test_connected_keeps_only_paths():
    graph = Graph(3, 6, 2)
    path = [("embed", "a0.1.v"), ("a0.4", "a1.2.q"), ("a1.2", "m1"), ("m1", "logits")]
    dead_end = ("embed", "a2.0.k")
    from_nowhere = ("a1.5", "logits")
    mask = graph.mask([*path, dead_end, from_nowhere])
    assert set(graph.names(np.argwhere(graph.connected(mask)))) == set(path)


# Circuits as forward passes.


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "rest"))
def test_all_edges_are_the_model_and_none_the_corrupted_run(variant):
    run = runner(variant)
    none, every = run.ends()
    assert every == pytest.approx(value_of(run.model, CLEAN), abs=1e-5)
    assert none == pytest.approx(value_of(run.model, CORRUPTED), abs=1e-5)
    assert abs(every - none) > 0.01


def test_edges_of_a_receiver_are_its_input():
    """A query that reads the corrupted embedding alone: an edit of the clean run."""
    run = runner()
    graph, model = Graph.of(run.model.config), run.model
    column = graph.receivers.index("a0.3.q")
    mask = np.ones(graph.shape, np.float32)
    mask[0, column] = 0
    other = model(CORRUPTED, taps="q_pre").taps["q_pre"][0, :, :, 3]

    def swap(value, context):
        return jnp.where(context.layer == 0, value.at[:, :, 3].set(other), value)

    edited = model(CLEAN, edits={"q_pre": jax.tree_util.Partial(swap)}, logits_at=METRIC.slots)
    chosen = np.take_along_axis(np.asarray(edited.logits), METRIC.tokens[:, None], axis=-1)
    assert run([mask])[0] == pytest.approx(float(METRIC(chosen).mean()), abs=1e-5)
    assert abs(run([mask])[0] - run.ends()[1]) > 1e-4


def test_a_sender_without_edges_is_patched():
    """Corrupting all edges of a head is activation patching of what it writes."""
    run = runner()
    graph, model = Graph.of(run.model.config), run.model
    mask = np.ones(graph.shape, np.float32)
    mask[graph.senders.index("a1.4")] = 0
    other = model(CORRUPTED, taps="z").taps["z"][1, :, :, 4]

    def swap(value, context):
        return jnp.where(context.layer == 1, value.at[:, :, 4].set(other), value)

    edited = model(CLEAN, edits={"z": jax.tree_util.Partial(swap)}, logits_at=METRIC.slots)
    chosen = np.take_along_axis(np.asarray(edited.logits), METRIC.tokens[:, None], axis=-1)
    assert run([mask])[0] == pytest.approx(float(METRIC(chosen).mean()), abs=1e-5)


def test_edges_that_cannot_exist_are_not_read():
    run = runner()
    graph = Graph.of(run.model.config)
    half = np.full(graph.shape, 0.5, np.float32)
    wild = np.where(graph.allowed, half, 7).astype(np.float32)
    a, b = run([half, wild])
    assert a == b


# Edge attribution.


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "rest"))
def test_eap_is_the_gradient_by_the_mask(variant):
    run = runner(variant)
    graph = Graph.of(run.model.config)
    found = tiny_scores(1, variant)
    gradient = np.asarray(by_mask(variant)(jnp.ones(graph.shape)))
    assert np.isnan(found.values[~graph.allowed]).all()
    expected = -gradient[graph.allowed]
    np.testing.assert_allclose(
        found.values[graph.allowed], expected, atol=1e-5 * np.abs(expected).max()
    )
    assert found.info["clean"] == pytest.approx(value_of(run.model, CLEAN), abs=1e-5)


@pytest.mark.slow
def test_eap_ig_averages_over_embeddings():
    """Two steps: the mean of EAP at the clean run and at the run halfway between."""
    run = runner()
    model, graph = run.model, Graph.of(run.model.config)
    both, one = tiny_scores(2), tiny_scores(1)
    clean, corrupted = (model(x, taps="embed").taps["embed"] for x in (CLEAN, CORRUPTED))
    # The last edge of the last MLP: its gradient by the logits' stream, written out.
    halfway = (clean + corrupted) / 2

    def value(change):
        taps = model(
            CLEAN,
            edits={"embed": jax.tree_util.Partial(lambda new, x, _: new, halfway)},
            taps="resid_post",
            logits_at=METRIC.slots,
        ).taps
        last = jnp.take_along_axis(taps["resid_post"][-1], METRIC.slots[..., None], axis=1)
        logits = model.logits_of(model.final_norm(last + change, model.config), METRIC.tokens)
        return METRIC(logits).mean()

    gradient = jax.grad(value)(jnp.zeros((2, 1, model.config.d_model)))
    writes = [model(x, taps="mlp_out").taps["mlp_out"][-1] for x in (CLEAN, CORRUPTED)]
    change = np.take_along_axis(np.asarray(writes[1] - writes[0]), METRIC.slots[..., None], axis=1)
    at_half = float((gradient * change).sum())
    edge = graph.senders.index("m2"), graph.receivers.index("logits")
    assert both[edge] == pytest.approx((one[edge] + at_half) / 2, rel=1e-4)
    assert abs(one[edge] - at_half) > 1e-3


def test_eap_finds_the_planted_edges():
    for scores in (planted_scores(1), planted_scores(5)):
        assert {edge for edge, _ in scores.top(5)} == set(planted.EDGES)
        assert all(score < -1 for _, score in scores.top(5))  # without them the metric falls
        (_, fifth), (_, sixth) = scores.top(6)[4:]
        assert abs(sixth) < abs(fifth) / 20
    nodes = {name[0] for name, _ in node_scores(scores).top(3)}
    assert nodes == {"embed", "a0.1", "a1.2"}


def test_exact_edge_effects_are_the_planted_ones():
    graph = Graph.of(planted_pair()[0].config)
    edges = graph.names(np.argwhere(graph.allowed))
    effects = dict(zip(edges, edge_effects(*planted_pair(), edges, at_once=16), strict=True))
    for edge, effect in effects.items():
        assert (effect < -3) if edge in planted.EDGES else (abs(effect) < 0.01)


# Circuits.


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


def test_models_whose_branches_are_not_added_are_refused():
    for place in ("post", "branch", "sandwich"):
        model = tiny_model(norm_place=place)
        with pytest.raises(ValueError, match=f"norm_place.*{place}"):
            edge_attribution(model, CLEAN, CORRUPTED, METRIC)


def test_prompts_that_do_not_fit_are_refused():
    model = tiny_model()
    short = Batch(CLEAN.tokens[:, :-1], CLEAN.mask[:, :-1])
    with pytest.raises(ValueError, match=r"one shape, got tokens of shapes \(2, 9\) and \(2, 8\)"):
        edge_attribution(model, CLEAN, short, METRIC)
    with pytest.raises(ValueError, match="equal length and padding, but row 1"):
        edge_attribution(model, CLEAN, batch(1, padded=False), METRIC)
    with pytest.raises(ValueError, match="no effect to explain"):
        Circuit.of(model, [("embed", "logits")]).faithfulness(model, CLEAN, CLEAN, METRIC)


def test_metrics_that_are_nan_are_refused():
    model = tiny_model()

    def broken(logits):
        return logits[:, 0] * jnp.nan

    with pytest.raises(ValueError, match="broken is nan"):
        edge_attribution(model, CLEAN, CORRUPTED, broken, steps=1)
    with pytest.raises(ValueError, match="broken is nan"):
        edge_effects(model, CLEAN, CORRUPTED, broken, [("embed", "m0")], at_once=1)


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
