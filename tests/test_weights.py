"""Circuits read off the weights: against dense matrices, against the model, and planted ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, tiny_model

import jaxheads as jh
from jaxheads import Transformer
from jaxheads.circuits.successor import SUCCESSION, successions, successor_scores
from jaxheads.circuits.token_circuits import (
    copying_scores,
    copying_traces,
    ov_circuit,
    qk_circuit,
)
from jaxheads.circuits.weights import (
    component_composition_scores,
    composition_scores,
    ov_svd,
    qk_svd,
)
from jaxheads.model.parameters import flatten, nest

LAYERS, HEADS, HEAD_DIM, WIDTH = 3, 6, 8, 40
LAYER_NORM = {"norm": "layer", "norm_bias": True, "branch_scale": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kind": "mha"},
    "mqa": {"kind": "mqa", "norm_plus_one": True},
    "layer norm": LAYER_NORM,
    "first layer bare": {"first_attn_norm": False, "tied": False, "logit_scale": 0.5},
    "bare ends": {"final_norm": False, "embed_norm": True, "embed_scale": 2.0},
}


def variants(test: Any) -> Any:
    """Runs a test on every variant. Each is a program of its own: they compile, hardly run."""
    marked = [
        pytest.param(fields, id=name, marks=[pytest.mark.slow] * (place > 1))
        for place, (name, fields) in enumerate(VARIANTS.items())
    ]
    return pytest.mark.parametrize("fields", marked)(test)


def dense_norm(model: Transformer, scale: Any) -> np.ndarray:
    """The linear part of a norm as a matrix [D,D]."""
    gamma = np.asarray(scale, np.float64) + model.config.norm_plus_one
    centre = np.eye(WIDTH) - (model.config.norm == "layer") / WIDTH
    return centre @ np.diag(gamma)


def dense(model: Transformer, layer: int, head: int, circuit: str) -> np.ndarray:
    """W_OV or W_QK [D,D] of a head, by the definition."""
    config, blocks = model.config, model.params["blocks"]
    norm = dense_norm(model, blocks["attn_norm"]["scale"][layer])
    if layer == 0 and not config.first_attn_norm:
        norm = np.eye(WIDTH)
    weight = {name: np.asarray(blocks["attn"][name][layer], np.float64) for name in "qkvo"}
    shared = head // config.group_size
    if circuit == "qk":
        return norm @ weight["q"][:, head] @ (norm @ weight["k"][:, shared]).T
    out = weight["o"][head]
    if config.branch_scale:
        out = out * np.asarray(blocks["attn_scale"][layer])
    return norm @ weight["v"][:, shared] @ out


def full_circuit(model: Transformer, layer: int, head: int) -> np.ndarray:
    """W_E W_OV W_U [V,V]."""
    table = np.asarray(model.params["embed"]["tokens"], np.float64)
    kernel = table if model.config.tied else np.asarray(model.params["unembed"]["kernel"])
    if model.config.embed_norm:
        table = np.asarray(model.embed.norm(jnp.asarray(table, jnp.float32), model.config))
    norm = np.eye(WIDTH)
    if model.config.final_norm:
        norm = dense_norm(model, model.params["final_norm"]["scale"])
    return table @ dense(model, layer, head, "ov") @ norm @ kernel.T


def changed(model: Transformer, **arrays: np.ndarray) -> Transformer:
    """The model with other attention weights; names are those of `blocks/attn`."""
    params = dict(flatten(model.params))
    params |= {f"blocks/attn/{name}": jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    return Transformer(model.config, nest(params))


def attention(model: Transformer) -> dict[str, np.ndarray]:
    return {name: np.array(model.params["blocks"]["attn"][name]) for name in "qkvo"}


# Singular values.


@variants
@pytest.mark.parametrize(("circuit", "svd"), [("ov", ov_svd), ("qk", qk_svd)])
def test_components_sum_to_the_head(
    fields: dict[str, Any], circuit: str, svd: Callable[..., Any]
) -> None:
    model = tiny_model(**fields)
    heads = ((2, 5), (0, 1), (1, 3))
    found = svd(model, heads)
    assert found.heads == heads
    assert found.values.shape == (LAYERS, HEADS, HEAD_DIM)
    for n, (layer, head) in enumerate(heads):
        expected = dense(model, layer, head, circuit)
        values = found.values[layer, head]
        close(np.einsum("di,i,ie->de", found.left[n], values, found.right[n]), expected)
        close(values, np.linalg.svd(expected, compute_uv=False)[:HEAD_DIM])


def test_singular_vectors_are_orthonormal() -> None:
    found = ov_svd(tiny_model(), [(1, 2)])
    close(found.left[0].T @ found.left[0], np.eye(HEAD_DIM))
    close(found.right[0] @ found.right[0].T, np.eye(HEAD_DIM))


# Composition.


@variants
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_composition_equals_dense_matrices(fields: dict[str, Any], kind: str) -> None:
    model = tiny_model(**fields)
    scores = np.asarray(composition_scores(model, kind))
    for layer, head, above, reader in ((0, 0, 1, 5), (0, 4, 2, 2), (1, 3, 2, 0)):
        w1 = dense(model, layer, head, "ov")
        w2 = dense(model, above, reader, "ov" if kind == "v" else "qk")
        w2 = w2.T if kind == "k" else w2
        expected = np.linalg.norm(w1 @ w2) / np.linalg.norm(w1) / np.linalg.norm(w2)
        close(scores[layer, head, above, reader], expected)


def test_composition_only_goes_up() -> None:
    scores = np.asarray(composition_scores(tiny_model(), "k"))
    above = np.arange(LAYERS)[:, None] < np.arange(LAYERS)
    known = ~np.isnan(scores)
    assert (known == above[:, None, :, None]).all()
    parts = np.asarray(component_composition_scores(tiny_model(), [(1, 0)], "k"))
    assert (~np.isnan(parts) == above[1][:, None]).all()


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_components_make_up_the_score_of_the_head(kind: str) -> None:
    model, writers = tiny_model(), [(1, 4), (0, 2)]
    parts = np.asarray(component_composition_scores(model, writers, kind))
    assert parts.shape == (2, HEAD_DIM, LAYERS, HEADS)
    whole, values = np.asarray(composition_scores(model, kind)), np.asarray(ov_svd(model).values)
    for n, (layer, head) in enumerate(writers):
        weight = values[layer, head] ** 2 / (values[layer, head] ** 2).sum()
        made_up = np.sqrt(np.einsum("i,ilh->lh", weight, parts[n] ** 2))
        close(made_up[layer + 1 :], whole[layer, head, layer + 1 :])


def test_random_heads_score_as_the_baseline_says() -> None:
    """The mean square of matrices at random angles is 1/D."""
    scores = np.asarray(composition_scores(tiny_model("mha", norm="layer"), "v"))
    mean_square = np.nanmean(scores**2) * WIDTH
    assert 0.9 < mean_square < 1.1


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_a_planted_channel_is_the_maximum(kind: str) -> None:
    """One direction is written by one head and read by one later head, or its group."""
    model = tiny_model()
    rng = np.random.default_rng(3)
    channel, inside = rng.normal(size=WIDTH), rng.normal(size=HEAD_DIM)
    weights = attention(model)
    writer, (above, reader) = (0, 1), (2, 4)
    shared = reader // model.config.group_size
    weights["o"][writer] += np.outer(inside, channel)
    # What reads the stream may have the norm's scale on it: it stays the largest by far.
    weights[kind][above, :, reader if kind == "q" else shared] += np.outer(channel, inside)
    planted = changed(model, **weights)
    scores = np.asarray(composition_scores(planted, kind))
    best = np.argwhere(scores > 0.9 * np.nanmax(scores))
    group = range(3, 6) if kind != "q" else [reader]
    assert {tuple(row) for row in best.tolist()} <= {(*writer, above, h) for h in group}
    assert np.nanmax(scores) > 0.6 > np.nanmax(np.asarray(composition_scores(model, kind)))
    parts = np.asarray(component_composition_scores(planted, [writer], kind))[0]
    assert np.nanargmax(parts[:, above, reader]) == 0, "the first component carries the channel"


def test_a_head_of_zeros_scores_zero() -> None:
    weights = attention(tiny_model())
    weights["o"][0, 2] = 0
    model = changed(tiny_model(), **weights)
    assert (np.asarray(composition_scores(model, "q"))[0, 2, 1:] == 0).all()
    assert copying_scores(model)[0, 2] == copying_traces(model)[0, 2] == 0


# Copying.


@variants
def test_copying_equals_dense_matrices(fields: dict[str, Any]) -> None:
    model = tiny_model(**fields)
    scores, traces = copying_scores(model), copying_traces(model)
    assert scores.shape == traces.shape == (LAYERS, HEADS)
    for layer, head in ((0, 0), (1, 5), (2, 3)):
        full = full_circuit(model, layer, head)
        eigenvalues = np.linalg.eigvals(full)
        close(scores[layer, head], eigenvalues.sum().real / np.abs(eigenvalues).sum(), 1e-4)
        close(traces[layer, head], np.trace(full) / np.linalg.norm(full, "nuc"))
        assert abs(traces[layer, head]) <= abs(scores[layer, head])


@cache
def copying_model() -> Transformer:
    """Head 1.4 copies exactly, up to a positive factor of each direction; 1.5 the opposite."""
    model = tiny_model()
    weights = attention(model)
    gamma = np.asarray(model.params["blocks"]["attn_norm"]["scale"])[1]
    last = np.asarray(model.params["final_norm"]["scale"])
    reads = weights["v"][1, :, 1]
    # N W_V W_O N' is symmetric and positive, so W_E (...) W_E^T is too.
    weights["o"][1, 4] = (gamma[:, None] * reads).T / last
    weights["o"][1, 5] = -weights["o"][1, 4]
    return changed(model, **weights)


def test_a_planted_copier_scores_one() -> None:
    model = copying_model()
    for score in (copying_scores, copying_traces):
        close(np.asarray(score(model))[1, 4:], [1, -1], 1e-4)


# Circuits between tokens.


@variants
@pytest.mark.parametrize("source", ["embedding", "mlp0"])
def test_ov_circuit_is_what_the_model_writes(fields: dict[str, Any], source: str) -> None:
    """A sequence of one token attends to it alone, in the first layer to what stands for it."""
    model = tiny_model(**{"biases": True, **fields})
    head, tokens, out = 4, np.arange(5, 12), np.array([3, 96, 50])
    edits = jh.Edits()
    if source == "mlp0":
        silent = jh.Edits(attn_out=jh.Affine(scale=jnp.zeros((LAYERS, 1, 1, 1))))
        x = model(tokens[:, None], edits=silent, taps="mlp_out").taps["mlp_out"][0]
        edits = jh.Edits(embed=jh.Mix(x, jnp.ones((1, 1, 1))))
    writes = model(tokens[:, None], edits=edits, taps="head_out").taps["head_out"][0, :, 0, head]
    if model.config.branch_scale:
        writes = writes * model.params["blocks"]["attn_scale"][0]
    kernel = model.params["embed" if model.config.tied else "unembed"]
    kernel = np.asarray(kernel["tokens" if model.config.tied else "kernel"])
    norm = np.eye(WIDTH)
    if model.config.final_norm:
        norm = dense_norm(model, model.params["final_norm"]["scale"])
    expected = np.asarray(writes) @ norm @ kernel[out].T * model.config.logit_scale
    close(ov_circuit(model, (0, head), tokens, out, source=source), expected)


@variants
def test_qk_circuit_is_the_models_logit(fields: dict[str, Any]) -> None:
    model = tiny_model(**{"biases": True, "ropes": (None,), "attn_scale": 0.3, **fields})
    tokens = np.array([7, 3, 90, 3, 44])
    scores = np.asarray(model(tokens[None], taps="scores").taps["scores"][0, 0, 5])
    seen = np.tril_indices(len(tokens))
    close(np.asarray(qk_circuit(model, (0, 5), tokens, tokens))[seen], scores[seen])


def test_qk_circuit_with_rotary_is_that_of_one_position() -> None:
    model, tokens = tiny_model(), np.array([7, 3, 90])
    scores = np.asarray(model(tokens[None], taps="scores").taps["scores"][0, 0, 1])
    close(np.diag(qk_circuit(model, (0, 1), tokens, tokens)), np.diag(scores))


# Successors.

DAYS = SUCCESSION["days"]


class Words:
    """A tokenizer of few words. The others are two tokens, or one unknown one."""

    def __init__(self, ids: dict[str, int], others: tuple[int, ...] = (1, 2)) -> None:
        self.ids, self.others = ids, others

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.ids[text]] if text in self.ids else list(self.others)

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> Any:
        raise NotImplementedError


BARE = {day: 20 + i for i, day in enumerate(DAYS)}
SPACED = {" " + day: 27 + i for i, day in enumerate(DAYS)}


@cache
def successor_model() -> Transformer:
    """Head 1.4 maps the first MLP's output for each day to the logit of the next day."""
    model = tiny_model(kind="gqa", tied=False)
    weights = attention(model)
    ids = np.arange(20, 27)
    silent = jh.Edits(attn_out=jh.Affine(scale=jnp.zeros((LAYERS, 1, 1, 1))))
    x = model(ids[:, None], edits=silent, taps="mlp_out").taps["mlp_out"][0, :, 0]
    scale = np.asarray(model.params["blocks"]["attn_norm"]["scale"])[1]
    x = np.asarray(x) / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    kernel = np.asarray(model.params["unembed"]["kernel"]) * np.asarray(
        model.params["final_norm"]["scale"]
    )
    weights["v"][1, :, 1, :7] = np.linalg.pinv(x)
    weights["o"][1, 4, :7] = np.roll(np.eye(7), 1, axis=1) @ np.linalg.pinv(kernel[ids].T)
    return changed(model, **weights)


