"""Meshes and sharding rules, on paper: no device is needed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiny import tiny_model

import jaxheads as jh
from jaxheads.convert.families import FAMILIES
from jaxheads.convert.schema import read_config
from jaxheads.edits.low_rank import lora
from jaxheads.model.parameters import nest, parameter_table
from jaxheads.sites import CROSS_SITES, SITES
from jaxheads.train.mesh import Mesh, abstract_mesh, check_fit, make_mesh
from jaxheads.train.rules import (
    RULES,
    Rule,
    check_unsharded,
    check_used,
    find_rule,
    parse_rules,
    paths,
    placement,
    shardings,
    spec_of,
    specs,
)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "make_sharding_dumps.py"
FOLDER = ROOT / "tests" / "fixtures" / "sharding"
DUMPS = ("smollm2_full", "smollm2_lofit", "llama3_70b", "llama3_70b_few_kv_heads")


def mesh_of(devices: int = 8, **sizes: int) -> Any:
    return abstract_mesh(Mesh(**sizes), devices)


def shapes(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in sizes.items()}


BIG = mesh_of(16, fsdp=2, sequence=2, tensor=2)


# Meshes.


def test_sizes_of_a_mesh():
    assert Mesh().sizes(8) == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert Mesh(fsdp=-1, data=2, tensor=2).sizes(8)["fsdp"] == 2
    assert Mesh(data=2, fsdp=2, sequence=2, tensor=2).sizes(16)["data"] == 2
    for settings, devices, message in (
        (Mesh(tensor=4, fsdp=4), 8, r"fsdp=4 x tensor=4 needs 16 devices, .* only 8"),
        (Mesh(tensor=3), 8, r"tensor=3 needs a multiple of 3 devices, but there are 8"),
        (Mesh(data=2), 8, r"data=2 uses 2 of 8 devices"),
        (Mesh(data=1), 8, r"1 uses 1 of 8 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            settings.sizes(devices)


def test_settings_that_are_no_mesh():
    with pytest.raises(ValueError, match=r"mesh axis tensor must be at least 1, or -1, got 0"):
        Mesh(tensor=0)
    with pytest.raises(ValueError, match="at most one mesh axis can be -1, got data and fsdp"):
        Mesh(fsdp=-1)
    with pytest.raises(ValueError, match=r"unknown mesh mode 'explict'\. Did you mean 'explicit'"):
        Mesh(mode="explict")


def test_axes_of_size_one_are_left_out():
    assert make_mesh(Mesh(), jax.devices()[:1]) is None
    assert abstract_mesh(Mesh(tensor=1), 1) is None
    mesh = mesh_of(8, data=2, tensor=4)
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}
    assert mesh.axis_types == (AxisType.Explicit,) * 2
    assert mesh_of(8, mode="auto").axis_types == (AxisType.Auto,)


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        ({"fsdp": 4}, {"batch_size": 12}, r"batch size 12 is not a multiple of the 8 .*fsdp=4"),
        ({}, {"batch_size": 32, "accumulate": 8}, r"batch size 32 / accumulate 8 is not a mult"),
        ({}, {"batch_size": 9, "accumulate": 2}, "9 rows cannot be cut into 2 micro-batches"),
        ({"sequence": 8}, {"batch_size": 1, "length": 12}, "rows of 12 tokens .* sequence=8"),
        ({"tensor": 4}, {"batch_size": 2, "n_heads": 6}, "H = 6 heads is not a multiple of tens"),
        ({"tensor": 4}, {"batch_size": 2, "d_mlp": 10}, "F = 10 neurons is not a multiple"),
        ({"tensor": 4}, {"batch_size": 2, "vocab_size": 97}, "V = 97 vocabulary is not"),
        ({"tensor": 4}, {"batch_size": 2, "n_heads": 24, "n_kv_heads": 6}, "K = 6 key/value"),
        ({"fsdp": 8}, {"batch_size": 8, "d_model": 20}, "D = 20 is not a multiple of fsdp=8"),
    ],
)
def test_what_the_mesh_cannot_divide_is_refused(sizes, asked, message):
    shape = {"n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "head_dim": 8, "d_model": 32,
             "d_mlp": 64, "vocab_size": 96, "context_length": 64}  # fmt: skip
    fields = {name: asked.pop(name) for name in list(asked) if name in shape}
    config = jh.ModelConfig(**(shape | fields))
    mesh = mesh_of(8, **sizes)
    with pytest.raises(ValueError, match=message):
        check_fit(mesh, **asked, config=config)
    # The same is accepted without the mesh, or where it divides.
    if "micro-batches" not in message:
        check_fit(None, **asked, config=config)
        check_fit(mesh, batch_size=64, length=16, config=jh.ModelConfig(**shape))


# The table.


@pytest.mark.parametrize("case", families.cases())
def test_every_parameter_of_every_family_has_a_rule(case, tmp_path):
    stored = families.reference(case)
    (tmp_path / "config.json").write_text(json.dumps(stored.config), encoding="utf-8")
    config = config_of(case, tmp_path)
    table = parameter_table(config)
    tree = nest({path: jax.ShapeDtypeStruct(p.shape, "float32") for path, p in table.items()})
    divides = {"H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor", "D": "fsdp"}
    mesh = abstract_mesh(Mesh(data=1, fsdp=1, tensor=1), 1) or mesh_of(2, data=2)
    assert all(not any(spec) for spec in jax.tree.leaves(specs(tree, mesh)))
    for path, parameter in table.items():
        if not parameter.shape:
            continue
        rule = find_rule(path, parameter.shape)
        if rule.axes is None:
            assert parameter.axes in (("L", "D"), ("D",), ("L", "Dh"), ("L", "H", "Dh"),
                                      ("L", "K", "Dh")), path  # fmt: skip
            continue
        assert len(rule.axes) == len(parameter.axes), path
        for letter, over in zip(parameter.axes, rule.axes, strict=True):
            # Vectors of the model width stay whole; all else goes where its letter says.
            small = set(parameter.axes) <= {"L", "D", "X", "Y"} and letter == "D"
            assert over == (None if small else divides.get(letter)), (path, letter)


def config_of(case: str, folder: Path) -> Any:
    from safetensors.numpy import save_file

    from jaxheads.convert.families import find_format
    from jaxheads.convert.safetensors_files import SafetensorsReader

    stored = families.reference(case)
    empty = {name: np.zeros(shape, np.float32) for name, shape in stored.shapes.items()}
    save_file(empty, folder / "model.safetensors")
    with SafetensorsReader(folder) as reader:
        return read_config(find_format("huggingface", reader).schema, reader, "float32")


def test_the_cases_are_of_every_family():
    assert {families.reference(case).family for case in families.cases()} >= set(FAMILIES)


def test_one_rule_serves_parameters_moments_and_averages():
    model = tiny_model(vocab_size=98)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"trainable": model.params, "optimizer": jax.eval_shape(optimizer.init, model.params),
             "average": model.params, "step": jnp.int32(0)}  # fmt: skip
    found = dict(paths(specs(state, BIG)))
    expected = PartitionSpec(None, "fsdp", "tensor", None)
    for path in ("trainable", "optimizer/1/0/mu", "optimizer/1/0/nu", "average"):
        assert found[f"{path}/blocks/attn/q"] == expected
    assert found["optimizer/1/0/count"] == found["step"] == PartitionSpec()
    # The leaves of a `Transformer` end in "/value".
    frozen = jax.tree.leaves(specs(model, BIG))
    assert frozen == jax.tree.leaves(specs(model.params, BIG))


@pytest.mark.parametrize("name", ["adafactor", "lion", "sgd", "accumulating"])
def test_states_of_other_optimizers_have_rules(name):
    optimizer = {
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
        "lion": optax.lion(1e-3),
        "sgd": optax.sgd(1e-3, momentum=0.9),
        "accumulating": optax.MultiSteps(optax.adam(1e-3), 2),
    }[name]
    params = tiny_model(biases=True, vocab_size=98).params
    state = jax.eval_shape(optimizer.init, params)
    assert len(jax.tree.leaves(specs(state, BIG))) == len(jax.tree.leaves(state))


def test_edits_are_divided_as_the_values_at_their_site():
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    rows, heads = ("data", "fsdp"), "tensor"
    for name, shape, expected in (
        ("z/offset", (3, 1, 1, 6, 8), (None, None, None, heads, None)),
        ("z/scale", (3, 1, 1, 6, 1), (None, None, None, heads, None)),
        ("z/value", (3, 4, 5, 6, 8), (None, rows, None, heads, None)),
        ("z/edit/edits/1/offset", (3, 1, 1, 6, 8), (None, None, None, heads, None)),
        ("z/basis", (3, 1, 1, 6, 8, 2), (None, None, None, heads, None, None)),
        ("z/tokens", (1, 4, 5), (None, rows, None)),
        ("encoder.z/scale", (3, 1, 1, 6, 1), (None, None, None, heads, None)),
        ("v/offset", (3, 1, 1, 1, 8), (None,) * 5),
        ("pattern/weight", (3, 1, 6, 1, 1), (None, None, heads, None, None)),
        ("resid_post/offset", (3, 1, 1, 40), (None,) * 4),
        ("neurons/value", (3, 1, 1, 56), (None, None, None, heads)),
        ("logits/offset", (1, 1, 98), (None, None, heads)),
    ):
        for path in (f"trainable/{name}", f"optimizer/0/mu/{name}"):
            assert tuple(spec_of(path, shape, mesh)) == expected, name


def test_a_trainable_that_is_one_array():
    state = {"trainable": jnp.zeros((3, 6)), "optimizer": optax.adam(1e-3).init(jnp.zeros((3, 6)))}
    assert not any(any(spec) for _, spec in paths(specs(state, BIG)))


def test_fewer_key_value_heads_than_devices_stay_whole():
    mesh = mesh_of(8, tensor=4, data=2)
    assert not any(spec_of("attn/k", (3, 40, 2, 8), mesh))
    assert tuple(spec_of("attn/k", (3, 40, 4, 8), mesh))[2] == "tensor"
    assert not any(spec_of("v/offset", (3, 1, 1, 2, 8), mesh))
    with pytest.raises(ValueError, match="dimension 2 of size 6 is not a multiple of tensor=4"):
        spec_of("attn/k", (3, 40, 6, 8), mesh)
    with pytest.raises(ValueError, match=r"attn/q of shape \(3, 40, 2, 8\) cannot be sharded"):
        spec_of("attn/q", (3, 40, 2, 8), mesh)


def test_every_leaf_of_every_kind_of_edit_at_every_site_has_a_rule():
    config = tiny_model(vocab_size=98).config
    whole = jh.Edits.identity(config, *SITES, offset=True) | jh.Edits.identity(config, *SITES)
    sites = ("q_pre", "k_pre", "v", "attn_out", "mlp_out")
    factors = jax.eval_shape(lambda key: lora(config, key, 4, sites=sites), jax.random.key(0))
    gated = (whole | factors).when(np.ones((4, 6), bool))
    for tree in (whole, gated, whole.under("encoder"), factors):
        found = jax.tree.leaves(specs(tree, BIG))
        assert len(found) == len(jax.tree.leaves(tree))
    for name, site in CROSS_SITES.items():
        shape = (3, *(1 if axis in "BTSH" else 8 for axis in site.axes))
        assert len(spec_of(f"trainable/{name}/offset", shape, BIG)) == len(shape)
    up = dict(paths(specs(factors, BIG)))["q_pre/up"]
    assert tuple(up) == (None, None, "tensor", None)
    down = dict(paths(specs(factors, BIG)))
    assert tuple(down["attn_out/down"]) == (None, "tensor", None, None)
    assert not any(down["q_pre/down"])  # edits are not gathered, so never over "fsdp"


# What is refused.


def test_a_leaf_without_a_rule():
    with pytest.raises(ValueError, match=r"no sharding rule for blocks/attn/qq of shape \(2, 4\); "
                                         r"the nearest is '\(attn\|cross\)/q'"):  # fmt: skip
        spec_of("blocks/attn/qq", (2, 4), BIG)
    # A path must end there, and begin at a name.
    for path in ("blocks/attn/q/extra", "blocks/myattn/q", "trainable/zz/scale"):
        with pytest.raises(ValueError, match="no sharding rule"):
            spec_of(path, (2, 4, 4, 4), BIG)
    assert spec_of("anything/count", (), BIG) == PartitionSpec()


def test_a_rule_for_another_rank():
    with pytest.raises(ValueError, match=r"attn/q has shape \(40, 6, 8\).* is for 4 dimensions: "
                                         r"-, fsdp, tensor, -"):  # fmt: skip
        spec_of("blocks/attn/q", (40, 6, 8), BIG)


def test_two_dimensions_on_one_mesh_axis():
    with pytest.raises(ValueError, match="'a' divides two dimensions over the mesh axis 'fsdp'"):
        Rule("a", ("fsdp", ("data", "fsdp")))
    with pytest.raises(ValueError, match="unknown mesh axis in the sharding rule 'a' 'tensr'"):
        Rule("a", ("tensr",))
    with pytest.raises(ValueError, match=r"sharding rule '\(' is no pattern"):
        Rule("(", None)


def test_too_much_left_whole():
    mesh = mesh_of(8, fsdp=4, tensor=2)
    tree = {"attn": shapes(q=(2, 64, 8, 16)), "norm": shapes(scale=(2, 64))}
    check_unsharded(tree, shardings(tree, mesh))  # 512 of 66,048 bytes
    rules = parse_rules({"attn/q": "whole"})
    with pytest.raises(ValueError, match=r"100.0% of 66,048 bytes .*more than 2%; the largest: "
                                         r"attn/q \(65,536 bytes\), norm/scale"):  # fmt: skip
        check_unsharded(tree, shardings(tree, mesh, rules))
    check_unsharded(tree, shardings(tree, mesh, rules), limit=1.0)
    check_unsharded(tree, shardings(tree, mesh_of(8), rules))  # copies are what "data" means


# Rules of one's own.


def test_own_rules_come_first():
    rules = parse_rules({
        "embed/tokens": "-, data+fsdp", "head/.*": "whole", "attn/q": "-, -, tensor?, -"
    })  # fmt: skip
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    assert tuple(spec_of("embed/tokens", (97, 40), mesh, rules)) == (None, ("data", "fsdp"))
    assert not any(spec_of("head/dense", (40, 40), mesh, rules))
    assert tuple(spec_of("attn/q", (3, 40, 1, 8), mesh, rules)) == (None,) * 4
    assert rules[2].small == "whole" and rules[0].small == "error"
    place = placement(mesh, rules)
    assert place("embed/tokens", ("V", "D"), (97, 40)).spec == PartitionSpec(None, ("data", "fsdp"))
    check_used(rules[:1], {"embed": shapes(tokens=(97, 40))})


def test_a_rule_that_decides_nothing():
    tree = {"embed": shapes(tokens=(97, 40))}
    with pytest.raises(ValueError, match="'embed/token' matches nothing; near it: embed/tokens"):
        check_used(parse_rules({"embed/token": "whole"}), tree)
    with pytest.raises(ValueError, match="'embed/tokens' never counts: one before it matches"):
        check_used(parse_rules({"embed/.*": "whole", "embed/tokens": "whole"}), tree)
    with pytest.raises(ValueError, match="unknown mesh axis"):
        parse_rules({"attn/q": "-, heads"})


def test_no_two_default_rules_are_the_same():
    patterns = [rule.pattern for rule in RULES]
    assert len(patterns) == len(set(patterns))


# Golden dumps.


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))["dumps"]()


@pytest.mark.parametrize("name", DUMPS)
def test_golden_dumps(made, name):
    stored = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert made[name] == stored, (
        f"the layout of {name} has changed. If that is meant, run "
        "`python scripts/make_sharding_dumps.py` and read the difference line by line"
    )


def test_every_device_of_a_70b_run_holds_its_share(made):
    assert set(made) == set(DUMPS) == {path.stem for path in FOLDER.iterdir()}
    found = made["llama3_70b"]
    assert found["bytes"] > 12 * 70e9  # parameters and two moments, float32
    assert found["bytes_per_device"] < 1.01 * found["bytes"] / 128
