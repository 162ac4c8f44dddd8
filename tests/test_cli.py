"""The `jaxheads` command, on a tiny random model saved as a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

import jaxheads as jh
from jaxheads.cli import main
from jaxheads.cli.app import COMMANDS
from jaxheads.cli.options import parse_heads
from jaxheads.convert import NAMED_MODELS
from jaxheads.edits import Affine
from jaxheads.methods.head_scores import SCORES
from jaxheads.text import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMALL_RUN = """
model = "{model}"
[data]
options = {{ count = 24 }}
[method]
name = "lofit"
heads = 2
controls = 1
[method.importance]
steps = 3
batch_size = 4
optimizer = {{ learning_rate = 5e-3, schedule = "linear" }}
[method.offsets]
steps = 5
batch_size = 4
optimizer = {{ learning_rate = 1e-2, schedule = "linear" }}
[loop]
checkpoint_every = 2
[runlocal]
method.offsets.steps = 2
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers of four heads, whose tokens are bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    template = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    config = jh.ModelConfig(
        n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_model=24, d_mlp=32,
        vocab_size=len(vocabulary), context_length=1024,
    )  # fmt: skip
    model = jh.Transformer.random(config, jax.random.key(0))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return jh.save(model, Tokenizer(backend, roles, template), folder)


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "run.toml"
    config.write_text(SMALL_RUN.format(model=tiny))
    assert main(["train", "--config", str(config), "--workdir", str(folder / "run")]) == 0
    return config, folder / "run"


