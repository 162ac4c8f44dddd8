"""A vision transformer on digits: its loss, its routing, its measurement and a whole run."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close
from train_runs import Inputs, here, losses, train
from train_runs import close as same

import jaxheads as jh
from jaxheads.data import open_source
from jaxheads.methods.data import DataSettings, encode_splits, open_splits
from jaxheads.methods.image_classes import ImageClasses
from jaxheads.methods.image_loss import Setup, image_loss, random_shifts
from jaxheads.methods.image_shape import Shape
from jaxheads.methods.method import ImageData, Tuned
from jaxheads.methods.moh import Routed
from jaxheads.methods.variants import split_variant
from jaxheads.routing import RoutingPenalty
from jaxheads.train.fit import Fit
from jaxheads.train.job import Job
from jaxheads.train.optimizer import Optimizer

SHAPE = Shape(n_layers=2, n_heads=6, d_model=24, d_mlp=32, patch=4)
FIT = Fit(steps=15, batch_size=32, optimizer=Optimizer(learning_rate=1e-2))
METHOD = ImageClasses(
    shape=SHAPE,
    routing=Routed(shares=(0.75,), shared=0.34, whole_layers=1),
    controls=False,
    fit=FIT,
)


def digits(limit: int = 64) -> ImageData:
    settings = DataSettings(source="images:digits", limit=limit)
    data = encode_splits(settings, open_splits(settings, seed=0), None)
    assert isinstance(data, ImageData)
    return data


def new_model() -> jh.Transformer:
    return METHOD.create(open_source("images:digits", "train"), seed=0)[0]


def item(count: int = 5):
    return digits().train[np.arange(count)]


def loss_of(model, route=None, penalty=None, of=None):
    edits = None if route is None else jh.Edits(z=route)
    trainable, fixed = split_variant(model.params, edits, Setup(model.config), penalty)
    return jax.jit(image_loss)(trainable, fixed, item() if of is None else of, None)


def new_route(routing=METHOD.routing) -> jh.Route:
    return routing.route(new_model().config, routing.shares[0], jax.random.key(1))


def test_the_model_is_a_bidirectional_vit():
    model = new_model()
    config = model.config
    # A class token and four patches of 4 x 4 pixels.
    assert config.context_length == 5 and config.vocab_size == 10 and not config.causal
    output = model(item()[0], taps=("pattern", "z"))
    assert output.logits.shape == (5, 1, 10) and output.taps["z"].shape == (2, 5, 5, 6, 4)
    # Every token sees every token.
    assert (np.asarray(output.taps["pattern"]) > 0).all()


def test_the_loss_is_the_cross_entropy_of_the_class_token():
    model, (images, labels) = new_model(), item()
    loss, metrics = loss_of(model)
    logits = np.asarray(model(images).logits[:, 0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    close(loss, -logs[np.arange(5), labels].mean(), 1e-6)
    assert metrics["weight"] == 5
    close(metrics["accuracy"], (logits.argmax(axis=1) == labels).mean(), 1e-6)


def test_all_heads_with_gates_of_one_are_bit_equal_to_the_dense_model():
    model, images = new_model(), item()[0]
    route = new_route(Routed(shares=(1.0,), gates="straight_through"))
    assert (route.top_k > 0).all()
    routed = model(images, edits=jh.Edits(z=route)).logits
    np.testing.assert_array_equal(routed, model(images).logits)
    fewer = jh.Edits(z=new_route())
    assert np.abs(model(images, edits=fewer).logits - routed).max() > 1e-3


def test_the_penalty_is_added_and_the_gates_teach_the_router():
    model = new_model()
    route = new_route()
    loss, metrics = loss_of(model, route, RoutingPenalty(balance=0.5))
    close(loss, metrics["task_loss"] + 0.5 * metrics["balance"], 1e-6)

    def without_penalty(router):
        edits = jh.Edits(z=route.replace(router=router))
        trainable, fixed = split_variant(model.params, edits, Setup(model.config), None)
        return image_loss(trainable, fixed, item(), None)[0]

    plain, gradient = jax.jit(jax.value_and_grad(without_penalty))(route.router)
    close(metrics["task_loss"], plain, 1e-6)
    # The first layer keeps all its heads.
    assert np.abs(gradient[1]).max() > 1e-6 and not gradient[0].any()


@pytest.mark.slow
def test_training_lowers_the_loss():
    model, data = new_model(), digits()
    sides = dataclasses.replace(data, held_out=data.train)
    method = dataclasses.replace(METHOD, controls=True)
    tuned = method.train(Job(), model, None, data)["dense"]
    losses = [METHOD.measure(Job(), model, sides, one)["loss"] for one in (Tuned(), tuned)]
    assert losses[1] < 0.7 * losses[0]
    assert tuned.edits is None
    assert tuned.trained == sum(leaf.size for leaf in jax.tree.leaves(model.params))


def test_measuring_is_a_direct_computation():
    model, data = new_model(), digits()
    route = new_route()
    changed = jax.tree.map(lambda leaf: 1.5 * leaf, model.params)
    tuned = Tuned(edits=jh.Edits(z=route), params=changed)
    # In parts of 25, the last of which is not full.
    found = METHOD.measure(Job(), model, data, tuned, batch_size=25)
    images, labels = data.held_out[np.arange(64)]
    output = jh.Transformer(model.config, changed)(images, edits=jh.Edits(z=route))
    logits = np.asarray(output.logits[:, 0], np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(64), labels]
    close(found["loss"], losses.mean(), 1e-5)
    close(found["accuracy"], (logits.argmax(axis=1) == labels).mean(), 1e-6)


@pytest.mark.slow
def test_variants_share_the_start_and_differ_in_routing_only():
    """One step from the same parameters: with all heads on, the dense model's own step."""
    model, data = new_model(), digits()
    routing = Routed(shares=(1.0,), gates="straight_through", balance=0.0, whole_layers=2)
    fit = Fit(steps=1, batch_size=32, optimizer=Optimizer(name="sgd", learning_rate=0.1))
    method = dataclasses.replace(METHOD, routing=routing, controls=True, shift=1, fit=fit)
    tuned = method.train(Job(), model, None, data)
    assert [*tuned] == ["moh 1", "random 1", "dense"]
    for name in ("dense", "random 1"):
        jax.tree.map(lambda a, b: close(a, b, 1e-6), tuned[name].params, tuned["moh 1"].params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": Routed(whole_layers=3)}, r"whole_layers must lie in 0\.\.2, got 3"),
        ({"routing": Routed(whole_layers=2)}, "leaves 0 heads for the 0 others"),
        (
            {"routing": Routed(shares=(0.5,), whole_layers=1)},
            "share 0.5 of 2 layers of 6 heads, .* leaves 0 heads",
        ),
        ({"shift": -1}, "shift must be at least 0 pixels, got -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(METHOD, **settings)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model 16 is not divisible by n_heads 3"):
        Shape(n_heads=3, d_model=16)
    with pytest.raises(ValueError, match="not cut evenly into patches of 3"):
        dataclasses.replace(METHOD, shape=dataclasses.replace(SHAPE, patch=3)).create(
            open_source("images:digits", "train"), seed=0
        )


def test_images_are_shifted_whole_by_what_is_drawn():
    images = jnp.arange(1.0, 1 + 40 * 4 * 5).reshape(40, 4, 5, 1)
    moved = np.asarray(random_shifts(images, jax.random.key(0), 1))
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-1.0)
    found = set()
    for row in range(40):
        places = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if np.array_equal(moved[row], padded[row, y : y + 4, x : x + 5])
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) == 9
    np.testing.assert_array_equal(random_shifts(images, jax.random.key(0), 0), images)


