"""Path patching equals its definition by whole forward passes, and finds a planted circuit."""

import functools

import jax.numpy as jnp
import numpy as np
import planted
import pytest
from tiny import close, tiny_model, tiny_tokens

from jaxheads import Batch, Edits, tasks
from jaxheads.edits import Mix
from jaxheads.sweep.metrics import LogitDifference
from jaxheads.sweep.paths import path_patch
from jaxheads.sweep.receivers import Receiver

ROWS, LENGTH = 2, 9


@functools.cache
def pair() -> tuple[Batch, Batch]:
    """Prompts that differ from slot 2 on; the second row ends in padding."""
    clean = tiny_tokens(ROWS, LENGTH)
    corrupted = np.where(np.arange(LENGTH) < 2, clean, tiny_tokens(ROWS, LENGTH, seed=1))
    mask = np.ones((ROWS, LENGTH), bool)
    mask[1, -2:] = False
    return Batch(clean, mask), Batch(corrupted, mask)


def metric() -> LogitDifference:
    return LogitDifference.of(pair()[0], np.array([3, 4]), np.array([5, 6]))


def naive(model, receivers, sender, mlps, positions=None):
    """The score of one sender, by the definition: three whole forward passes, with edits."""
    clean, corrupted = pair()
    made = metric()
    sites = ("z", "mlp_out", "q", "k", "v", "resid_post")
    own, other = (model(batch, taps=sites).taps for batch in (clean, corrupted))
    layer, head = sender
    at = np.isin(np.arange(LENGTH), range(LENGTH) if positions is None else positions)
    values = {site: np.array(own[site]) for site in ("z", "mlp_out")}
    if head == "mlp":
        values["mlp_out"][layer][:, at] = np.array(other["mlp_out"])[layer][:, at]
    else:
        values["z"][layer][:, at, head] = np.array(other["z"])[layer][:, at, head]
    edits = {"z": Mix(jnp.asarray(values["z"]), jnp.ones((1,) * 5))}
    if mlps == "frozen":
        edits["mlp_out"] = Mix(jnp.asarray(values["mlp_out"]), jnp.ones((1,) * 4))
    elif head == "mlp":
        weight = np.zeros((model.config.n_layers, 1, 1, 1), np.float32)
        weight[layer] = 1
        edits["mlp_out"] = Mix(jnp.asarray(values["mlp_out"]), jnp.asarray(weight))

    def measure(edits, **wanted):
        out = model(clean, edits=Edits(edits), logits_at=made.slots, **wanted)
        tokens = np.asarray(made.tokens)[:, None]
        return np.asarray(made(jnp.take_along_axis(out.logits, tokens, axis=2))), out.taps

    unedited, _ = measure({})
    found, seen = measure(edits, taps=("q", "k", "v"))
    if receivers != ["logits"]:
        edits = {}
        for name in receivers:
            at_layer, at_head, site = name.split(".")
            weight = np.array(edits[site].weight) if site in edits else np.zeros(
                (*seen[site].shape[:1], 1, 1, seen[site].shape[3], 1), np.float32)  # fmt: skip
            weight[int(at_layer), :, :, int(at_head)] = 1
            edits[site] = Mix(seen[site], jnp.asarray(weight))
        found, _ = measure(edits)
    return found - unedited


CASES = [
    ("logits", "heads", "recomputed", None),
    ("logits", "mlps", "recomputed", (8, 6, 3)),
    ("logits", "both", "frozen", None),
    ("2.3.q", "both", "recomputed", None),
    ("2.3.q 2.1.k 2.0.v", "heads", "frozen", None),
    ("1.4.q 2.1.v 2.5.q", "both", "recomputed", (5, 3)),
    ("1.0.v 1.1.k", "mlps", "frozen", None),
]


def _some_slow(cases):
    return [*cases[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in cases[2:])]


