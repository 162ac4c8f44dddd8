"""`Route`: gates against their formulas, gradients, and what a choice may depend on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.edits.route import GATES, SCORES, Route, softmax_among, top_k_among
from jaxheads.model import empty_cache
from jaxheads.model.context import Context, Tap
from jaxheads.routing.statistics import head_gates, heads_chosen

CONFIG = tiny_model().config
LOOK = {
    "gates": Tap("attn_out", head_gates),
    "chosen": Tap("attn_out", heads_chosen),
} | dict.fromkeys(("attn_in", "q_pre", "z"))
FORMS = list(itertools.product(GATES, SCORES))
TRAINED = {"router": 0.3, "shared_router": 0.3, "balance": 0.5}
"""Routers that were trained, so to speak: the sizes of random weights."""


def routed(gates="renormalised", scores="linear", shared=(2, 0, 3), top_k=(3, 2, 0), seed=0):
    """Edits with a router that prefers some heads."""
    key = jax.random.key(seed)
    made = jh.mixture_of_heads(CONFIG, key, shared=shared, top_k=top_k, gates=gates, scores=scores)[
        "z"
    ]
    weights = {
        name: size * jax.random.normal(jax.random.fold_in(key, n), getattr(made, name).shape)
        for n, (name, size) in enumerate(TRAINED.items())
        if getattr(made, name) is not None
    }
    return jh.Edits(z=made.replace(**weights))


@jax.jit
def look(batch, edits, model):
    return model(batch, edits=edits, taps=LOOK)


def seen(edits, batch=None, model=None):
    out = look(
        tiny_tokens() if batch is None else batch, edits, tiny_model() if model is None else model
    )
    return jax.tree.map(np.asarray, out.taps)


def context_of(config, x):
    """What a router knows of inputs x [B,T,D]."""
    names = ("positions", "slots", "token_mask", "allowed", "angles")
    unread = dict.fromkeys(names)
    return Context(config, **unread, start=0, phase="prefill", site="z", values={"attn_in": x})


def one_layer(route, layer, x):
    """The routing of inputs x [B,T,D] in one layer."""
    here = jax.tree.map(lambda leaf: leaf[layer], route)
    return here.routing(context_of(CONFIG, jnp.asarray(x)))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x, initial=-np.inf))
    return e / e.sum()


def by_hand(route, layer, x, q):
    """float64 [H], the gates of one token from attn_in [D] and q_pre [H,Dh]; head by head."""
    always = np.flatnonzero(route.shared[layer])
    others = np.flatnonzero(~np.asarray(route.shared[layer]))
    k, x = int(route.top_k[layer]), x.astype(np.float64)
    if route.scores == "linear":
        scores = x @ np.asarray(route.router)[layer][:, others]
    else:
        norms = np.linalg.norm(q.astype(np.float64), axis=-1)[others]
        scores = norms / np.std(norms, ddof=1)
    p = softmax(scores)
    best = np.argsort(-p, kind="stable")[:k]
    gates = np.zeros(len(q))
    if route.gates == "straight_through":
        gates[always], gates[others[best]] = 1, 1
        return gates
    s = softmax(x @ np.asarray(route.shared_router)[layer][:, always])
    a1, a2 = softmax(x @ np.asarray(route.balance)[layer])
    if route.gates == "renormalised":
        a1, a2, s, p = 2 * a1, 2 * a2, len(always) * s, p * (k and k / p[best].sum())
    if not k or not len(always):
        a1, a2 = 1, 1
    gates[always], gates[others[best]] = a1 * s, a2 * p[best]
    return gates


# --- Gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    mostly_slow(
        itertools.product(GATES, ("linear", "query_norm")),
        ("two_stage", "linear"),
        ("renormalised", "linear"),
        ("straight_through", "query_norm"),
    ),
)
def test_gates_are_their_formula(form):
    for shared, top_k in (((2, 0, 3), (3, 2, 0)), (((0, 1), (0, 4), (1, 5)), (1, 4, 6))):
        edits = routed(*form, shared, top_k)
        route, found = edits["z"], seen(edits)
        for layer, row, slot in itertools.product(range(3), range(2), range(14)):
            at = (layer, row, slot)
            expected = by_hand(route, layer, found["attn_in"][at], found["q_pre"][at])
            close(found["gates"][at], expected, 1e-5)
            np.testing.assert_array_equal(found["gates"][at] != 0, expected != 0)


@pytest.mark.parametrize("form", mostly_slow(FORMS, *zip(GATES, SCORES, strict=True), FORMS[2]))
def test_as_many_heads_are_on_as_were_asked_for(form):
    edits = routed(*form)
    found = seen(edits)
    on = np.array([5, 2, 3])[:, None, None] + np.zeros((2, 14), int)
    np.testing.assert_array_equal((found["gates"] != 0).sum(-1), on)
    np.testing.assert_array_equal(found["gates"] != 0, found["chosen"])
    shared = np.asarray(edits["z"].shared)
    assert found["chosen"][np.broadcast_to(shared[:, None, None], found["chosen"].shape)].all()
    # What is tapped is what the output projection reads.
    np.testing.assert_array_equal(np.any(found["z"] != 0, axis=-1), found["chosen"])


def test_new_routers_leave_active_heads_as_they_are():
    """All shared heads and K of n heads: exactly 1."""
    heads = 16
    pairs = [(n, k) for n in range(heads + 1) for k in range(heads - n + 1) if n + k]
    config = CONFIG.replace(n_heads=heads, n_kv_heads=heads)
    context = context_of(config, normal(1, 1, 40))
    route = Route(
        jnp.stack([jnp.arange(heads) < n for n, _ in pairs]),
        jnp.array([k for _, k in pairs]),
        *(jnp.zeros((len(pairs), 40, size)) for size in (heads, heads, 2)),
    )
    gates = np.asarray(jax.vmap(lambda route: route.routing(context).gates[0, 0])(route))
    on = gates != 0
    np.testing.assert_array_equal(on.sum(-1), [n + k for n, k in pairs])
    np.testing.assert_array_equal(gates[on], 1)
    # With the standard deviation 0.02 of a new router, too, shared heads are as they were.
    made = jh.mixture_of_heads(CONFIG, jax.random.key(0), shared=2, top_k=2)
    np.testing.assert_array_equal(seen(made)["gates"][..., :2], 1)


# --- The parts --------------------------------------------------------------------------------


def test_the_highest_are_those_of_lax_top_k():
    rng = np.random.default_rng(0)
    for draw in (rng.normal, lambda size: rng.integers(0, 3, size)):  # the second has many ties
        scores = jnp.asarray(draw(size=(50, 9)), jnp.float32)
        for k in range(10):
            expected = np.zeros((50, 9), bool)
            np.put_along_axis(expected, np.asarray(jax.lax.top_k(scores, k)[1]), True, axis=1)
            np.testing.assert_array_equal(top_k_among(scores, k), expected)
    among = jnp.arange(9) % 2 == 1
    some = np.asarray(top_k_among(scores, 2, among))
    np.testing.assert_array_equal(some[:, 1::2], top_k_among(scores[:, 1::2], 2))
    assert not some[:, ::2].any()
    each = np.asarray(top_k_among(scores, jnp.arange(50) % 10))
    np.testing.assert_array_equal(each.sum(-1), np.arange(50) % 10)


def test_softmax_among_none_is_zero():
    scores = jnp.asarray(normal(4, 5))
    assert not np.asarray(softmax_among(scores, jnp.zeros(5, bool))).any()
    some = softmax_among(scores, jnp.arange(5) < 3)
    close(some[:, :3], jax.nn.softmax(scores[:, :3]))
    close(softmax_among(scores, jnp.arange(5) < 3, 2.5), 2.5 * some)
    assert not np.asarray(some[:, 3:]).any()


def test_the_query_norm_router_reads_queries_before_their_rotation():
    """Rotation keeps norms, so an edit on either side of it tells which are read."""
    plain = routed("straight_through", "query_norm", shared=0, top_k=1)
    scale = np.ones((1, 1, 1, 6, 1), np.float32)
    scale[..., 4, :] = 50.0

    def chosen(site):
        return seen(jh.Edits({site: jh.Affine(scale=jnp.asarray(scale))}) | plain)["chosen"][0]

    before, after, without = chosen("q_pre"), chosen("q"), seen(plain)["chosen"][0]
    assert before[..., 4].all()
    np.testing.assert_array_equal(after, without)
    assert not after[..., 4].all()


def test_queries_of_zero_are_defined_and_have_no_gradient():
    route = routed("straight_through", "query_norm")["z"]

    def total(scale):
        edits = jh.Edits(q_pre=jh.Affine(scale=scale), z=route)
        out = tiny_model()(tiny_tokens(), edits=edits, taps={"gates": LOOK["gates"]})
        return jnp.sum(out.logits[..., 3]), out.taps["gates"]

    slope, gates = jax.jit(jax.grad(total, has_aux=True))(jnp.zeros((3, 1, 1, 1, 1)))
    assert np.isfinite(slope).all()
    # Equal scores: the heads with the lowest indices.
    np.testing.assert_array_equal(gates[0], np.broadcast_to(np.arange(6) < 5, (2, 14, 6)))


# --- Gradients --------------------------------------------------------------------------------


def test_the_straight_through_gradient_is_that_of_the_softmax_score():
    """At every routed head, chosen or not. In the last layer nothing else depends on the router,
    so its gradient is the loss's slope in the gates times the softmax's own.
    """
    edits, model = routed("straight_through", shared=(2, 0, 2), top_k=(3, 2, 1)), tiny_model()
    found, tokens = seen(edits), tiny_tokens()

    def loss(edits):
        return jh.next_token_loss(model, jh.pack(tokens.tolist()), edits=edits)

    slopes = jax.jit(jax.grad(loss, allow_int=True))(edits)["z"].router[2]
    fixed = jh.Edits(z=jh.Affine(scale=jnp.asarray(found["gates"][..., None])))
    of_gates = jax.jit(jax.grad(loss))(fixed)["z"].scale[2, ..., 0]
    # The slope is not zero at heads that are off.
    off = ~found["chosen"][2, :, :-1]
    assert np.abs(of_gates[:, :-1][off]).min() > 0

    def surrogate(weight):
        p = jax.nn.softmax(found["attn_in"][2] @ weight[:, 2:], axis=-1)
        return jnp.sum(of_gates[..., 2:] * p)

    expected = np.asarray(jax.grad(surrogate)(edits["z"].router[2]))
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("gates", mostly_slow(["two_stage", "renormalised"], "renormalised"))
def test_every_weight_of_a_router_has_a_gradient(gates):
    batch = jh.pack(tiny_tokens().tolist())
    edits = routed(gates, shared=(2, 3, 2), top_k=(3, 2, 2))
    loss = jax.jit(lambda edits: jh.next_token_loss(tiny_model(), batch, edits=edits))
    slopes = jax.jit(jax.grad(loss, allow_int=True))(edits)["z"]
    for name in TRAINED:
        slope = np.asarray(getattr(slopes, name))
        assert np.isfinite(slope).all()
        assert (np.abs(slope).max(axis=(1, 2)) > 1e-6).all(), name
    # Along it the loss falls by what the gradient says.
    step = 1e-3 / np.linalg.norm(slopes.balance)
    moved = edits["z"].replace(balance=edits["z"].balance - step * slopes.balance)
    fell = loss(edits) - loss(jh.Edits(z=moved))
    np.testing.assert_allclose(fell, 1e-3 * np.linalg.norm(slopes.balance), rtol=0.05)


# --- What a choice may depend on --------------------------------------------------------------


@pytest.mark.parametrize("scores", mostly_slow(SCORES, "linear", "random"))
def test_a_choice_depends_neither_on_later_tokens_nor_on_the_batch(scores):
    edits = routed("straight_through" if scores == "query_norm" else "renormalised", scores)
    tokens = tiny_tokens(4, 14)
    whole = seen(edits, tokens)
    other = np.where(np.arange(14) < 8, tokens, tiny_tokens(4, 14, 1))
    np.testing.assert_array_equal(seen(edits, other)["gates"][:, :, :8], whole["gates"][:, :, :8])
    other = np.where(np.arange(4)[:, None] < 2, tokens, tiny_tokens(4, 14, 1))
    np.testing.assert_array_equal(seen(edits, other)["gates"][:, :2], whole["gates"][:, :2])
    short = seen(edits, tokens[:3, :9])
    close(short["gates"], whole["gates"][:, :3, :9])
    np.testing.assert_array_equal(short["chosen"], whole["chosen"][:, :3, :9])


def test_a_random_router_is_a_function_of_its_key():
    def chosen(seed):
        return seen(routed("straight_through", "random", 2, 2, seed))["chosen"]

    first = chosen(0)
    np.testing.assert_array_equal(first, chosen(0))
    assert np.mean(np.any(first != chosen(1), axis=-1)) > 0.3
    # Layers draw for themselves, and so do rows and slots.
    for axis in range(3):
        moved = np.roll(first, 1, axis)
        assert np.mean(np.any(first != moved, axis=-1)) > 0.3, axis


def test_random_loads_are_equal():
    route = routed("straight_through", "random", 2, 1)["z"]
    loads = np.asarray(one_layer(route, 0, np.zeros((64, 64, 40), np.float32)).chosen).mean((0, 1))
    np.testing.assert_array_equal(loads[:2], 1)
    # Four standard deviations of 4,096 draws.
    np.testing.assert_allclose(loads[2:], 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 4096))


def test_what_is_drawn_picks_heads_and_does_not_weigh_them():
    new = jh.mixture_of_heads(CONFIG, jax.random.key(0), shared=(2, 0, 3), top_k=3, scores="random")
    found = seen(new)
    np.testing.assert_array_equal(found["gates"], found["chosen"].astype(np.float32))
    # Trained, it weighs shared heads, and all of its routed heads as one.
    for gates in ("renormalised", "two_stage"):
        edits = routed(gates, "random", (2, 0, 3), 3)
        found, always = seen(edits), np.asarray(edits["z"].shared)[:, None, None]
        at_picked = np.where(found["chosen"] & ~always, found["gates"], np.nan)
        np.testing.assert_array_equal(np.nanmin(at_picked, -1), np.nanmax(at_picked, -1))
        assert np.ptp(found["gates"][0][..., :2]) > 0.1 and np.nanstd(at_picked[0]) > 0.01
    layer = one_layer(edits["z"], 0, normal(2, 5, 40))
    close(layer.probabilities[..., 2:], 0.25)
    close(layer.log_z, np.log(4))


@pytest.mark.parametrize("scores", mostly_slow(SCORES, "linear", "random"))
def test_decoding_token_by_token_routes_as_one_pass_does(scores):
    gates = "renormalised" if scores == "linear" else "straight_through"
    edits, tokens, model = routed(gates, scores), tiny_tokens(), tiny_model()
    whole = model(tokens, edits=edits, taps={"gates": LOOK["gates"]})
    step = jax.jit(functools.partial(model, edits=edits, taps={"gates": LOOK["gates"]}))
    cache, found, logits = empty_cache(CONFIG, 2, 16), [], []
    for part in (slice(0, 10), *(slice(t, t + 1) for t in range(10, 14))):
        out = step(tokens[:, part], cache=cache)
        cache = out.cache
        found.append(out.taps["gates"])
        logits.append(out.logits)
    close(np.concatenate(found, axis=2), whole.taps["gates"])
    close(np.concatenate(logits, axis=1), whole.logits)
