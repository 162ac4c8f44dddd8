"""Sums over what routers choose, the losses made of them, and their place in a training loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_route import CONFIG, LOOK, routed
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.routing import (
    RoutingPenalty,
    RoutingSums,
    add_sums,
    find_route,
    load,
    overlap,
    routing_taps,
)
from jaxheads.routing.penalty import balance_loss, z_loss
from jaxheads.routing.statistics import as_metrics
from jaxheads.train.losses import language_loss

ROWS = [t[:n] for t, n in zip(tiny_tokens(4, 14).tolist(), (14, 9, 12, 5), strict=True)]
METRICS = {"balance", "router_z", "router_entropy", "least_load", "largest_load"}


@jax.jit
def tapped(batch, edits):
    taps = routing_taps() | LOOK
    return tiny_model()(batch, edits=edits, taps=taps).taps


def sums_of(batch, edits=None) -> RoutingSums:
    return tapped(batch, routed() if edits is None else edits)["routing"]


def sums(probability, chosen, tokens=1.0, shared=0, top_k=1):
    """Sums of one layer, [1,H] and [1]."""
    p = jnp.asarray([probability], jnp.float32)
    one = jnp.ones(1)
    return RoutingSums(
        tokens * one, p, jnp.asarray([chosen], jnp.float32), 0 * one, 0 * one,
        (p.shape[1] - shared) * one, top_k * one,
    )  # fmt: skip


# --- Sums -------------------------------------------------------------------------------------


def test_sums_are_over_real_tokens():
    batch = jh.pack(ROWS, side="left")
    edits = routed()
    taps = jax.tree.map(np.asarray, tapped(batch, edits))
    found, real = taps["routing"], batch.mask
    shared, router = np.asarray(edits["z"].shared), np.asarray(edits["z"].router)
    for layer in range(3):
        others = ~shared[layer]
        scores = taps["attn_in"][layer][real].astype(np.float64) @ router[layer][:, others]
        z = np.exp(scores).sum(-1)
        p = np.exp(scores) / z[:, None]
        assert found.tokens[layer] == real.sum() == 40
        close(found.probability[layer][others], p.sum(0))
        assert not found.probability[layer][~others].any()
        np.testing.assert_array_equal(found.chosen[layer], taps["chosen"][layer][real].sum(0))
        close(found.entropy[layer], -(p * np.log(p)).sum())
        close(found.log_z_squared[layer], (np.log(z) ** 2).sum())
    np.testing.assert_array_equal(found.routed, (~shared).sum(1))
    np.testing.assert_array_equal(found.top_k, edits["z"].top_k)
    np.testing.assert_array_equal(load(found)[shared], 1)


def test_what_stands_in_the_padding_does_not_count():
    batch = jh.pack(ROWS)
    tokens = np.where(batch.mask, batch.tokens, (batch.tokens + 5) % 97)
    first, other = sums_of(batch), sums_of(batch.replace(tokens=tokens))
    jax.tree.map(np.testing.assert_array_equal, first, other)
    for moved in (jh.pack(ROWS, side="left"), jh.pack(ROWS, length=17)):
        jax.tree.map(close, first, sums_of(moved))


def test_parts_add_up_to_the_whole():
    batch = jh.pack(ROWS)
    first, second = (jax.tree.map(lambda x, n=n: x[n::2], batch) for n in range(2))
    jax.tree.map(close, add_sums(sums_of(first), sums_of(second)), sums_of(batch))


def test_layers_without_routed_heads_have_sums_of_zero():
    found = sums_of(jh.pack(ROWS), routed(shared=(6, 2, 0), top_k=(0, 0, 6)))
    for name in ("probability", "entropy", "log_z_squared"):
        assert not np.any(np.asarray(getattr(found, name))[0]), name
    np.testing.assert_array_equal(load(found), [[1] * 6, [1, 1, 0, 0, 0, 0], [1] * 6])
    # The metrics are of layers that choose.
    metrics = as_metrics(found)
    assert metrics["least_load"] == metrics["largest_load"] == 1


def test_the_route_is_found_among_other_edits():
    mask = jh.mask_heads(CONFIG, [(0, 1)])
    route = routed()["z"]
    for edits in (mask | routed(), routed().when("decode") | mask, routed()):
        assert find_route(edits["z"]) is route or find_route(edits["z"]).gates == route.gates
    for edits, count in ((mask, 0), (routed() | routed(), 2)):
        with pytest.raises(ValueError, match=f"one Route among the edits of 'z', found {count}"):
            find_route(edits["z"])
    with pytest.raises(ValueError, match="found 0"):
        tiny_model()(tiny_tokens(), taps=routing_taps())


def test_overlap_is_that_of_neighbours_over_what_both_route():
    """One row of four real tokens and one of padding; head 0 is shared in layer 1 only."""
    chosen = np.zeros((3, 1, 5, 3), bool)
    chosen[0, 0, :, :] = [[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 1, 0], [1, 1, 1]]
    chosen[1, 0, :, :] = [[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    chosen[2, 0, :, :] = [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    shared = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
    mask = np.array([[1, 1, 1, 1, 0]], bool)
    found = overlap(jnp.asarray(chosen), jnp.asarray(shared), jnp.asarray(mask))
    # Heads 1 and 2 of layer 0 are on five times (3 and 2), three times in layer 1 too: tokens 0
    # and 3 with head 1, token 2 with head 2. By chance 3 * 3 / 4 + 2 * 1 / 4 times.
    close(found[0], [3 / 5, (9 / 4 + 2 / 4) / 5])
    assert np.isnan(found[1]).all()


# --- Losses -----------------------------------------------------------------------------------


def test_the_balance_loss_is_k_when_uniform_and_more_when_collapsed():
    for k in (1, 2, 4):
        assert float(balance_loss(sums([0.25] * 4, [k / 4] * 4, top_k=k))) == k
    # Half of the probability and half of the tokens on one of four heads, by hand:
    # 4 * (.5 * .5 + .25 * .25 + .25 * .25 + 0).
    assert float(balance_loss(sums([0.5, 0.25, 0.25, 0], [0.5, 0.25, 0.25, 0]))) == 1.5
    assert float(balance_loss(sums([1, 0, 0, 0], [1, 0, 0, 0]))) == 4
    # Shared heads do not enter: E is 2 of 4.
    collapsed = sums([0, 0, 1, 0], [1, 1, 1, 0], shared=2)
    assert float(balance_loss(collapsed)) == 2
    # Sums of 10 tokens are means of 10; layers that do not choose are left out of the mean.
    many = sums([0, 0, 10, 0], [10, 10, 10, 0], tokens=10.0, shared=2)
    none = sums([0, 0, 5, 5], [10, 10, 0, 0], tokens=10.0, shared=2, top_k=0)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), many, none, many)
    assert float(balance_loss(both)) == 2


def test_the_balance_loss_moves_probability_off_the_head_with_most_load():
    found = sums([0.4, 0.3, 0.3], [0.8, 0.1, 0.1])
    slope = jax.grad(lambda p: balance_loss(found.replace(probability=p)))(found.probability)
    close(slope, [[2.4, 0.3, 0.3]])
    assert not jax.grad(lambda f: balance_loss(found.replace(chosen=f)))(found.chosen).any()


def test_the_z_loss_is_a_mean_of_squares():
    found = sums([1.0], [1.0], tokens=4.0).replace(log_z_squared=jnp.array([6.0]))
    assert float(z_loss(found)) == 1.5


def test_metrics_have_their_names_and_ranges():
    value, metrics = RoutingPenalty(0.01, 0.001)({"routing": sums_of(jh.pack(ROWS))})
    assert set(metrics) == METRICS
    close(value, 0.01 * metrics["balance"] + 0.001 * metrics["router_z"])
    assert 0 <= metrics["least_load"] <= metrics["largest_load"] <= 1
    assert 0 < metrics["router_entropy"] < np.log(6)
    assert metrics["balance"] > 0 and metrics["router_z"] > 0


@pytest.mark.parametrize("options", [{"balance": -1.0}, {"z": float("nan")}, {"z": float("inf")}])
def test_weights_that_are_no_weights_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 0, got"):
        RoutingPenalty(**options)


# --- In the loss of training ------------------------------------------------------------------

PENALTY = RoutingPenalty(0.5, 0.1)


def loss_and_slope(batch, answers=None, edits=None, penalty=PENALTY, **options):
    """Loss, metrics and the gradient in the router."""

    def loss(edits):
        return language_loss(tiny_model(), batch, answers, edits=edits, penalty=penalty, **options)

    edits = routed() if edits is None else edits
    (value, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(edits)
    return float(value), metrics, np.asarray(slope["z"].router)


def answers_batch():
    batch = jh.pack(ROWS)
    targets = np.zeros((4, 14), bool)
    targets[:, 2:5] = True
    return batch.replace(targets=targets)


def test_the_loss_is_the_task_and_the_weighted_penalty():
    batch = answers_batch()
    value, metrics, slope = loss_and_slope(batch)
    plain = jax.jit(jh.next_token_loss)(tiny_model(), batch, edits=routed())
    close(metrics["task_loss"], plain)
    close(value, plain + 0.5 * metrics["balance"] + 0.1 * metrics["router_z"])
    assert set(metrics) == METRICS | {"weight", "token_accuracy", "task_loss"}
    # Statistics are of all real tokens, not only of targets.
    close(metrics["balance"], balance_loss(sums_of(batch)))
    assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-3


@pytest.mark.parametrize(
    "how",
    mostly_slow(
        ["chunk", "answers", "chunked answers", "full remat", "dots remat"], "chunked answers"
    ),
)
def test_ways_of_computing_the_loss_agree(how):
    batch = answers_batch()
    options = {
        "chunk": {"chunk": 4},
        "answers": {"answers": batch.answers()},
        "chunked answers": {"answers": batch.answers(), "chunk": 2, "remat": "full"},
        "full remat": {"remat": "full"},
        "dots remat": {"remat": "dots"},
    }[how]
    value, metrics, slope = loss_and_slope(batch)
    other, others, moved = loss_and_slope(batch, **options)
    close(other, value)
    close(moved, slope)
    assert set(metrics) == set(others)
    for name in metrics:
        close(others[name], metrics[name])


def test_a_batch_of_padding_only_costs_nothing():
    batch = jh.pack(ROWS)
    batch = batch.replace(mask=np.zeros_like(batch.mask))
    value, metrics, slope = loss_and_slope(batch)
    assert value == 0 and not slope.any()
    assert metrics["balance"] == metrics["router_z"] == metrics["router_entropy"] == 0
    assert all(np.isfinite(metric) for metric in metrics.values())