@pytest.mark.parametrize(("receivers", "senders", "mlps", "positions"), _some_slow(CASES))
def test_path_patching_equals_its_definition(receivers, senders, mlps, positions):
    model = tiny_model()
    names = receivers.split()
    found = path_patch(
        model, *pair(), metric(), names, senders=senders, mlps=mlps, positions=positions, rows=True
    )
    labels = {"heads": range(6), "mlps": ["mlp"], "both": (*range(6), "mlp")}[senders]
    expected = np.array([
        [naive(model, names, (layer, sender), mlps, positions) for sender in labels]
        for layer in range(3)
    ])  # fmt: skip
    assert np.abs(expected).max() > 1e-3
    close(found.values, expected.reshape(found.shape))


@pytest.mark.slow
@pytest.mark.parametrize("receivers", ["logits", "2.3.q"])
def test_paths_in_a_model_that_sees_both_ways(receivers):
    model = tiny_model(causal=False)
    clean, corrupted = pair()
    found = path_patch(model, clean, corrupted, metric(), receivers, rows=True)
    expected = [naive(model, [receivers], (1, head), "recomputed") for head in range(6)]
    close(found.values[1], expected)


@pytest.mark.slow
def test_chunks_and_waves_do_not_matter():
    """The smallest budgets cut the senders into many parts."""
    options = {"receivers": ["1.0.q", "2.1.v"], "senders": "both"}
    whole = path_patch(tiny_model(), *pair(), metric(), **options)
    parts = path_patch(tiny_model(), *pair(), metric(), **options, memory_budget=200_000)
    close(parts.values, whole.values)
    assert not np.array_equal(whole.values, np.zeros_like(whole.values))


@pytest.mark.slow
def test_what_cannot_reach_a_receiver_scores_zero():
    """Exactly: it is not computed."""
    found = path_patch(tiny_model(), *pair(), metric(), "1.0.q", senders="both")
    assert found.axes == ("layer", "sender") and found.labels[1][-1] == "mlp"
    assert (found.values[1:] == 0).all() and (found.values[0] != 0).all()
    assert (path_patch(tiny_model(), *pair(), metric(), "0.0.q").values == 0).all()
    assert (path_patch(tiny_model(), pair()[0], pair()[0], metric()).values == 0).all()
    early = path_patch(tiny_model(), *pair(), metric(), "2.0.k", positions=[0, 1])
    assert (early.values == 0).all()


def test_normalised_scores_are_shares_of_the_difference_between_the_runs():
    clean, corrupted = pair()
    found = path_patch(tiny_model(), clean, corrupted, metric())
    share = path_patch(tiny_model(), clean, corrupted, metric(), normalised=True)
    of = share.info["source"] - share.info["unedited"]
    np.testing.assert_allclose(share.values * of, found.values, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="cannot normalise"):
        path_patch(tiny_model(), clean, clean, metric(), normalised=True)


def test_exactly_the_planted_edges_have_scores():
    """Of every head to every receiver above it; those of MLPs are no part of the circuit."""
    model, pairs = planted.planted_model(), planted.planted_pairs()
    made = planted.planted_metric(pairs)
    receivers = ["logits", *(f"1.{head}.q" for head in range(4))]
    receivers += [f"1.{head}.{site}" for site in "kv" for head in range(2)]
    edges = set()
    for receiver in receivers:
        found = path_patch(
            model, pairs.clean, pairs.corrupted, made, receiver, senders="both", normalised=True
        )
        large = np.abs(found.values) > 0.5
        assert (np.abs(found.values[~large]) < 0.02).all()
        name = receiver if receiver == "logits" else f"a{receiver}"
        for layer, sender in np.argwhere(large):
            label = found.labels[1][sender]
            edges.add((f"m{layer}" if label == "mlp" else f"a{layer}.{label}", name))
    assert edges == {edge for edge in planted.EDGES if edge[0] != "embed"}