def test_a_planted_successor_head_scores_one() -> None:
    found = successor_scores(successor_model(), Words(BARE), {"days": DAYS}, draws=8)
    assert found.counts == {"days": 6}
    assert found.scores[1, 4] == found.by_class["days"][1, 4] == 1
    others = np.delete(found.scores.reshape(-1), HEADS + 4)
    assert others.max() < 0.7
    assert found.control.shape == (8, LAYERS, HEADS)
    assert found.control[:, 1, 4].mean() < 0.5


def test_a_successor_in_another_spelling_counts_apart() -> None:
    """Only the words without a space were planted."""
    classes = {"days": DAYS}
    both = successor_scores(successor_model(), Words(BARE | SPACED), classes)
    spaced = successor_scores(successor_model(), Words(SPACED), classes)
    assert both.counts == {"days": 12}
    close(both.scores[1, 4], (1 + spaced.scores[1, 4]) / 2)


def test_only_neighbours_that_are_single_tokens_count() -> None:
    left_out = ("Wednesday", "Friday")
    ids = {w: token for w, token in (BARE | SPACED).items() if w.strip() not in left_out}
    for others in ((1, 2), (0,)):
        found = successions(Words(ids, others), {"days": DAYS})
        left, right = found.tokens[found.pairs].T
        assert left.tolist() == [20, 25, 27, 32], "Monday and Saturday, in both spellings"
        assert (right == left + 1).all()
        assert (found.group[found.pairs[:, 0]] == found.group[found.pairs[:, 1]]).all()


# Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: composition_scores(m(), "o"), "unknown kind of composition 'o'"),
        (lambda m: ov_svd(m(norm_place="post")), "config.norm_place is 'post', expected 'pre'"),
        (lambda m: ov_svd(m(norm_place="sandwich")), "config.norm_place is 'sandwich'"),
        (lambda m: qk_svd(m(qk_norm="head")), "config.qk_norm is 'head', expected 'none'"),
        (lambda m: composition_scores(m(qk_norm="all"), "k"), "config.qk_norm is 'all'"),
        (lambda m: ov_svd(m().params), "circuits are read off the weights of a Transformer"),
        (lambda m: ov_svd(m(cross=True)), "config.cross is True"),
        (lambda m: copying_scores(m(head="none")), "config.head is 'none', expected 'lm'"),
        (lambda m: ov_svd(m(), [(3, 0)]), "head 3.0 is out of range"),
        (lambda m: ov_svd(m(), [(1, 0), (1, 0)]), "head 1.0 is named twice"),
        (lambda m: component_composition_scores(m(), [], "q"), "no writers to score"),
        (lambda m: ov_circuit(m(), (0, 6), [1], [2]), "head 0.6 is out of range"),
        (lambda m: ov_circuit(m(), (0, 0), [97], [2]), "tokens_in holds the id 97"),
        (lambda m: ov_circuit(m(), (0, 0), [1], []), "tokens_out must be one row of token ids"),
        (lambda m: ov_circuit(m(), (0, 0), [1], [2], source="mlp"), "unknown source 'mlp'"),
        (
            lambda m: qk_circuit(m(), (0, 0), [1], np.array([[2]])),
            "keys must be one row of token ids",
        ),
        (
            lambda m: successor_scores(m(), Words(BARE), {"x": ["a"]}),
            "class 'x' must have at least",
        ),
        (
            lambda m: successor_scores(m(), Words(BARE), {"x": "ab"}),
            "none of the classes x has two",
        ),
        (lambda m: successor_scores(m(), Words(BARE), draws=0), "draws must be at least 1, got 0"),
    ],
)
def test_bad_input(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(tiny_model)
    assert str(caught.value).startswith(message)


def test_values_circuits_do_not_mind_normalised_queries() -> None:
    model = tiny_model(qk_norm="head")
    assert np.isfinite(ov_svd(model).values).all()
    assert np.nanmax(composition_scores(model, "v")) > 0


# SmolLM2.


@pytest.mark.slow
def test_smollm2_has_no_successor_head_and_23_3_is_the_nearest(smollm2: Any) -> None:
    found = successor_scores(*smollm2)
    assert len(found.counts) == len(SUCCESSION) == 8
    assert divmod(int(found.scores.argmax()), 9) == (23, 3)
    assert 0.15 < found.scores[23, 3] < 0.25
    assert found.control.shape == (5, 30, 9)
    assert found.control.max() < found.scores[23, 3]
    assert abs(found.by_class["numbers"][23, 3] - 5 / 9) < 1e-6


@pytest.mark.slow
def test_smollm2_previous_token_head_is_read_by_the_keys_of_induction_heads(smollm2: Any) -> None:
    """Against five draws of as many random readers of the same layers."""
    scores = np.asarray(composition_scores(smollm2[0], "k"))
    induction = [(18, 6), (17, 3), (17, 4), (18, 7), (17, 5)]
    chosen = [scores[16, 0, layer, head] for layer, head in induction]
    known = scores[~np.isnan(scores)]
    assert all((known < score).mean() > 0.999 for score in chosen)
    # The keys of a group are shared: only readers of other groups are controls.
    others = [(layer, head) for layer in range(17, 30) for head in range(9)]
    others = [(i, h) for i, h in others if (i, h // 3) not in {(17, 1), (18, 2)}]
    rng = np.random.default_rng(0)
    for _ in range(5):
        drawn = rng.choice(len(others), len(induction), replace=False)
        assert np.mean([scores[(16, 0, *others[i])] for i in drawn]) < 0.6 * np.mean(chosen)
