"""Seeing what a router does: numbers by hand on a planted router, JSON, pages, the command."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tiny import tiny_model

import jaxheads as jh
from jaxheads.cli import main
from jaxheads.data import ArrayRows
from jaxheads.edits import Edits, Route, mixture_of_heads
from jaxheads.files import write_json
from jaxheads.methods.data import DataSettings
from jaxheads.methods.method import TextData, Tuned
from jaxheads.methods.moh import Moh
from jaxheads.methods.run import EXAMINATION, RESULTS, Run
from jaxheads.model import Batch
from jaxheads.report import Report, render
from jaxheads.report.images import image_grid
from jaxheads.report.routing import (
    MOST_TOKENS,
    add_routing,
    layer_rows,
    routing_page,
    speciality_headline,
)
from jaxheads.report.run import run_page
from jaxheads.routing import RoutingView, Sentence, examine, in_batches
from jaxheads.routing.specialities import CATEGORIES, lifts, members
from jaxheads.text import Tokenizer
from jaxheads.train.workdir import claim

WORDS = ("<s>", "The", " cat", " Dog", " 7", ",", "\n", "s", " hat", "mat")
CAT, COMMON = 2, (2, 3, 4, 5)
"""The token that head 0.1 reads, and the four tokens of the text."""
MODEL = {"n_heads": 4, "n_kv_heads": 2, "vocab_size": len(WORDS), "context_length": 64}
SENTENCE = "The cat, Dog 7s"


def model() -> jh.Transformer:
    return tiny_model(**MODEL)


def words() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<s>"))
    pattern = tokenizers.Regex(r" ?[A-RT-Za-rt-z]+| ?\d|s|,|\n")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, {}, None)


@functools.cache
def planted(gates: str = "straight_through") -> Edits:
    """Head 0 is shared, one of the other three is on. In layer 0 it is head 1 at " cat" and head 2
    elsewhere; in layers 1 and 2, where the router is zero, it is head 1 everywhere.
    """
    every = np.arange(len(WORDS))[:, None]
    x = np.asarray(model()(every, taps="attn_in").taps["attn_in"][0, :, 0])
    scores = np.zeros((len(WORDS), 4))
    scores[:, 1] = np.where(every[:, 0] == CAT, 1, -1)
    scores[:, 3] = -2
    router = np.zeros((3, x.shape[1], 4), np.float32)
    router[0] = np.linalg.lstsq(x, scores, rcond=None)[0]
    route = Route(
        jnp.arange(4)[None].repeat(3, 0) < 1,
        jnp.ones(3, jnp.int32),
        jnp.asarray(router),
        shared_router=None if gates == "straight_through" else jnp.zeros((3, x.shape[1], 4)),
        balance=None if gates == "straight_through" else jnp.zeros((3, x.shape[1], 2)),
        gates=gates,
    )
    return Edits(z=route)


def text_batch(rows: int = 24, length: int = 40) -> Batch:
    """Four tokens, equally often; the last five columns of the last row are padding."""
    tokens = np.tile(np.array(COMMON, np.int32), rows * length // 4)
    tokens = np.random.default_rng(0).permutation(tokens).reshape(rows, length)
    mask = np.ones(tokens.shape, bool)
    mask[-1, -5:] = False
    return Batch(tokens, mask)


@functools.cache
def seen(gates: str = "straight_through") -> RoutingView:
    """What the planted router does on the text."""
    return looked(planted(gates))


def looked(edits: Edits, batch: Batch | None = None, **options: Any) -> RoutingView:
    batch = text_batch() if batch is None else batch
    return examine(model(), [batch], edits, words(), SENTENCE, **options)


def drawn(seed: int = 0) -> Edits:
    """Two of four heads, at random."""
    key, gates = jax.random.key(seed), "straight_through"
    return mixture_of_heads(model().config, key, shared=0, top_k=2, scores="random", gates=gates)


# Numbers.


def test_loads_entropy_and_gates_are_those_of_the_planted_router() -> None:
    view, batch = seen(), text_batch()
    real = batch.tokens[batch.mask]
    assert view.tokens == len(real) == 24 * 40 - 5
    assert np.allclose(view.load.sum(axis=1), 1 + 1)  # shared + K
    share = (real == CAT).mean()
    assert np.allclose(view.load[0], [1, share, 1 - share, 0])
    assert np.allclose(view.load[1:], [1, 1, 0, 0])
    assert (
        view.shared.tolist() == [[True, False, False, False]] * 3 and view.top_k.tolist() == [1] * 3
    )
    probability = np.exp([[1, 0, -2], [-1, 0, -2]])
    probability /= probability.sum(axis=1, keepdims=True)
    at_cat, elsewhere = -(probability * np.log(probability)).sum(axis=1)
    expected = [share * at_cat + (1 - share) * elsewhere, np.log(3), np.log(3)]
    assert np.allclose(view.entropy, expected, atol=1e-4)
    assert np.array_equal(np.isnan(view.gates), view.load == 0)
    assert (view.gates[view.load > 0] == 1).all()


def test_mean_gates_are_over_the_tokens_that_use_a_head() -> None:
    # Two stages, of weights of zero: half for the only shared head; half of p for the routed.
    view = seen("two_stage")
    p = np.exp(1) / np.exp([1, 0, -2]).sum()
    assert np.allclose(view.gates[:, 0], 0.5)
    assert np.isclose(view.gates[0, 1], p / 2, atol=1e-4)
    assert np.allclose(view.gates[1:, 1], 0.5 / 3)


def test_overlap_of_layers_that_choose_alike_is_one_beyond_chance() -> None:
    edits = drawn()
    route: Any = edits["z"]
    alike = Edits(z=dataclasses.replace(route, keys=route.keys[:1].repeat(3, 0)))
    view = looked(alike)
    assert np.allclose(view.overlap[:, 0], 1)
    assert np.allclose(view.overlap[:, 1], 0.5, atol=0.05)
    apart = looked(edits).overlap
    assert np.allclose(apart[:, 0], apart[:, 1], atol=0.05)


def test_the_sentence_is_routed_token_by_token() -> None:
    view = seen("two_stage")
    assert view.sentence.tokens == ("The", " cat", ",", " Dog", " 7", "s")
    assert view.sentence.chosen.shape == (3, 6, 4)
    assert view.sentence.chosen[0, :, 1].tolist() == [False, True, False, False, False, False]
    assert np.array_equal(view.sentence.chosen, view.sentence.gates > 0)
    long = examine(model(), [text_batch()], planted(), words(), "cat" + " cat" * 100)
    assert len(long.sentence.tokens) == 64  # the model's context


def test_the_head_of_one_token_is_found_and_shuffled_tokens_tell_nothing() -> None:
    view = seen()
    assert [(one.layer, one.head) for one in view.specialities] == [(0, 1), (0, 2)]
    cat, other = view.specialities
    count = int((text_batch().tokens[text_batch().mask] == CAT).sum())
    assert (cat.tokens[0].token, cat.tokens[0].count) == (" cat", count)
    assert np.isclose(cat.tokens[0].lift, view.tokens / count)
    assert [lift.lift for lift in cat.tokens[1:]] == [0, 0, 0]
    assert {lift.token for lift in other.tokens[:3]} == {" Dog", " 7", ","}
    assert other.tokens[3].lift == 0
    for one in view.specialities:
        assert len(one.shuffled) == 5 and len(set(one.shuffled)) > 1
        assert all(1 < lift < 1.35 for lift in one.shuffled)
    assert cat.beyond > 2
    assert speciality_headline(view).startswith("2 of 2 heads")


def test_what_tokens_cannot_tell_is_within_the_shuffles() -> None:
    edits = drawn(1)
    found = looked(edits, shuffles=19).specialities
    assert len(found) == 12
    # Each is beyond all 19 with a probability of 1 in 20.
    assert sum(one.beyond > 0 for one in found) <= 3


def test_rare_tokens_have_no_lift() -> None:
    on = np.array([[1], [0], [1], [0], [0]], bool)
    tokens, counts, lift = lifts(on, np.array([7, 7, 3, 3, 5]), 2)
    assert tokens.tolist() == [3, 7] and counts.tolist() == [2, 2]
    assert np.allclose(lift, 0.5 / 0.4)
    assert looked(planted(), minimum=10_000).specialities == ()


def test_kinds_of_tokens() -> None:
    names = [" cat", "Cat", "s", "42", " 4", ",", "\n", "  ", "<s>", " Über"]
    ids = np.arange(len(names))
    found = members(names, ids, np.array([0, 1, 15, 16, 99, 5, 5, 5, 5, 5]))
    told = {
        name: [names[i] for i in np.flatnonzero(found[:, kind])]
        for kind, name in enumerate(CATEGORIES)
    }
    assert told["first of a text"] == [" cat"]
    assert told["later in a text"] == ["42", " 4"]
    assert told["starts with a space"] == [" cat", " 4", " Über"]
    assert told["letters, no space before"] == ["Cat", "s"]
    assert told["capitalised"] == ["Cat", " Über"]
    assert told["digits"] == ["42", " 4"]
    assert told["punctuation"] == [","] and told["blank"] == ["\n", "  "]


def test_load_by_kind_of_token() -> None:
    view = seen()
    at = {name: kind for kind, name in enumerate(view.categories)}
    assert view.category_tokens[at["first of a text"]] == 24
    assert view.category_tokens[at["2nd to 16th of a text"]] == 24 * 15
    assert view.category_tokens[at["blank"]] == 0
    assert np.isnan(view.category_load[at["blank"]]).all()
    assert np.allclose(view.category_load[at["capitalised"], 0], [1, 0, 1, 0])  # " Dog"
    assert 0 < view.category_chance[at["capitalised"]] < 0.15
    assert np.allclose(
        view.category_load[at["first of a text"], 0, 1], (text_batch().tokens[:, 0] == CAT).mean()
    )


def test_positions_begin_anew_in_each_packed_text() -> None:
    batch = text_batch(4)
    segments = np.where(np.arange(40) < 10, 1, 2) * batch.mask
    packed = dataclasses.replace(batch, segments=segments.astype(np.int32))
    assert looked(planted(), packed).category_tokens[0] == 8


def test_batches_of_any_size_give_the_same() -> None:
    whole, rows = seen().to_json(), ArrayRows(text_batch())
    few = [*in_batches(rows, 7, 5)]
    assert [batch.mask.sum() for batch in few] == [200, 80] and few[1].tokens.shape == (5, 40)
    given = in_batches(rows, 100, 10)
    parts = examine(model(), given, planted(), words(), SENTENCE).to_json()
    for name, value in whole.items():
        if name in ("entropy", "gates", "overlap"):
            found, expected = (np.array(one, float) for one in (parts[name], value))
            np.testing.assert_allclose(found, expected, atol=1e-5)
        else:
            assert parts[name] == value, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edits": Edits()}, "expected one Route among the edits of 'z', found 0"),
        ({"sentence": ""}, "has no tokens"),
        ({"batches": []}, "no tokens to look at"),
        ({"batches": [Batch(np.ones((1, 4), np.int32), np.zeros((1, 4), bool))]}, "no tokens"),
        ({"minimum": 0}, "minimum must be at least 1, got 0"),
        ({"shuffles": 0}, "shuffles must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_examined(change: dict[str, Any], message: str) -> None:
    given = {"batches": [text_batch(2)], "edits": planted(), "sentence": SENTENCE} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        examine(model(), tokenizer=words(), **given)


# JSON.


def test_json_gives_the_same_view_back() -> None:
    view = seen("two_stage")
    text = json.dumps(view.to_json(), allow_nan=False)
    back = RoutingView.from_json(json.loads(text))
    for field in dataclasses.fields(RoutingView):
        one, other = getattr(view, field.name), getattr(back, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other)
    assert back.specialities == view.specialities and back.categories == view.categories
    assert back.sentence.tokens == view.sentence.tokens
    np.testing.assert_array_equal(back.sentence.gates, view.sentence.gates)
    assert back.to_json() == view.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "samples"}, "is of kind 'samples', expected 'routing'"),
        ({"entropy": [1.0]}, r"entropy has shape \(1,\), expected \(3,\)"),
        ({"load": 1}, "cannot be read"),
        ({"specialities": [{}]}, "cannot be read"),
    ],
)
def test_json_of_something_else(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingView.from_json(seen().to_json() | change)
    with pytest.raises(ValueError, match="lacks load, shared"):
        RoutingView.from_json({"kind": "routing", "tokens": 1})


# Pages.


def headings(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)<", page)


SECTIONS = [
    "Load of heads", "Routing by layer", "A sentence", "What heads specialise in",
    "Kinds of tokens",
]  # fmt: skip


def test_the_page_has_its_figures_and_tables() -> None:
    view = seen()
    page = render(routing_page(view, "A router"))
    assert headings(page) == SECTIONS
    # Loads, entropy, overlap, sentence, kinds. Gates of one are not drawn.
    assert page.count("<svg") == 5 and page.count("<table>") == 3
    assert f"layer 0, head 1: {view.load[0, 1]!s}" in page
    assert "The 3 shared heads are outlined." in page
    assert "token 1 ·cat, head 0.1: 1.0" in page and "token 0 The, head 0.1: 0.0" in page
    assert "“·cat” 4.0" in page or "“·cat” 3.9" in page
    gated = render(routing_page(seen("two_stage"), "A router"))
    assert gated.count("<svg") == 6 and "Mean gate where a head is on" in gated


def test_a_page_of_what_does_not_choose() -> None:
    edits = mixture_of_heads(
        model().config, shared=4, top_k=0, scores="query_norm", gates="straight_through"
    )
    view = looked(edits)
    page = render(add_routing(Report("All"), view, "MoH"))
    assert headings(page) == [f"MoH: {one[0].lower()}{one[1:]}" for one in SECTIONS]
    assert page.count("<svg") == 1  # loads
    assert all(row[3:] == (None, None, 0.0, None, None) for row in layer_rows(view)[1])


def test_of_long_sentences_the_first_tokens_are_drawn() -> None:
    view = seen()
    longer = Sentence(
        view.sentence.tokens * 11,
        np.tile(view.sentence.chosen, (1, 11, 1)),
        np.tile(view.sentence.gates, (1, 11, 1)),
    )
    page = render(routing_page(dataclasses.replace(view, sentence=longer), "A router"))
    assert f"The first {MOST_TOKENS} tokens." in page
    assert "token 59 s" in page and "token 60 The" not in page


def test_images_stand_in_a_row_by_class() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (6, 3, 2))
    svg = image_grid(images, [0, 1, 0, 1, 0, 1], title="Samples")
    assert svg.count("<title>") == 6 * 6
    assert f"1, image 2, pixel 2, 1: {images[5, 2, 1]:.3g}" in svg
    with pytest.raises(ValueError, match="expected 6 classes"):
        image_grid(images, [0], title="Samples")
    with pytest.raises(ValueError, match="50,176 pixels are too many"):
        image_grid(np.zeros((1, 224, 224)), [0], title="Samples")


def image_run(workdir: Path, held_out: dict[str, float], examination: Any) -> Path:
    """The folder of a run on images, as `train` leaves it."""
    claim(workdir, Run(method=Moh(), data=DataSettings(source="images:digits")).to_json())
    variant = {"held_out": held_out, "neighbours": {}, "trained": 5, "heads": None}
    results = {
        "method": "moh", "main": "moh", "variants": {"frozen": variant, "moh": variant},
        "examples": {"train": 20, "held_out": 10}, "seconds": 1.5, "environment": {"jax": "0"},
    }  # fmt: skip
    write_json(workdir / RESULTS, results)
    write_json(workdir / EXAMINATION, examination)
    return workdir


def test_a_run_on_images_and_what_it_made(tmp_path: Path) -> None:
    made = {"kind": "samples", "classes": [0, 1], "images": np.zeros((2, 3, 3, 1)).tolist()}
    metrics = {"loss": 0.5, "frechet_distance": 2.0, "class_accuracy": 0.75}
    page = render(run_page(image_run(tmp_path / "run", metrics, made)))
    assert headings(page) == ["Held-out results", "Samples", "Settings", "Environment"]
    assert "10 images that no variant" in page and "rows of text" not in page
    assert "mean squared error" in page and "share of samples of the class asked for" in page
    page = render(run_page(image_run(tmp_path / "two", {"loss": 1.0, "accuracy": 0.5}, made)))
    assert "nats per image" in page and "share of images" in page


def test_a_run_whose_routing_was_examined(tmp_path: Path) -> None:
    metrics = {"loss": 0.5, "accuracy": 0.5}
    page = render(run_page(image_run(tmp_path / "run", metrics, seen().to_json())))
    assert headings(page) == ["Held-out results", *SECTIONS, "Settings", "Environment"]
    for number, (wrong, message) in enumerate(
        [({"kind": "sampls"}, "Did you mean 'samples'"), ({"kind": "routing"}, "lacks tokens")]
    ):
        folder = image_run(tmp_path / f"wrong{number}", metrics, wrong)
        with pytest.raises(ValueError, match=rf"examination\.json: .*{message}"):
            run_page(folder)


def test_moh_examines_what_it_trained() -> None:
    rows = ArrayRows(text_batch())
    edits, tuned = planted(), model()
    embedding = tuned.params["embed"]["tokens"]
    # Without the embedding of " cat", whatever that of another is, head 0.1 is never chosen.
    swapped = embedding.at[CAT].set(embedding[CAT + 1])
    variant = Tuned(edits=edits, params={"embed": {"tokens": swapped}})
    raw = Moh().examine(model(), words(), TextData(rows, rows), variant)
    assert RoutingView.from_json(raw).load[0, 1] == 0
    raw = Moh().examine(model(), words(), TextData(rows, rows), Tuned(edits=edits))
    assert RoutingView.from_json(raw).load[0, 1] > 0.2


# The command.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, edits, wrong edits, and a text."""
    folder = tmp_path_factory.mktemp("routes")
    jh.save(model(), words(), folder / "model")
    planted().save(folder / "edits.safetensors")
    jh.mask_heads(model().config, [(0, 0)]).save(folder / "mask.safetensors")
    other = tiny_model(**MODEL | {"n_heads": 2}).config
    mixture_of_heads(other, jax.random.key(0), shared=1, top_k=1).save(folder / "other.safetensors")
    (folder / "broken.safetensors").write_text("no edits")
    (folder / "text.txt").write_text("".join(WORDS[i] for i in text_batch().tokens.ravel()))
    return folder


