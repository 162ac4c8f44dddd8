"""The edits of experts: who has which token, and what a token's output depends on."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, mostly_slow, tiny_model, tiny_tokens
from tiny_experts import CHOOSING, model_of, union, with_gating

import jaxheads as jh
from jaxheads.edits import Edits
from jaxheads.edits.experts import OwnTokens, best_tokens
from jaxheads.methods.union_of_experts import Selection
from jaxheads.model.context import Tap
from jaxheads.train.rules import RULES, paths

STEP = 3e-4
"""Of a router's weights, for a difference that approximates a derivative."""


@jax.jit(static_argnames="sites")
def run(model, tokens, edits=None, mask=None, sites=()):
    return model(tokens, mask, edits=edits, taps=sites)


def logits(model, tokens, edits=None, mask=None) -> np.ndarray:
    return np.asarray(run(model, tokens, edits, mask).logits)


def decided(model, tokens, edits, mask=None):
    """The routing of both branches, leaves [L,B,T,...]."""
    return jax.jit(lambda: model(tokens, mask, edits=edits, taps=routing_taps()).taps)()


def routing_taps() -> dict[str, Tap]:
    return {
        "z": Tap("attn_out", lambda _, context: context.edits["z"].routing(context)),
        "neurons": Tap("mlp_out", lambda _, context: context.edits["neurons"].routing(context)),
    }


# All experts, and a router that has no preference.


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [("mha", 3, True), ("gqa", 2, True), ("gqa", 6, True), ("mqa", 3, True), ("mha", 6, False)],
        ("mha", 6, False),
    ),
)
def test_all_experts_are_the_whole_layer_exactly(case):
    kind, experts, causal = case
    model, tokens = model_of(kind, causal=causal), tiny_tokens(2, 6)
    every = [Selection(experts, top_k=experts)]
    every += [] if causal else [Selection(experts, capacity=1.0)]
    # Operation by operation, or else the compiler may round the two programs differently; with
    # scores tapped, so that attention runs the same way with and without edits of them.
    with jax.disable_jit():
        plain = model(tokens, taps=("scores", "z", "neurons"))
        for selection in every:
            edits = union(model, selection, selection, size=0)
            whole = model(tokens, edits=edits, taps=("scores", "z", "neurons"))
            chex.assert_trees_all_equal(whole.logits, plain.logits)
            chex.assert_trees_all_equal(dict(whole.taps), dict(plain.taps))


def test_half_of_the_experts_are_not_the_layer():
    model, tokens = model_of(), tiny_tokens()
    plain = logits(model, tokens)
    for branch in ({"mlp": None}, {"attention": None}):
        assert np.abs(logits(model, tokens, union(model, **branch)) - plain).max() > 0.01


# What a token's output depends on.


@pytest.mark.parametrize("choosing", [False, True])
def test_a_row_knows_nothing_of_its_batch_mates(choosing):
    model = model_of(causal=not choosing)
    chosen = dict.fromkeys(("attention", "mlp"), CHOOSING) if choosing else {}
    edits, tokens = union(model, **chosen), tiny_tokens(4)
    out = logits(model, tokens, edits)
    order = np.array([2, 0, 3, 1])
    close(logits(model, tokens[order], edits), out[order])
    others = np.concatenate([tokens[:1], tiny_tokens(3, seed=9)])
    close(logits(model, others, edits)[0], out[0])
    assert np.abs(logits(model, others, edits)[1:] - out[1:]).max() > 0.1


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_no_token_knows_those_after_it(kind):
    model, tokens = model_of(kind), tiny_tokens()
    edits = union(model)
    out = run(model, tokens, edits, sites=("z", "neurons"))
    for slot in (3, 9):
        changed = tokens.copy()
        changed[:, slot] = (changed[:, slot] + 31) % 97
        other = run(model, changed, edits, sites=("z", "neurons"))
        close(other.logits[:, :slot], out.logits[:, :slot])
        for site in ("z", "neurons"):
            close(other.taps[site][:, :, :slot], out.taps[site][:, :, :slot])
        assert np.abs(other.logits[:, slot:] - out.logits[:, slot:]).max() > 0.01


