"""Edges: the graph, circuits as forward passes, and edge attribution."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from prompt_pairs import (
    CLEAN,
    CORRUPTED,
    METRIC,
    VARIANTS,
    batch,
    planted_pair,
    planted_scores,
    runner,
)
from tiny import mostly_slow, tiny_model

from jaxheads import Batch
from jaxheads.circuits.circuit import Circuit
from jaxheads.circuits.edge_attribution import edge_attribution, edge_effects, node_scores
from jaxheads.circuits.edge_forward import masked_metric
from jaxheads.circuits.graph import Graph


@functools.cache
def by_mask(variant: str = "plain"):
    """The gradient of a circuit's metric by its mask, compiled once."""
    run = runner(variant)

    def value(mask):
        return masked_metric(run.model, run.clean, run.corrupted, run.metric, mask).mean()

    return jax.jit(jax.grad(value))


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
