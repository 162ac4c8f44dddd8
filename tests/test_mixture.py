"""`mixture_of_heads`: what it makes and refuses, and a `Route` among other edits."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_route import CONFIG, normal, one_layer, routed, seen
from tiny import close, mostly_slow, tiny_model, tiny_tokens

import jaxheads as jh
from jaxheads.edits.mixture import heads_on
from jaxheads.edits.route import GATES, Route
from jaxheads.model.encoder_decoder import EncoderDecoderConfig

KEY = jax.random.key(0)


def made(config=CONFIG, key=KEY, **options) -> Route:
    return jh.mixture_of_heads(config, key, **options)["z"]


def gates_of(edits, batch=None):
    return seen(edits, batch)["gates"]


# --- The constructor --------------------------------------------------------------------------


def test_shared_heads_are_a_number_a_list_or_pairs():
    for shared, expected in (
        (2, [[0, 1]] * 3),
        ([0, 1, 3], [[], [0], [0, 1, 2]]),
        ([(0, 5), (2, 1), (2, 4)], [[5], [], [1, 4]]),
        ([], [[]] * 3),
    ):
        route = made(shared=shared, top_k=2)
        assert [np.flatnonzero(row).tolist() for row in route.shared] == expected
        assert route.shared.dtype == bool
        np.testing.assert_array_equal(route.top_k, [2, 2, 2])
    np.testing.assert_array_equal(made(shared=2, top_k=np.array([0, 4, 1])).top_k, [0, 4, 1])


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 1 / 3])
@pytest.mark.parametrize("shared", [0, 1, [(0, 3), (1, 1), (1, 2)]])
def test_a_share_is_met_on_average(share, shared):
    config = CONFIG.replace(n_layers=8)
    route = made(config, shared=shared, share=share)
    on = np.asarray(route.shared).sum(1) + np.asarray(route.top_k)
    assert on.max() - on.min() <= 1
    assert abs(on.sum() - share * 48) <= 0.5


def test_heads_on_spreads_what_the_whole_layers_leave():
    np.testing.assert_array_equal(heads_on(4, 8, 0.75, 1), [8, 5, 6, 5])
    np.testing.assert_array_equal(heads_on(4, 8, 0.5), [4, 4, 4, 4])
    np.testing.assert_array_equal(heads_on(2, 8, 1.0, 2), [8, 8])
    for layers, heads, share, whole in ((6, 8, 0.5, 1), (5, 7, 0.81, 2), (12, 12, 0.33, 0)):
        counts = heads_on(layers, heads, share, whole)
        assert (counts[:whole] == heads).all() and np.ptp(counts[whole:]) <= 1
        assert counts.sum() == int(share * heads * layers + 0.5)


def test_which_weights_there_are_follows_from_the_form():
    for gates, scores, names in (
        ("renormalised", "linear", {"router", "shared_router", "balance"}),
        ("two_stage", "random", {"keys", "shared_router", "balance"}),
        ("straight_through", "query_norm", set()),
        ("straight_through", "linear", {"router"}),
    ):
        route = made(shared=2, top_k=2, gates=gates, scores=scores)
        every = ("router", "keys", "shared_router", "balance")
        assert {name for name in every if getattr(route, name) is not None} == names
    weights = made(shared=2, top_k=2)
    assert weights.router.shape == weights.shared_router.shape == (3, 40, 6)
    assert not weights.shared_router.any() and not weights.balance.any()
    assert 0.018 < float(weights.router.std()) < 0.022
    assert not np.array_equal(weights.router[0], weights.router[1])


BAD = {
    "k": ({"shared": 2, "top_k": 5}, "layer 0: top_k is 5, expected 0 to its 4 routed heads"),
    "k of a layer": (
        {"shared": [1, 2, 4], "top_k": [5, 4, 3]},
        "layer 2: top_k is 3, expected 0 to its 2",
    ),
    "negative k": ({"shared": 2, "top_k": -1}, "layer 0: top_k is -1"),
    "none on": ({"shared": [1, 0, 1], "top_k": 0}, "layer 1: no shared head and top_k = 0"),
    "many shared": ({"shared": 7, "top_k": 0}, "layer 0: 7 shared heads, expected 0 to the 6"),
    "negative": ({"shared": [1, -2, 1], "top_k": 1}, "layer 1: -2 shared heads"),
    "length": ({"shared": [1, 2], "top_k": 1}, "shared has 2 numbers, expected one for 3 layers"),
    "length of k": ({"shared": 1, "top_k": [1, 2]}, "top_k has shape (2,)"),
    "fractions": (
        {"shared": 1, "top_k": [1.0, 2.5, 1.0]},
        "of float64, expected one integer for each",
    ),
    "a fraction": ({"shared": 1, "top_k": 1.5}, "expected one integer for each of the 3 layers"),
    "shared share": (
        {"shared": 0.5, "top_k": 1},
        "shared must be integers or (layer, head) pairs, got 0.5",
    ),
    "pairs": ({"shared": [(0, 6)], "top_k": 1}, "head 0.6 is out of range"),
    "share": ({"shared": 1, "share": 1.2}, "share must lie in (0, 1], got 1.2"),
    "nan": ({"shared": 1, "share": float("nan")}, "share must lie in (0, 1], got nan"),
    "low share": (
        {"shared": 4, "share": 0.5},
        "layer 0: 4 shared heads are more than share=0.5 leaves on, 3 of 6",
    ),
    "little share": (
        {"shared": 0, "share": 0.1},
        "share 0.1 of 3 layers of 6 heads, of which 0 keep all, leaves 1.8 heads for the 3 others",
    ),
    "both": (
        {"shared": 1, "share": 0.5, "top_k": 2},
        "give one of top_k and share, got top_k=2 and share=0.5",
    ),
    "neither": ({"shared": 1}, "give one of top_k and share, got top_k=None and share=None"),
    "key": ({"shared": 1, "top_k": 2, "key": None}, "scores='linear' need a random key, got None"),
    "no draws": (
        {"shared": 1, "top_k": 2, "key": None, "scores": "random"},
        "scores='random' need a random key",
    ),
    "gates": (
        {"shared": 1, "top_k": 2, "gates": "renormalized"},
        "unknown gates 'renormalized'. Did you mean 'renormalised'",
    ),
    "scores": ({"shared": 1, "top_k": 2, "scores": "norm"}, "unknown scores 'norm'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_the_constructor_refuses(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        made(**options)


OTHER = {
    "width": (CONFIG.replace(d_model=32), "router has shape (32, 6) per layer, expected (40, 6)"),
    "heads": (CONFIG.replace(n_heads=8), "shared has shape (8,) per layer, expected (6,)"),
    "layers": (CONFIG.replace(n_layers=4), "expected a leading layer axis of 3 (or 1)"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_router_of_another_model_is_refused(name, tmp_path):
    config, message = OTHER[name]
    jh.mixture_of_heads(config, KEY, shared=1, top_k=2).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model()(tiny_tokens(), edits=jh.Edits.load(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("site", ["resid_post", "pattern", "v", "q_pre", "embed"])
def test_a_site_whose_heads_are_not_outputs_is_refused(site):
    # As many tokens as heads: a pattern [B,H,T,S] then has the shape of z.
    with pytest.raises(ValueError, match=f"unknown site of a Route '{site}'.*Known: z, cross.z"):
        tiny_model()(tiny_tokens(2, 6), edits=jh.Edits({site: routed()["z"]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": None}, "router is missing: scores='linear' and gates='renormalised' need it"),
        ({"balance": None}, "balance is missing"),
        ({"scores": "random"}, "keys is missing: scores='random'"),
        ({"gates": "soft"}, "unknown gates 'soft'"),
        ({"scores": "hash"}, "unknown scores 'hash'"),
    ],
)
def test_an_incomplete_route_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model()(tiny_tokens(), edits=jh.Edits(z=routed()["z"].replace(**change)))


# --- With all heads on, as users compile it ---------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", mostly_slow(["mha", "mqa", "gqa"], "gqa"))
def test_with_all_heads_on_the_model_is_the_plain_one_bit_for_bit(kind, side):
    model = tiny_model(kind)
    rows = [t[:n] for t, n in zip(tiny_tokens(40, 14).tolist(), 10 * [14, 9, 12, 3], strict=True)]
    batch, shared = jh.pack(rows, side=side), [2, 0, 6]
    edits = jh.mixture_of_heads(
        CONFIG, shared=shared, top_k=[4, 6, 0], gates="straight_through", scores="query_norm"
    )
    run = jax.jit(type(model).__call__)
    np.testing.assert_array_equal(run(model, batch, edits=edits).logits, run(model, batch).logits)


@pytest.mark.slow
def test_smollm2_with_all_heads_on_is_bit_equal(smollm2):
    model, tokenizer = smollm2
    batch = tokenizer("Every head of this model stays on, at every token of this text.")
    edits = jh.mixture_of_heads(
        model.config, shared=4, top_k=5, gates="straight_through", scores="query_norm"
    )
    np.testing.assert_array_equal(model(batch, edits=edits).logits, model(batch).logits)


# --- With other edits -------------------------------------------------------------------------


def test_masks_and_offsets_compose_with_a_route():
    edits = routed()
    plain = seen(edits)
    masked = seen(edits | jh.mask_heads(CONFIG, [(2, 1)]))
    assert np.any(plain["z"][2, ..., 1, :] != 0) and not masked["z"][2, ..., 1, :].any()
    np.testing.assert_array_equal(masked["gates"], plain["gates"])
    before = seen(jh.mask_heads(CONFIG, [(2, 1)]) | edits)
    np.testing.assert_array_equal(before["z"], masked["z"])
    # An offset after the gates reaches heads that are off; one before them is gated.
    offset = normal(3, 6, 8, seed=1)
    after = seen(edits | jh.offset_heads(CONFIG, offset))
    close(after["z"][0] - plain["z"][0], np.broadcast_to(offset[0], after["z"][0].shape))
    before = seen(jh.offset_heads(CONFIG, offset) | edits)
    close(before["z"][0] - plain["z"][0], plain["gates"][0][..., None] * offset[0])


def test_a_route_acts_where_and_when_it_is_told_to():
    tokens, edits, model = tiny_tokens(), routed(), tiny_model()
    where = np.zeros((2, 14), bool)
    where[0, 5:9], where[1, 2] = True, True
    plain = np.asarray(model(tokens, taps="z").taps["z"])
    found = seen(edits.when(where))
    expected = np.where(where[..., None], found["gates"][0], 1.0)
    close(found["z"][0], plain[0] * expected[..., None])
    np.testing.assert_array_equal(found["z"][:, 0, :5], plain[:, 0, :5])
    prompt = tokens[:1, :12]

    def text(edits):
        return jh.generate(model, prompt, edits=edits, max_new_tokens=6).rows()[0]

    on, off, first = text(edits), text(None), text(edits.when("prefill"))
    assert text(edits.when("decode"))[0] == off[0] and first[0] == on[0] != off[0]
    assert first != on


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_equals_whole_passes(side):
    edits, model = routed(), tiny_model()
    rows = [tiny_tokens(1, 12)[0].tolist(), tiny_tokens(1, 7, 1)[0].tolist()]
    found = jh.generate(model, jh.pack(rows, side=side), edits=edits, max_new_tokens=5).rows()
    run = jax.jit(lambda batch: model(batch, edits=edits).logits)
    for row, new in zip(rows, found, strict=True):
        for token in new:
            logits = run(jh.pack([row], length=20))[0, len(row) - 1]
            assert token == int(np.argmax(logits))
            row.append(token)


def test_a_stack_of_routes_is_vmapped():
    many = [
        routed(shared=shared, top_k=top_k, seed=n)
        for n, (shared, top_k) in enumerate([(2, 3), ([(1, 5)], [4, 2, 1]), (6, 0)])
    ]
    run = lambda edits: tiny_model()(tiny_tokens(), edits=edits).logits  # noqa: E731
    close(jax.jit(jax.vmap(run))(jh.Edits.stack(many)), [run(edits) for edits in many])


def test_one_program_serves_all_routers_and_counts():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(edits):
        return tiny_model()(tiny_tokens(), edits=edits).logits

    found = [
        run(routed(shared=shared, top_k=top_k, seed=seed))
        for shared, top_k, seed in ((2, 3, 0), (2, 3, 1), (1, 3, 0), (2, [0, 1, 4], 0))
    ]
    assert len({np.asarray(logits).tobytes() for logits in found}) == 4


@pytest.mark.parametrize("scores", ["linear", "random"])
def test_saved_and_read_it_is_the_same(scores, tmp_path):
    edits = routed("two_stage", scores).when("prefill")
    edits.save(tmp_path / "route.safetensors")
    read = jh.Edits.load(tmp_path / "route.safetensors")
    chex.assert_trees_all_equal(read, edits)
    chex.assert_trees_all_equal_dtypes(read, edits)
    assert jax.tree.structure(read) == jax.tree.structure(edits)
    route = read["z"].edit
    assert (route.gates, route.scores) == ("two_stage", scores)


def test_it_is_printed_readably():
    assert repr(jh.Edits(z=made(shared=2, top_k=3))) == (
        "Edits(\n  z: Route(shared=bool[3,6], top_k=int32[3], router=float32[3,40,6], "
        "shared_router=float32[3,40,6], balance=float32[3,40,2], gates='renormalised', "
        "scores='linear')\n)"
    )


def test_folding_refuses_it_by_name():
    message = "edit at 'z' (Route) cannot be folded: Route is not a fixed affine map of the value"
    assert jh.unfoldable(routed(), CONFIG) == {"z": message}
    with pytest.raises(ValueError, match=re.escape(message)):
        jh.fold(tiny_model(), routed())


def test_in_half_precision_routers_do_not_round():
    model, edits = tiny_model().astype("bfloat16"), routed(shared=2, top_k=3)
    found = seen(edits, model=model)
    assert found["gates"].dtype == np.float32 and found["z"].dtype == jnp.bfloat16
    np.testing.assert_array_equal((found["gates"] != 0).sum(-1), 5)
    np.testing.assert_array_equal(np.any(found["z"] != 0, axis=-1), found["gates"] != 0)
    x = jnp.asarray(normal(2, 5, 40), jnp.bfloat16)
    close(one_layer(edits["z"], 1, x).gates, one_layer(edits["z"], 1, x.astype("float32")).gates, 0)


def test_attention_to_an_encoder_is_routed_by_its_own_input():
    config = EncoderDecoderConfig(
        encoder=CONFIG.replace(causal=False), decoder=CONFIG.replace(cross=True)
    )
    model = jh.EncoderDecoder.random(config, KEY)
    taps = ("cross.attn_in", "cross.q", "cross.z", "encoder.z")
    run = jax.jit(lambda edits: model(tiny_tokens(), tiny_tokens()[:, :5], edits=edits, taps=taps))
    for scores in ("linear", "query_norm"):
        route = routed("straight_through", scores, shared=0, top_k=2)
        found = run(route.under("cross") | route.under("encoder")).taps
        for name in ("cross.z", "encoder.z"):
            np.testing.assert_array_equal(np.any(found[name] != 0, -1).sum(-1), 2)
        on = np.any(np.asarray(found["cross.z"]) != 0, axis=-1)
        if scores == "linear":
            ranked = np.einsum("lbtd,lde->lbte", found["cross.attn_in"], route["z"].router)
        else:
            ranked = np.linalg.norm(found["cross.q"], axis=-1)
        worst_on = np.where(on, ranked, np.inf).min(-1)
        assert (worst_on >= np.where(on, -np.inf, ranked).max(-1)).all()


# --- Padding and NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("gates", mostly_slow(GATES, "renormalised"))
def test_scores_of_nan_spoil_their_own_token_only(gates):
    """In their layer. Attention then hands NaN on to the row, whatever the weight of the key."""
    edits = routed(gates, shared=(2, 0, 3), top_k=(3, 2, 1))
    poison = np.zeros((1, 2, 14, 40), np.float32)
    poison[0, 1, 6] = np.nan
    first = np.arange(3).reshape(3, 1, 1, 1) == 0
    poisoned = jh.Edits(attn_in=jh.Affine(offset=jnp.where(first, poison, 0.0))) | edits
    plain, found = gates_of(edits), gates_of(poisoned)
    routed_here = ~np.asarray(edits["z"].shared[0])
    assert np.isnan(found[0, 1, 6][routed_here]).all()
    clean = np.ones((2, 14), bool)
    clean[1, 6] = False
    np.testing.assert_array_equal(found[0][clean], plain[0][clean])
    np.testing.assert_array_equal(found[:, 0], plain[:, 0])


def test_rows_of_padding_only_are_finite_and_change_no_other():
    for edits in (routed(), routed("straight_through", "query_norm")):
        batch = jh.pack(tiny_tokens(3).tolist())
        batch.mask[1] = False
        found, whole = seen(edits, batch), seen(edits, jh.pack(tiny_tokens(3).tolist()))
        assert np.isfinite(found["z"]).all()
        np.testing.assert_array_equal(found["gates"][:, ::2], whole["gates"][:, ::2])