@pytest.mark.parametrize("choosing", [False, True])
def test_padding_changes_nothing_and_is_never_chosen(choosing):
    model, length = model_of("gqa", causal=not choosing), 9
    chosen = dict.fromkeys(("attention", "mlp"), CHOOSING) if choosing else {}
    edits, tokens = union(model, **chosen), tiny_tokens(2, length)
    out = logits(model, tokens, edits)
    for before in (0, 3, 5):
        spread = ((0, 0), (before, 5 - before))
        padded = np.pad(tokens, spread, constant_values=13)
        mask = np.pad(np.ones_like(tokens, bool), spread)
        found = logits(model, padded, edits, mask)[:, before : before + length]
        close(found, out)
        if choosing:
            for routing in decided(model, padded, edits, mask).values():
                assert not np.asarray(routing.chosen)[:, ~mask].any()


def test_a_row_of_padding_is_finite():
    model, tokens = model_of(causal=False), tiny_tokens()
    mask = np.ones_like(tokens, bool)
    mask[1] = False
    for chosen in (CHOOSING, Selection(6, top_k=2)):
        edits = union(model, chosen, chosen)
        assert np.isfinite(logits(model, tokens, edits, mask)).all()


# Who has which token.


def test_each_token_has_k_experts_with_gates_of_mean_one():
    model, tokens = model_of(), tiny_tokens()
    for site, routing in decided(model, tokens, union(model)).items():
        k = {"z": 3, "neurons": 2}[site]
        gates = np.asarray(routing.gates)
        assert ((gates > 0).sum(-1) == k).all()
        assert (np.asarray(routing.chosen) == (gates > 0)).all()
        close(gates.sum(-1), np.full(gates.shape[:-1], k))
        # The best k by probability, and not even.
        p = np.asarray(routing.probabilities)
        assert (np.where(gates > 0, p, np.inf).min(-1) >= np.where(gates > 0, 0, p).max(-1)).all()
        assert gates.max() > 1.5


def test_each_expert_has_its_share_of_the_real_tokens():
    model, tokens = model_of(causal=False), tiny_tokens(3, 14)
    mask = np.arange(14) < np.array([[14], [9], [1]])
    edits = union(model, CHOOSING, CHOOSING)
    # ceil(.55 * 14), ceil(.55 * 9), ceil(.55 * 1)
    expected = np.array([8, 5, 1])[None, :, None]
    for routing in decided(model, tokens, edits, mask).values():
        chosen, p = np.asarray(routing.chosen), np.asarray(routing.probabilities)
        assert (chosen.sum(axis=2) == expected).all()
        close(routing.gates, np.where(chosen, 6 * p, 0))
        # No token that was left has a higher probability than one that was taken.
        left = np.where(mask[None, :, :, None] & ~chosen, p, -np.inf).max(axis=2)
        assert (left <= np.where(chosen, p, np.inf).min(axis=2)).all()


@pytest.mark.parametrize("capacity, taken", [(0.55, 55), (0.07, 7), (1 / 3, 34), (1.0, 100)])
def test_a_capacity_is_not_rounded_up_by_floating_point(capacity, taken):
    ranking, mask = jnp.arange(100.0)[None, :, None], jnp.ones((1, 100), bool)
    chosen = np.asarray(best_tokens(ranking, mask, capacity))[0, :, 0]
    assert (np.flatnonzero(chosen) == np.arange(100 - taken, 100)).all()