def called(saved: Path, *argv: str) -> int:
    base = {"--edits": "edits.safetensors", "--source": f"text:{saved}/text.txt"}
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    merged = base | {"--split": "all", "--rows": "20", "--length": "32"} | given
    merged["--edits"] = str(saved / merged["--edits"])
    return main(["routes", str(saved / "model"), *(w for pair in merged.items() for w in pair)])


def test_the_command_tells_and_writes(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "a.json"
    assert called(saved, "--text", SENTENCE, "--report", str(page), "--json", str(numbers)) == 0
    told = capsys.readouterr().out
    assert "routing over 640 tokens" in told and "2 of 2 heads that choose" in told
    raw = json.loads(numbers.read_text())
    view = RoutingView.from_json(raw)
    assert raw["settings"]["rows"] == 20 and view.tokens == 640
    assert view.specialities[0].tokens[0].token == " cat"
    assert headings(page.read_text()) == SECTIONS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--edits", "absent.safetensors"], "no edits at"),
        (["--edits", "broken.safetensors"], "is not a readable file of edits"),
        (["--edits", "mask.safetensors"], "expected one Route among the edits of 'z', found 0"),
        (["--edits", "other.safetensors"], "shared has shape (2,) per layer, expected (4,)"),
        (["--text", " "], "--text must be a sentence, got ' '"),
        (["--source", "corpus:python-doc"], "Did you mean 'python-docs'"),
        (["--source", "images:digits"], "holds images, expected text"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--length", "65"], "64"),
        (["--report", "/"], "is a directory"),
    ],
)
def test_the_command_tells_mistakes_in_one_line(
    saved: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(saved, *argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err
