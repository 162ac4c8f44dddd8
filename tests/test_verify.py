"""The certificate: it passes for what is right, and fails for what is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import families
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxheads.cli import main
from jaxheads.convert.certificate import compare
from jaxheads.convert.load import load_model
from jaxheads.convert.verify import against_self, sample_inputs
from jaxheads.model.models import build

KINDS = ["gpt_neox", "olmo2", "gemma2", "bert", "vit", "t5", "clip_eos"]
"""Every kind of model, with norms in every place, and the parallel block."""

QUICK = ("gemma2", "t5")
"""The others run with the slow tests."""

HF_KINDS = ["opt", "phi3_longrope_long", "roberta", "vit", "bart_scaled", "clip"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a case, written once."""
    root = tmp_path_factory.mktemp("cases")

    def of(case: str) -> Path:
        path = root / case
        return path if path.is_dir() else families.materialise(case, path)

    return of


def corrupted(model: Any, name: str) -> Any:
    """The model with one number of one parameter changed."""

    def change(path: Any, leaf: jax.Array) -> jax.Array:
        where = "/".join(key.key for key in path)
        return leaf.at[(0,) * leaf.ndim].add(1.0) if where == name else leaf

    return build(model.config, jax.tree_util.tree_map_with_path(change, model.params))


def failed(rows: Any) -> set[str]:
    return {row.value for row in rows if not row.passed}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in KINDS]
)
def test_a_model_agrees_with_itself(case: str, folder: Any) -> None:
    model = load_model(folder(case))
    rows = against_self(model, sample_inputs(model))
    assert not failed(rows)
    checks = {row.check for row in rows}
    assert {"dense", "heads"} <= checks
    assert ("cache" in checks) == (case in KINDS[:3])
    assert ("pad left" in checks) == (case != "vit")
    values = {row.value for row in rows}
    assert {"cross.resid_pre", "encoder.resid_mid"} <= values or case != "t5"
    assert {"text.pooled", "vision.pooled"} <= values or case != "clip_eos"
    # Errors that are exactly zero everywhere would be of a thing compared with itself.
    assert all(row.max_error > 0 for row in rows if row.check == "heads")
    assert all(row.tokens > 1 for row in rows if row.value.endswith(("post", "mid")))


def test_a_reduced_dtype_is_compared_with_float32(folder: Any) -> None:
    exact, model = (load_model(folder("bert"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    inputs = sample_inputs(model)
    rows = [r for r in against_self(model, inputs, exact) if r.check == "float32"]
    assert [row.value for row in rows] == ["resid_post", "logits"] and not failed(rows)
    assert 1e-3 < rows[1].max_error < 0.2 and 0 < rows[1].kl < 0.05 and rows[1].top1 > 0.9
    other = corrupted(exact, "embed/norm/bias")
    rows = [r for r in against_self(model, inputs, other) if r.check == "float32"]
    assert failed(rows)


def test_the_check_of_heads_sees_a_lost_head(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head lost in one of two ways shows where the two are compared, and nowhere else."""
    from jaxheads.model import attention

    model, whole = load_model(folder("gpt_neox")), attention.merge_heads

    def less(value: jax.Array, other: jax.Array) -> jax.Array:
        return whole(value.at[:, :, 0].set(0), other)

    monkeypatch.setattr(attention, "merge_heads", less)
    jax.clear_caches()
    rows = against_self(model, sample_inputs(model))
    monkeypatch.undo()
    jax.clear_caches()
    assert {row.check for row in rows if not row.passed} == {"heads"}


def test_errors_are_relative_and_divergence_is_in_nats() -> None:
    reference = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    found = np.log(np.array([[[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]]))
    values = ({"logits": reference}, {"logits": found})
    (row,) = compare("x", *values, "float32")
    error = np.linalg.norm(found[0, 0] - reference[0, 0]) / np.linalg.norm(reference[0, 0])
    assert row.max_error == pytest.approx(error) and row.mean_error == pytest.approx(error / 2)
    assert row.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert row.top1 == 0.5 and row.tokens == 2 and not row.passed
    (row,) = compare("x", *values, "float32", np.array([[False, True]]))
    assert row.tokens == 1 and row.max_error == 0 and row.passed
    (row,) = compare("x", values[0], {"logits": np.full((1, 2, 3), np.nan)}, "float32")
    assert not row.passed and row.to_dict()["max_error"] == "nan"
    with pytest.raises(ValueError, match=r"x: logits is \(1, 1, 3\), expected \(1, 2, 3\)"):
        list(compare("x", values[0], {"logits": found[:, :1]}, "float32"))


def test_the_command_prints_and_saves_it(
    folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "certificate.json"
    assert main(["load", str(folder("vit")), "--verify", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "image classifier" in out and "all within tolerance" in out
    saved = json.loads(path.read_text())
    assert saved["passed"] and saved["against"] == "self" and saved["rows"][0]["passed"]
    assert "perplexity" not in out


def test_a_damaged_weight_ends_with_code_1_and_saves_nothing(
    folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(folder("vit") / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layernorm.weight"))
    tensors[name][0] = np.nan
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text((folder("vit") / "config.json").read_text())
    report, copy = tmp_path / "report.json", tmp_path / "copy"
    argv = ["load", str(broken), "--verify", "--json", str(report), "--save", str(copy)]
    assert main(argv) == 1
    assert "comparisons failed" in capsys.readouterr().out
    assert not json.loads(report.read_text())["passed"] and not copy.exists()


@pytest.mark.parametrize(
    ("case", "kind"),
    [("bert", "masked language model"), ("vit", "image classifier"), ("t5", "encoder-decoder")],
)
def test_commands_refuse_models_that_they_cannot_use(
    case: str, kind: str, folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder(case)), "a"]) == 2
    said = capsys.readouterr().err
    assert f"needs a causal language model, got kind '{kind}'" in said


def test_options_of_the_certificate_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "no-model", "--against", "self"]) == 2
    assert "--against is for --verify" in capsys.readouterr().err


def test_without_torch_the_command_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["load", "no-model", "--verify", "--against", "hf"]) == 2
    assert "pip install torch" in capsys.readouterr().err


@pytest.mark.peers
@pytest.mark.parametrize("case", HF_KINDS)
def test_a_model_agrees_with_transformers(case: str, folder: Any) -> None:
    from jaxheads.convert.verify_hf import against_hf

    model = load_model(folder(case))
    rows = against_hf(model, folder(case), sample_inputs(model))
    assert not failed(rows)
    stacks = {"bart_scaled": ("", "encoder."), "clip": ("text.", "vision.")}.get(case, ("",))
    end = "pooled" if case == "clip" else "logits"
    expected = {f"{p}{site}" for p in stacks for site in ("resid_pre", "resid_post")}
    assert expected <= {row.value for row in rows}
    assert any(row.value.endswith(end) for row in rows)


@pytest.mark.peers
def test_one_changed_weight_differs_from_transformers(folder: Any) -> None:
    from jaxheads.convert.verify_hf import against_hf

    model = corrupted(load_model(folder("opt")), "blocks/mlp/down_bias")
    rows = against_hf(model, folder("opt"), sample_inputs(model))
    assert failed(rows) == {"resid_pre", "resid_post", "logits"}


@pytest.mark.peers
def test_the_command_compares_with_transformers(
    folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hf.json"
    argv = ["load", str(folder("opt")), "--verify", "--against", "hf", "--json", str(path)]
    assert main(argv) == 0
    assert "against hf" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][-1]["kl"] < 1e-9