@pytest.mark.parametrize("kind, experts", [("mha", 3), ("gqa", 6)])
def test_an_expert_attends_among_its_own_tokens(kind, experts):
    """Against attention written out over the tokens of each head alone."""
    model, tokens = model_of(kind), tiny_tokens(1)
    edits = union(model, Selection(experts, top_k=2), None)
    taps = {"routing": Tap("attn_out", lambda _, c: c.edits["z"].routing(c))}
    out = jax.jit(
        lambda: model(tokens, edits=edits, taps={s: s for s in ("q", "k", "v", "z")} | taps)
    )()
    found = {name: out.taps[name] for name in ("q", "k", "v", "z")}
    gates = np.asarray(out.taps["routing"].gates)
    for layer, head in ((0, 0), (1, 4), (2, 5)):
        expert = head // (6 // experts)
        mine = np.flatnonzero(gates[layer, 0, :, expert])
        q = np.asarray(found["q"])[layer, 0, mine, head]
        k, v = (np.asarray(found[n])[layer, 0, mine] for n in "kv")
        k, v = (x[:, head // (6 // x.shape[1])] for x in (k, v))
        scores = np.where(np.tri(len(mine), dtype=bool), q @ k.T / np.sqrt(8), -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        expected = np.zeros((tokens.shape[1], 8))
        expected[mine] = gates[layer, 0, mine, expert][:, None] * (pattern @ v)
        close(np.asarray(found["z"])[layer, 0, :, head], expected)


@pytest.mark.optimised
def test_the_choice_is_computed_once():
    model, tokens = model_of(causal=False), tiny_tokens()
    edits = union(model, CHOOSING, None)
    text = jax.jit(run).lower(model, tokens, edits).compile().as_text()
    # Tokens are sorted twice, for their order and for their places in it.
    assert text.count(" sort(") == 2


# Gradients.


@pytest.mark.parametrize("choosing", mostly_slow([False, True], False))
def test_routers_have_the_gradient_of_their_gates(choosing):
    model, tokens = model_of("gqa", causal=not choosing), tiny_tokens(3, 10)
    chosen = dict.fromkeys(("attention", "mlp"), CHOOSING) if choosing else {}
    edits, sites = union(model, **chosen, size=10), ("z", "neurons")

    @jax.jit
    def loss(edits):
        """With it, what is chosen: a difference across another choice is no derivative."""
        out = model(tokens, edits=edits, taps=routing_taps())
        p = jax.nn.log_softmax(out.logits)
        right = jnp.take_along_axis(p, tokens[..., None], axis=-1)
        return -right.mean(), {site: out.taps[site].chosen for site in sites}

    (_, same), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(edits)
    for site in sites:
        slope = gradient[site].gating
        chex.assert_tree_all_finite(slope)
        norm = jnp.sqrt(jnp.sum(slope**2))
        assert norm > 1e-3
        losses = []
        for step in (-STEP, STEP):
            moved = dataclasses.replace(
                edits[site], gating=edits[site].gating + step * slope / norm
            )
            value, chosen_there = loss(Edits({**edits, site: moved}))
            chex.assert_trees_all_equal(chosen_there, same)
            losses.append(value)
        np.testing.assert_allclose((losses[1] - losses[0]) / (2 * STEP), norm, rtol=0.005)


def test_all_gradients_are_finite_and_reach_every_head():
    model, tokens = model_of(causal=False), tiny_tokens()
    mask = np.arange(14) < np.array([[14], [6]])

    @jax.jit
    @jax.grad
    def gradient(params, edits):
        out = jh.Transformer(model.config, params)(tokens, mask, edits=edits)
        return jnp.sum(jnp.where(mask[..., None], jnp.square(out.logits), 0))

    found = gradient(model.params, union(model, CHOOSING, CHOOSING))
    chex.assert_tree_all_finite(found)
    for name in ("q", "k", "v", "o"):
        heads = np.moveaxis(np.abs(found["blocks"]["attn"][name]), 1 if name == "o" else 2, 1)
        assert (heads.reshape(3, 6, -1).max(-1) > 0).all(), name
    neurons = np.abs(found["blocks"]["mlp"]["down"]).max(axis=-1)
    assert (neurons.reshape(3, 6, -1).max(-1) > 0).all()


# Together with other edits, and on disk.


def test_they_compose_with_masks_and_offsets():
    model, tokens = model_of(), tiny_tokens()
    config, edits = model.config, union(model)
    silent = jh.mask_heads(config, [(0, 2)], how="zero")
    offset = jh.offset_heads(config, np.zeros((3, 6, 8)) + 0.5 * (np.arange(6) == 2)[:, None])
    first = run(model, tokens, edits, sites=("z", "scores")).taps
    for more, expected in ((silent, 0.0), (offset, np.asarray(first["z"])[0, :, :, 2] + 0.5)):
        both = run(model, tokens, edits | more, sites=("z", "scores")).taps
        close(both["z"][0, :, :, 2], np.broadcast_to(expected, (2, 14, 8)))
        others = np.array([0, 1, 3, 4, 5])
        close(both["z"][0][:, :, others], first["z"][0][:, :, others])
        chex.assert_trees_all_equal(both["scores"][0], first["scores"][0])
    # In the other order gates multiply the offset: none where the expert does not have the token.
    gates = np.asarray(decided(model, tokens, edits)["z"].gates)[0, :, :, 2]
    before = run(model, tokens, offset | edits, sites=("z",)).taps["z"][0, :, :, 2]
    close(before, np.asarray(first["z"])[0, :, :, 2] + 0.5 * gates[..., None])


@pytest.mark.parametrize("random", [False, True])
def test_they_are_saved_and_read(tmp_path, random):
    model, tokens = model_of(), tiny_tokens()
    edits = union(model, random=random)
    edits.save(tmp_path / "edits.safetensors")
    read = Edits.load(tmp_path / "edits.safetensors")
    assert isinstance(read["scores"], OwnTokens) and jax.tree.structure(read) == jax.tree.structure(
        edits
    )
    chex.assert_trees_all_equal(logits(model, tokens, read), logits(model, tokens, edits))
    assert "Experts(" in repr(read)


def test_every_leaf_has_a_sharding_rule_that_divides_nothing():
    model = model_of()
    for random in (False, True):
        edits = union(model, random=random)
        trained = {"edits": {site: edits[site].weights for site in ("z", "neurons")}}
        for path, _ in (*paths({"edits": edits}), *paths(trained)):
            assert next(rule for rule in RULES if rule.matches(path)).axes is None, path


# Refusals.


def experts_of(**changes) -> Edits:
    return Edits(z=dataclasses.replace(union(model_of())["z"], **changes), scores=OwnTokens())


def test_edits_made_for_another_model_or_site_are_refused():
    causal, encoder, tokens = model_of(), model_of(causal=False), tiny_tokens()
    with pytest.raises(ValueError, match="experts cannot choose their tokens"):
        logits(causal, tokens, union(encoder, CHOOSING, None))
    with pytest.raises(ValueError, match=r"gating has shape \(40, 6\).*expected \(48, 6\)"):
        logits(tiny_model(d_model=48), tokens, union(causal, mlp=None))
    with pytest.raises(ValueError, match="one of gating and keys"):
        logits(causal, tokens, experts_of(gating=None))
    with pytest.raises(ValueError, match="expected one Experts among the edits of 'z', found 0"):
        logits(causal, tokens, Edits(scores=OwnTokens()))
    with pytest.raises(ValueError, match="act at 'z', got 'neurons'"):
        logits(causal, tokens, Edits(neurons=experts_of()["z"]))
    with pytest.raises(ValueError, match="key/value cache"):
        jh.generate(causal, tokens, edits=union(causal), max_new_tokens=2)


def test_scores_that_are_nan_show():
    model, tokens = model_of(), tiny_tokens()
    edits = with_gating(union(model, mlp=None), float("nan"))
    assert np.isnan(logits(model, tokens, edits)).all()
