"""`jaxheads cache`, on a tiny random model whose tokens are bytes."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
import tokenizers

import jaxheads as jh
from jaxheads.cli import main
from jaxheads.text import Tokenizer

SMALL = ("--length", "96", "--task", "copy", "--count", "2", "--sinks", "2", "--recent", "6")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers of four heads and one key/value head each."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    config = jh.ModelConfig(
        n_layers=3, n_heads=4, n_kv_heads=1, head_dim=8, d_model=24, d_mlp=32,
        vocab_size=len(vocabulary), context_length=512,
    )  # fmt: skip
    model = jh.Transformer.random(config, jax.random.key(0))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return jh.save(model, Tokenizer(backend, {"bos_token": "<s>"}, None), folder)


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of an error."""
    code = main(["cache", *argv])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_comparison(tiny, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    scores.write_text("[[0], [1], [0]]")
    files = {name: tmp_path / f"out/cache.{name}" for name in ("json", "html")}
    argv = [
        *("cache", str(tiny), *SMALL, "--method", "duo", "--budget", "0.5"),
        *("--scores", f"duo={scores}", "--bits", "8"),
        *("--json", str(files["json"]), "--report", str(files["html"])),
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    for text in ("copy: 2 contexts of 96 tokens", "KV MiB", "duo", "random worst"):
        assert text in out
    found = json.loads(files["json"].read_text())
    names = [run["name"] for run in found["runs"]]
    assert names == ["full", "duo", *["random"] * 5]
    assert found["runs"][0]["share"] == 1
    # One of three heads is full, and what is kept has 8 bits.
    assert found["runs"][1]["share"] == pytest.approx((128 + 2 * 8) / (3 * 128) * 12 / 32)
    assert found["scores"] == {"duo": [[0], [1], [0]]}
    assert found["plan"]["options"]["bits"] == 8
    page = files["html"].read_text()
    assert "Quality against bytes" in page and "copy by length and depth" in page
    assert "1 of 3 key/value heads are full" in page

    # What it wrote gives the same scores to the next run.
    again = [*argv[: argv.index("--scores")], "--scores", f"duo={files['json']}"]
    assert main([*again, "--json", str(tmp_path / "again.json"), "--bits", "8"]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["runs"] == found["runs"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "razr"], "unknown cache method 'razr'. Did you mean 'razor'"),
        (["--task", "nedle"], "unknown task 'nedle'. Did you mean 'needle'"),
        (["--budget", "0"], "budget must lie in (0, 1], got 0.0"),
        (["--budget", "1.5"], "budget must lie in (0, 1], got 1.5"),
        (["--budget", "0.05"], "razor at length 512: budget 0.05 of 544 tokens is 27.2 a head"),
        (["--method", "snapkv", "--length", "64"], "snapkv keeps at least the last 32"),
        (["--length", "0"], "length must be at least 1, got 0"),
        (["--count", "0"], "count must be at least 1"),
        (["--recent", "0"], "recent must be at least 1, got 0"),
        (["--depths", "2"], "depths must be one or more numbers from 0 to 1"),
        (["--method", "duo"], "'duo' needs the scores of a file"),
        (["--scores", "razor"], "--scores 'razor' is not METHOD=FILE"),
        (["--scores", "razor=absent.json"], "absent.json: No such file"),
        (["--scores", "h2o=scores.json"], "head-wise method with scores: 'h2o'"),
        (["--scores", "razor=scores.json", "--scores", "razor=b"], "'razor' are given twice"),
        (["--json", "scores.json/a.json"], "cannot write"),
        (["--task", "text", "--source", "task:ioi"], "holds examples, expected text"),
    ],
)
def test_mistakes_told_before_a_model_is_read(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("scores.json").write_text("[[0]]")
    assert message in told(capsys, "no-model", *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--length", "512"], "length 512 and 32 tokens of an answer exceed the model's context"),
        (["--scores", "razor=scores.json"], "[2, 2], expected [3, 1] of this model"),
        (["--task", "needle"], "length 96 is too short for task 'needle'"),
    ],
)
def test_mistakes_told_of_a_model(argv, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("scores.json").write_text("[[0, 1], [2, 3]]")
    assert message in told(capsys, str(tiny), *SMALL, "--budget", "0.5", *argv)