CONFIG = """
[data]
source = "images:digits"
limit = 48
[method]
name = "image_classes"
controls = false
shape = { n_layers = 2, n_heads = 6, d_model = 24, d_mlp = 32, patch = 4 }
routing = { shares = [0.75], shared = 0.34, whole_layers = 1 }
[method.fit]
steps = 2
batch_size = 16
[method.fit.optimizer]
learning_rate = 1e-2
[runlocal]
method.fit.steps = 1
"""


@pytest.mark.slow
def test_a_whole_run_by_the_command(tmp_path, capsys):
    config, workdir = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(CONFIG)
    assert here("--runlocal", config=config, workdir=workdir) == 0
    assert "image_classes: 48 examples, 48 held out" in capsys.readouterr().out
    found = json.loads((workdir / "results.json").read_text())
    assert found["main"] == "moh 0.75" and [*found["variants"]] == ["frozen", "moh 0.75"]
    for row in found["variants"].values():
        assert set(row["held_out"]) == {"loss", "accuracy"}
    # What was saved is what was measured.
    model = jh.load_model(workdir / "model")
    tuned = Tuned(edits=jh.Edits.load(workdir / "edits.safetensors"))
    settings = DataSettings(source="images:digits", limit=48)
    data = encode_splits(settings, open_splits(settings, seed=0), None)
    again = METHOD.measure(Job(), model, data, tuned)
    assert again == found["variants"]["moh 0.75"]["held_out"]


@pytest.mark.slow
def test_two_devices_train_as_one_does(tmp_path):
    config, folders = tmp_path / "config.toml", (tmp_path / "one", tmp_path / "two")
    config.write_text(CONFIG)
    train(config=config, workdir=folders[0])
    train(config=config, workdir=folders[1], devices=2)
    same(losses(folders[1]), losses(folders[0]))


REFUSED = [
    (("--data.source", "images:digit"), "unknown set of images 'digit'"),
    (("--data.options", "held_out", "half"), "held_out must lie strictly between 0 and 1"),
    (("--data.source", "task:counterfactual_capitals"), "prompts with answers, expected images"),
    (("--data.source", "corpus:python-docs"), "holds texts, expected images"),
    (("--method.routing.whole-layers", 2), "leaves 0 heads"),
    (("--method.shape.patch", 3), "not cut evenly into patches of 3"),
    (("--method.fit.batch-size", 64), "batch_size must lie in 1..48"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED)
def test_what_does_not_fit_is_told_in_one_line_and_leaves_nothing(tmp_path, capsys, argv, message):
    (tmp_path / "config.toml").write_text(CONFIG)
    assert here(*argv, config=tmp_path / "config.toml", workdir=tmp_path / "run") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told, told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["source", "neighbours"])
def test_images_are_refused_by_a_method_of_language_models(tmp_path, capsys, where):
    inputs = Inputs(tmp_path)
    images = {
        "source": 'source = "images:digits"',
        "neighbours": 'source = "corpus:python-docs"',
    }[where]
    text = f'model = "absent"\nneighbours = {["images:digits"] * (where == "neighbours")}\n'
    text += f'[data]\n{images}\n[method]\nname = "lora"\n'
    config = inputs.folder / "config.toml"
    config.write_text(text)
    assert here(config=config, workdir=tmp_path / "run") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "images:digits (train) holds images, expected texts" in lines[0]
    assert "'lora' changes a language model" in lines[0]