def test_receivers_have_names():
    one = Receiver.parse("18.6.q")
    assert (one.layer, one.head, one.site) == (18, 6, "q")
    assert Receiver.parse("a2.1.k") == Receiver(2, 1, "k") and str(one) == "18.6.q"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"receivers": "2.3"}, "unknown receiver '2.3': expected 'logits' or layer.head.site"),
        ({"receivers": "2.3.z"}, "unknown receiver '2.3.z'"),
        ({"receivers": "2.3.k"}, "receiver 2.3.k is out of range.* key/value heads 0..1"),
        ({"receivers": "3.3.q"}, "layers 0..2 and query heads 0..5"),
        ({"receivers": ["2.3.q", "2.3.q"]}, "receiver 2.3.q is named twice"),
        ({"receivers": ["2.3.q", "logits"]}, "'logits' cannot be patched together with heads"),
        ({"receivers": []}, "no receivers"),
        ({"senders": "neurons"}, "unknown senders 'neurons'"),
        ({"mlps": "gone"}, "unknown mlps 'gone'"),
        ({"positions": [9]}, "position 9 is out of range 0..8"),
        ({"positions": []}, "positions is empty"),
        ({"memory_budget": 1000}, "a budget of 1,000 bytes is too small"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        path_patch(tiny_model(), *pair(), metric(), **options)


def test_a_corrupted_prompt_of_another_length_is_refused():
    clean, corrupted = pair()
    with pytest.raises(ValueError, match="pairs of one shape"):
        path_patch(
            tiny_model(), clean, Batch(corrupted.tokens[:, :-1], corrupted.mask[:, :-1]), metric()
        )


# Indirect objects in SmolLM2: the corrupted prompts ask for the other name.


@pytest.fixture(scope="module")
def ioi(smollm2):
    model, tokenizer = smollm2
    examples = tasks.ioi(8, seed=0, template="went", corruption="swap")
    pairs = tasks.encode_pairs(examples, tokenizer)
    return model, pairs, LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)


@pytest.fixture(scope="module")
def paths_to_logits(ioi):
    model, pairs, made = ioi
    return path_patch(
        model, pairs.clean, pairs.corrupted, made, senders="both", mlps="frozen", normalised=True
    )


@pytest.mark.slow
def test_direct_paths_to_the_logits_make_up_the_whole_effect(paths_to_logits):
    """All that reaches the logits comes from heads and MLPs: the last token is the same."""
    scores = paths_to_logits.values
    assert scores.sum() == pytest.approx(1, abs=0.1)
    assert paths_to_logits.top(1, "highest")[0][0] == (23, 3)
    assert np.sort(np.abs(scores.ravel()))[-10:].sum() > 0.6 * np.abs(scores).sum()


@pytest.mark.slow
def test_movers_attend_to_the_indirect_object(ioi, paths_to_logits):
    """But for the first, which attends to the subject and lowers its logit."""
    model, pairs, _ = ioi
    tokens, rows = np.asarray(pairs.clean.tokens), np.arange(8)
    pattern = np.asarray(model(pairs.clean, taps="pattern").taps["pattern"])[..., -1, :]

    def attention(ids, which):
        slots = [np.flatnonzero(row == one)[which] for row, one in zip(tokens, ids, strict=True)]
        return pattern[:, rows, :, slots].mean(axis=0)

    indirect = attention(pairs.answers[:, 0], 0)
    heads = paths_to_logits.values[:, :9]
    movers = np.argsort(-heads.ravel())[:6]
    found = indirect.ravel()[movers].mean()
    rng = np.random.default_rng(0)
    draws = [indirect.ravel()[rng.choice(270, 6, replace=False)].mean() for _ in range(20)]
    assert found > 0.25 > 2 * np.mean(draws)
    assert found > max(draws)
    assert attention(pairs.wrong[:, 0], -1)[23, 3] > 0.5 > 5 * indirect[23, 3]