def shell(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxheads.cli", *argv]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of an error."""
    code = main(argv)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def done(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command that succeeds prints."""
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


# The shell.


def test_help_names_every_command() -> None:
    run = shell("--help")
    assert run.returncode == 0
    assert all(name in run.stdout for name in COMMANDS)


def test_help_does_not_import_jax() -> None:
    # The package's own __init__ is left out: what is asked is whether the command needs it.
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('jaxheads'); package.__path__ = ['jaxheads']\n"
        "sys.modules['jaxheads'] = package\n"
        "from jaxheads.cli import main\n"
        "codes = [main([])] + [main([name, '--help']) for name in sys.argv[1:]]\n"
        "assert codes == [2] + [0] * (len(codes) - 1), codes\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    light = [name for name in COMMANDS if name != "train"]  # Its help shows the schema.
    run = subprocess.run(
        [sys.executable, "-c", code, *light], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Example: jaxheads") == len(light)


def test_an_unknown_command_is_one_line() -> None:
    run = shell("trian")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: unknown command 'trian'. Did you mean 'train'")
    assert run.stderr.count("\n") == 1


def test_a_mistyped_flag_names_the_nearest(tiny: Path) -> None:
    run = shell("heads", str(tiny), "--scroe", "induction")
    assert run.returncode == 2
    assert "--scroe" in run.stderr and "--score" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_unknown_model_is_one_line() -> None:
    run = shell("load", "smollm2-135m")
    assert (run.returncode, run.stdout) == (2, "")
    assert "Did you mean 'smollm2-135m-instruct'" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m jaxheads.cli --help | true"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in run.stderr


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxheads.cli import report

    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "main", interrupted)
    assert main(["report"]) == 130


# Mistakes, told in one line before any long work.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "{tiny}", ""], "the prompt is empty"),
        (["generate", "{tiny}", "a", "--mask", "3.0"], "head 3.0 is out of range"),
        (["generate", "{tiny}", "a", "--mask", "18"], "'18' is not LAYER.HEAD"),
        (["generate", "{tiny}", "a", "--mask", "1.1,1.1"], "named twice"),
        (["generate", "{tiny}", "a", "--compare"], "give --edits or --mask"),
        (["generate", "{tiny}", "a", "--edits", "absent.st"], "no edits at absent.st"),
        (["generate", "{tiny}", "a", "--edits", "{tiny}/jaxheads.json"], "not a readable"),
        (["generate", "{tiny}", "a", "--temperature", "-1"], "temperature must be 0 or more"),
        (["generate", "{tiny}", "a", "--max-new-tokens", "9999"], "exceed the model's context"),
        (["eval", "{tiny}", "--task", "iio"], "Did you mean 'ioi'"),
        (["eval", "{tiny}", "--task", "ioi", "--option", "x"], "is not KEY=VALUE"),
        (["eval", "{tiny}", "--task", "lookup", "--option", "kid=3"], "unknown option of task"),
        (["eval", "{tiny}", "--task", "ioi", "--json", "{file}/a.json"], "cannot write"),
        (["heads", "no-model", "--score", "sinks"], "unknown score 'sinks'. Did you mean 'sink'"),
        (["heads", "no-model", "--text", "absent.txt"], "absent.txt: No such file"),
        (["heads", "no-model", "--csv", "{file}/a.csv"], "cannot write"),
        (["heads", "{tiny}", "--count", "0"], "--count must be at least 1"),
        (["heads", "{tiny}", "--report", "{file}/a.html"], "cannot write"),
        (["load", "{tiny}", "--save", "{file}/a"], "cannot write to"),
        (["load", "{tiny}", "--save", "{tiny}"], "is not empty"),
        (["export", "{tiny}", "{file}"], "is a file"),
        (["report", "{tiny}"], "holds no training run"),
        (["train", "--config", "absent.toml", "--workdir", "{file}"], "no config at absent.toml"),
    ],
)
def test_mistakes(
    argv: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert message in told(capsys, *(word.format(tiny=tiny, file=file) for word in argv))


def test_targets_are_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    full = str(tmp_path / "full")
    # No such model: an error about the folder can only come from before.
    for argv in (["load", "no-model", "--save", full], ["export", "no-model", full]):
        assert "is not empty" in told(capsys, *argv)
    json_in_file = str(tmp_path / "full" / "x" / "a.json")
    assert "cannot write" in told(capsys, "heads", "no-model", "--json", json_in_file)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "x"]


def test_edits_of_another_model_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edits.safetensors"
    jh.Edits(z=Affine(scale=np.ones((5, 1, 1, 4, 1), np.float32))).save(path)
    message = told(capsys, "generate", str(tiny), "a", "--edits", str(path))
    assert f"{path} does not fit this model" in message


# Commands.


def test_load_describes_and_saves(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = done(capsys, "load", str(tiny), "--dtype", "bfloat16", "--save", str(tmp_path / "copy"))
    model, tokenizer = jh.load(tmp_path / "copy")
    assert model.config.dtype == "bfloat16"
    leaves = jax.tree.leaves(model.params)
    assert f"{sum(leaf.size for leaf in leaves):,}" in out
    assert tokenizer.encode("abc") == jh.load(tiny)[1].encode("abc")
    # 258 tokens and random weights: about as unsure as can be.
    perplexity = float(out.partition("perplexity ")[2].split()[0])
    assert 150 < perplexity < 600


def test_the_sample_and_its_reference_are_those_of_the_fixture(fixtures_dir: Path) -> None:
    sample = (ROOT / "jaxheads" / "text" / "sample.txt").read_text()
    assert sample == (fixtures_dir / "text" / "short.txt").read_text()
    recorded = json.loads((fixtures_dir / "smollm2_reference.json").read_text())["perplexity"]
    named = NAMED_MODELS["smollm2-135m-instruct"].perplexity
    assert named == pytest.approx(recorded["text/short.txt"], rel=1e-5)


def test_heads_saves_every_score(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "new" / "a.json", tmp_path / "a.csv", tmp_path / "a.html"]
    out = done(
        capsys, "heads", str(tiny), "--score", "all", "--count", "2", "--top", "3",
        "--json", str(files[0]), "--csv", str(files[1]), "--report", str(files[2]),
    )  # fmt: skip
    saved = json.loads(files[0].read_text())
    assert list(saved["scores"]) == list(SCORES)
    assert (saved["count"], saved["axes"]) == (2, ["layer", "head"])
    heading, *lines = [line.split(",") for line in files[1].read_text().splitlines()]
    assert heading == ["layer", "head", *SCORES] and len(lines) == 12
    table = np.array(lines, float)
    for column, (name, found) in enumerate(saved["scores"].items(), start=2):
        values = np.asarray(found["values"])
        assert values.shape == (3, 4) and found["unit"] == SCORES[name].unit
        np.testing.assert_array_equal(table[:, column], values.ravel())
        part = out.partition(f"{name}: {SCORES[name].meaning}")[2]
        layer, head = np.unravel_index(values.argmax(), values.shape)
        assert f"{layer}.{head}" in part.splitlines()[4]
    page = files[2].read_text()
    assert page.count("<svg") == len(SCORES)
    assert page.count("stroke: #000000; stroke-width: 1.8") == 3 * len(SCORES)


def test_heads_reads_text_from_a_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    found = []
    for words in ("one text", "two words"):
        path.write_text(words)
        argv = ["heads", str(tiny), "--score", "sink", "distance", "--text", str(path)]
        done(capsys, *argv, "--json", str(tmp_path / "a.json"))
        found.append(json.loads((tmp_path / "a.json").read_text())["scores"])
    assert [f["sink"]["info"]["queries"] for f in found] == [8, 9]
    assert found[0]["sink"]["values"] != found[1]["sink"]["values"]


def test_eval_sets_edited_beside_unedited(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    argv = ["eval", str(tiny), "--task", "counterfactual_capitals", "--count", "6",
            "--option", "kind=two_hop", "--mask", "0.0,0.1,0.2,0.3,1.1", "--how", "zero",
            "--json", str(path)]  # fmt: skip
    out = done(capsys, *argv)
    saved = json.loads(path.read_text())
    results = saved["results"]
    assert set(results) == {"unedited", "edited"}
    assert results["unedited"]["loss"] != results["edited"]["loss"]
    assert f"{results['edited']['loss']:.4f}" in out
    assert saved["options"] == {"kind": "two_hop"}


def test_generate_is_the_library_with_a_shell(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = jh.load(tiny)
    edits = jh.mask_heads(model.config, [(0, 1), (2, 3)], "zero")

    def text(prompt: str, edits: jh.Edits | None) -> str:
        out = jh.generate(
            model, tokenizer(prompt), max_new_tokens=5, edits=edits, stop=[tokenizer.eos_id]
        )
        return tokenizer.decode(out.rows()[0], skip_special=True)

    argv = ["generate", str(tiny), "Hello", "--max-new-tokens", "5"]
    assert done(capsys, *argv) == text("Hello", None) + "\n"
    masked = [*argv, "--mask", "0.1,2.3", "--how", "zero"]
    assert done(capsys, *masked) == text("Hello", edits) + "\n"
    both = done(capsys, *masked, "--compare")
    assert f"[unedited]{text('Hello', None)}\n" in both
    assert f"[edited]{text('Hello', edits)}\n" in both
    assert done(capsys, *argv, "--chat") == text("<s>user:Hello</s>", None) + "\n"
    hot = [*argv, "--temperature", "2"]
    draws = [done(capsys, *hot, "--seed", str(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_export_folds_what_folds_and_keeps_the_rest(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = jh.load(tiny)
    c = model.config
    rng = np.random.default_rng(0)
    offsets = jh.offset_heads(c, rng.normal(size=(3, 4, 8)))
    edits = offsets | jh.attend_to(c, [(1, 2)], "first") | jh.mask_heads(c, [(2, 1)], "uniform")
    edits.save(tmp_path / "edits.safetensors")
    out_dir = tmp_path / "out"
    out = done(
        capsys, "export", str(tiny), str(out_dir), "--edits", str(tmp_path / "edits.safetensors")
    )
    assert "not folded" in out and "pattern" in out
    exported, exported_tokenizer = jh.load(out_dir)
    rest = jh.Edits.load(out_dir / "edits.safetensors")
    assert list(rest) == ["pattern"]
    assert "`pattern`" in (out_dir / "README.md").read_text()
    batch = tokenizer("What is exported computes the same.")
    wanted = model(batch, edits=edits).logits
    found = exported(exported_tokenizer("What is exported computes the same."), edits=rest).logits
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(np.asarray(exported(batch).logits - wanted)).max() > 1e-2


def test_export_keeps_together_what_depends_on_each_other(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = jh.load(tiny)
    c = model.config
    scale = np.linspace(0, 2, 12, dtype=np.float32).reshape(3, 1, 1, 4, 1)
    offsets = jh.offset_heads(c, np.random.default_rng(0).normal(size=(3, 4, 8)))
    batch = tokenizer("some text")
    for name, edits, kept in (
        ("folds", jh.Edits(head_out=Affine(scale=scale)), []),
        ("gated", jh.Edits(head_out=Affine(scale=scale)).when("prefill"), ["head_out", "z"]),
    ):
        edits = offsets | edits
        edits.save(tmp_path / name)
        done(capsys, "export", str(tiny), str(tmp_path / f"{name}-out"), "--edits",
             str(tmp_path / name))  # fmt: skip
        exported, _ = jh.load(tmp_path / f"{name}-out")
        beside = tmp_path / f"{name}-out" / "edits.safetensors"
        rest = jh.Edits.load(beside) if beside.exists() else jh.Edits()
        assert sorted(rest) == kept
        found, wanted = exported(batch, edits=rest), model(batch, edits=edits)
        np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)


# Training.


def test_train_writes_its_folder(trained: tuple[Path, Path], tiny: Path) -> None:
    _, folder = trained
    variants = json.loads((folder / "results.json").read_text())["variants"]
    assert list(variants) == ["frozen", "lofit", "random 1"]
    chosen = variants["lofit"]["heads"]
    assert not {tuple(h) for h in chosen} & {tuple(h) for h in variants["random 1"]["heads"]}
    values = np.asarray(json.loads((folder / "scores.json").read_text())["values"])
    best = np.unravel_index(np.argsort(-values, axis=None)[:2], values.shape)
    assert chosen == np.stack(best, 1).tolist()
    steps = {"importance": 3, "lofit": 5, "random 1": 5}
    assert [(row["stage"], row["step"]) for row in logged(folder)] == [
        (stage, step + 1) for stage, count in steps.items() for step in range(count)
    ]
    offset = np.asarray(jh.Edits.load(folder / "edits.safetensors")["z"].offset)[:, 0, 0]
    moved = np.argwhere(np.abs(offset).max(-1) > 0).tolist()
    assert sorted(moved) == sorted(chosen)


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def test_train_again_only_shows_the_results(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    out = done(capsys, "train", "--config", str(config), "--workdir", str(folder))
    assert "complete" in out and "random 1" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_train_goes_on_from_the_checkpoint_and_ends_the_same(
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jaxheads.train.workdir import MetricsLog

    config, folder = trained
    append = MetricsLog.append

    def killed(self: MetricsLog, stage: str, step: int, metrics: dict[str, float]) -> None:
        append(self, stage, step, metrics)
        if (stage, step) == ("lofit", 3):
            raise KeyboardInterrupt

    argv = ["train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "append", killed)
        assert main(argv) == 130
    capsys.readouterr()
    assert not (tmp_path / "run" / "results.json").exists()
    assert "report in" in done(capsys, "report", str(tmp_path / "run"))
    assert "not complete" in (tmp_path / "run" / "report.html").read_text()
    done(capsys, *argv)
    for name in ("scores.json", "edits.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name
    assert logged(tmp_path / "run") == logged(folder)
    there, here = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", folder))
    assert there["variants"] == here["variants"]


def test_train_names_a_mistyped_key_and_flag(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('[method]\nname = "lofit"\n[method.offsets]\nbatch_siz = 1\n')
    run = shell("train", "--config", str(bad), "--workdir", str(tmp_path / "run"))
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert f"error: {bad}: unknown key 'method.offsets.batch_siz'" in run.stderr
    assert "Did you mean 'method.offsets.batch_size'" in run.stderr
    argv = ["train", "--config", str(trained[0]), "--workdir", str(tmp_path / "run")]
    assert main([*argv, "--method.offsets.batch-siz", "1"]) == 2
    assert "--method.offsets.batch-size" in capsys.readouterr().err
    many = told(capsys, *argv, "--method.heads", "9")
    assert "heads 9" in many and "12 heads" in many
    # What was wrong leaves no folder that would refuse what is right.
    assert not (tmp_path / "run").exists()
    assert "cannot write" in told(capsys, *argv[:-1], f"{bad}/run")


def test_report_of_a_run(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained[1]
    done(capsys, "report", str(folder))
    page = (folder / "report.html").read_text()
    # Loss, token accuracy and exact match; scores; loss and speed while training.
    assert page.count("<svg") == 6
    results = json.loads((folder / "results.json").read_text())
    assert ", ".join(f"{a}.{b}" for a, b in results["variants"]["lofit"]["heads"]) in page
    assert "not complete" not in page
    (folder / "report.html").unlink()


def test_heads_on_the_command_line() -> None:
    assert parse_heads("18.6, 17.3") == [(18, 6), (17, 3)]
