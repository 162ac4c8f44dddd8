"""`jaxheads sweep` and `jaxheads circuit`, on a tiny random model that knows the words of IOI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

import jaxheads as jh
from jaxheads import tasks
from jaxheads.circuits import Circuit, Graph
from jaxheads.cli import main
from jaxheads.report.circuit_page import drawn_edges
from jaxheads.sweep.paths import path_patch
from jaxheads.text import Tokenizer

# Many small programs, each run once or twice.

ROWS = [
    {"prompt": f"When Mary and {b} went to the store, {s} gave a book to", "answer": " Mary",
     "wrong": f" {b}", "corrupted": f"When Mary and {b} went to the store, {t} gave a book to"}
    for b, s, t in (
        ("John", "John", "Tom"), ("Tom", "Tom", "Paul"),
        ("Paul", "Paul", "Anna"), ("Anna", "Anna", "John"),
    )
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers of four heads, whose tokens are words of `ioi`."""
    examples = tasks.generate("ioi", 300, 0)
    text = " ".join(e.prompt for e in examples)
    words = sorted(set(re.findall(r"\w+|[.,]", text)) | {"isn"})
    known = ["<s>", *words, *(f" {word}" for word in words)]
    vocabulary = {word: index for index, word in enumerate(known)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<s>"))
    pattern = tokenizers.Regex(r" ?\w+|[.,]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    config = jh.ModelConfig(
        n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_model=24, d_mlp=32,
        vocab_size=len(known), context_length=64,
    )  # fmt: skip
    model = jh.Transformer.random(config, jax.random.key(0))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return jh.save(model, Tokenizer(backend, {}, None), folder)


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prompts in a file."""
    path = tmp_path_factory.mktemp("prompts") / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


@pytest.fixture(scope="session")
def pair(tiny: Path) -> tuple[jh.Transformer, Any, jh.LogitDifference]:
    """The model, the pairs of the file, and their logit difference."""
    model, tokenizer = jh.load(tiny)
    pairs = tasks.encode_pairs([tasks.Example(**row) for row in ROWS], tokenizer)
    return model, pairs, jh.LogitDifference.of(pairs.clean, pairs.answers, pairs.wrong)


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of an error."""
    code = main(list(argv))
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def done(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command that succeeds prints."""
    code = main(list(argv))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def swept(capsys: pytest.CaptureFixture[str], path: Path, *argv: str) -> jh.NamedArray:
    done(capsys, "sweep", *argv, "--json", str(path / "a.json"))
    return jh.NamedArray.from_json(path / "a.json")


# Mistakes, told in one line.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --task NAME or --prompts FILE"),
        (["--task", "ioi", "--prompts", "{own}"], "one of the two"),
        (["--task", "iio"], "unknown task 'iio'. Did you mean 'ioi'"),
        (["--task", "needle"], "task 'needle' has no pairs of a clean and a corrupted prompt"),
        (["--task", "ioi", "--option", "templat=went"], "Did you mean 'template'"),
        (["--task", "ioi", "--count", "0"], "--count must be at least 1"),
        (["--task", "ioi", "--rows", "0"], "--rows must be at least 1"),
        (["--task", "ioi", "--top", "0"], "--top must be at least 1"),
        (["--task", "ioi", "--report", "{own}/a.html"], "cannot write"),
        (["--prompts", "absent.jsonl"], "absent.jsonl: No such file"),
        (["--prompts", "{own}", "--option", "a=1"], "--option is for --task"),
    ],
)
@pytest.mark.parametrize("command", ["sweep", "circuit"])
def test_mistakes_in_both(
    command: str, argv: list[str], message: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No such model: an error about anything else can only come from before it is read.
    assert message in told(capsys, command, "no-model", *(w.format(own=own) for w in argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep", "--what", "patch", "--site", "zz"], "unknown site 'zz'"),
        (["sweep", "--what", "patch", "--over", "layer", "heads"], "Did you mean 'head'"),
        (["sweep", "--what", "patch", "--over", "head"], "'layer' among them"),
        (["sweep", "--what", "patch", "--site", "mlp_out"], "has no axis 'head'"),
        (["sweep", "--site", "z"], "--site is for --what patch or attribution, not for --what ab"),
        (["sweep", "--what", "patch", "--exact"], "--exact is for --what attribution"),
        (["sweep", "--what", "path", "--receivers", "2.1.z"], "unknown receiver '2.1.z'"),
        (["sweep", "--what", "attribution", "--steps", "-1"], "--steps must be at least 0"),
        (["sweep", "--what", "attribution", "--metric", "rank"], "rank has no derivative"),
        (
            ["sweep", "--what", "attribution", "--metric", "kl", "--direction", "noise"],
            "at its minimum",
        ),
        (["circuit", "--metric", "rank"], "rank has no derivative"),
        (["circuit", "--method", "eap", "--metric", "kl"], "at its minimum"),
        (["circuit", "--edges", "0"], "--edges must be at least 1"),
        (["circuit", "--draws", "0"], "--draws must be at least 1"),
        (["circuit", "--curve", "10", "10"], "must be different numbers"),
        (["circuit", "--curve", "0"], "must be different numbers of edges from 1"),
        (["circuit", "--tau", "0.1"], "--tau is for --method acdc"),
        (["circuit", "--method", "acdc", "--tau", "0"], "--tau must be positive"),
        (["circuit", "--method", "eap", "--steps", "2"], "eap takes one gradient"),
        (["circuit", "--method", "acdc", "--rows", "4"], "runs all 8 prompts at once"),
    ],
)
def test_mistakes_in_one(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = argv
    assert message in told(capsys, command, "no-model", "--task", "ioi", *rest)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object with 'prompt', 'answer', 'wrong' and 'corrupted'"),
        ('{"prompt": "a", "answer": " b"}', "line 2 lacks 'wrong' and 'corrupted'"),
        (json.dumps(ROWS[0] | {"wrogn": "a"}), "line 2: unknown key 'wrogn'. Did you mean 'wrong'"),
        (json.dumps(ROWS[0] | {"wrong": 3}), "line 2: 'wrong' must be text, got 3"),
    ],
)
def test_lines_that_are_no_examples(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    assert f"{path} {message}" in told(capsys, "sweep", "no-model", "--prompts", str(path))
    path.write_text("\n")
    assert "holds no prompts" in told(capsys, "sweep", "no-model", "--prompts", str(path))


def test_prompts_that_do_not_fit_the_tokenizer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    argv = ["sweep", str(tiny), "--prompts", str(path)]
    longer = ROWS[0] | {"corrupted": ROWS[0]["corrupted"] + " the"}
    for change, message in (
        (longer, "clean and corrupted prompt differ in length, 14 and 15 tokens"),
        (ROWS[0] | {"answer": " Mary Tom"}, "answer ' Mary Tom' must be a single token"),
        (ROWS[0] | {"wrong": " Mary"}, "both a right and a wrong answer"),
    ):
        path.write_text(f"{json.dumps(ROWS[1])}\n\n{json.dumps(change)}\n")
        found = told(capsys, *argv)
        assert f"{path} line 3: " in found and message in found and "example 0" not in found
    other = longer | {"prompt": ROWS[0]["prompt"] + " the"}
    path.write_text(f"{json.dumps(ROWS[1])}\n{json.dumps(other)}\n")
    found = told(capsys, *argv, "--what", "patch", "--over", "layer", "position")
    assert f"{path} line 2 has 15 tokens and {path} line 1 has 14" in found


def test_more_edges_than_there_are(
    tiny: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["circuit", str(tiny), "--prompts", str(own)]
    total = Graph(2, 4, 2).allowed.sum()
    message = f"must be at most {total}, the edges that the model has, got 9999"
    assert f"--edges {message}" in told(capsys, *argv, "--edges", "9999")
    assert f"--curve {message}" in told(capsys, *argv, "--edges", "9", "--curve", "3", "9999")
    assert "raise --edges" in told(capsys, *argv, "--edges", "1")


# Sweeps.


@pytest.mark.slow
def test_ablation_in_batches_is_that_of_all_prompts(
    tiny: Path, own: Path, pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pairs, _ = pair
    some = jax.tree.map(lambda leaf: leaf[:3], pairs)
    metric = jh.LogitDifference.of(some.clean, some.answers, some.wrong)
    wanted = jh.ablate_heads(model, some.clean, metric, "mean")
    # Batches of two prompts and of one.
    argv = [str(tiny), "--prompts", str(own), "--how", "mean", "--count", "3", "--rows", "2"]
    found = swept(capsys, tmp_path, *argv)
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-5)
    assert found.info["unedited"] == pytest.approx(wanted.info["unedited"], abs=1e-5)
    assert found.info["how"] == "mean" and found.info["count"] == 3


@pytest.mark.slow
def test_patching_by_position_names_the_tokens(
    tiny: Path, own: Path, pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pairs, metric = pair
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.html")]
    out = done(
        capsys, "sweep", str(tiny), "--prompts", str(own), "--what", "patch", "--over", "layer",
        "head", "position", "--top", "2", "--json", str(files[0]), "--csv", str(files[1]),
        "--report", str(files[2]),
    )  # fmt: skip
    over = ("layer", "head", "position")
    wanted = jh.patch(model, pairs.clean, pairs.corrupted, metric, over=over)
    found = jh.NamedArray.from_json(files[0])
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-6)
    ((layer, head, position), value), _ = wanted.top(2)
    token = found.info["tokens"][int(position)]
    row = next(line for line in out.splitlines() if f"{layer}.{head}" in line)
    assert row.split()[:3] == [f"{layer}.{head}", str(position), token.replace(" ", "·")]
    share = value / (found.info["source"] - found.info["unedited"])
    assert row.split()[3:] == [f"{value:.4f}", f"{share:.4f}"]
    # Where the prompts differ the token is marked.
    assert [bool(t.endswith("…")) for t in found.info["tokens"]] == [
        len(set(column)) > 1 for column in pairs.clean.tokens.T.tolist()
    ]
    assert files[1].read_text().count("\n") == 1 + wanted.values.size
    page = files[2].read_text()
    assert page.count("<svg") == 2 and "By position" in page
    assert "stroke: #000000; stroke-width: 1.8" in page
    assert ROWS[2]["corrupted"] in page


@pytest.mark.slow
def test_attribution_tells_its_error(
    tiny: Path, own: Path, pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxheads.sweep.attribution import attribution_patching

    model, pairs, metric = pair
    argv = [str(tiny), "--prompts", str(own), "--what", "attribution", "--exact"]
    page = tmp_path / "a.html"
    found = swept(capsys, tmp_path, *argv, "--direction", "noise", "--report", str(page))
    wanted = attribution_patching(
        model, pairs.clean, pairs.corrupted, metric, direction="noise", exact=True
    )
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-5)
    said = found.info["agreement"]
    assert said["spearman"] == pytest.approx(wanted.info["agreement"]["spearman"], abs=1e-5)
    assert said["mean_error"] == pytest.approx(wanted.info["agreement"]["mean_error"], rel=1e-4)
    assert "Agreement with patching" in page.read_text()


@pytest.mark.parametrize("senders", ["heads", "mlps", "both"])
def test_paths(
    senders: str, tiny: Path, own: Path, pair: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, pairs, metric = pair
    argv = [str(tiny), "--prompts", str(own), "--what", "path", "--senders", senders]
    page = tmp_path / "a.html"
    found = swept(capsys, tmp_path, *argv, "--receivers", "1.1.q", "1.0.v", "--report", str(page))
    wanted = path_patch(
        model, pairs.clean, pairs.corrupted, metric, ["1.1.q", "1.0.v"], senders=senders
    )
    assert found.axes == wanted.axes
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-6)
    names = re.findall(
        r'<td class="">\s*([\w.]+)\s*</td>|<td>\s*([\w.]+)\s*</td>', page.read_text()
    )
    listed = {a or b for a, b in names}
    assert ("m0" in listed) == (senders != "heads") and ("0.1" in listed) == (senders != "mlps")


def test_the_task_gives_its_examples(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = jh.load(tiny)
    examples = tasks.generate("ioi", 4, 3, template="then")
    pairs = tasks.encode_pairs(examples, tokenizer)
    argv = [str(tiny), "--task", "ioi", "--option", "template=then", "--count", "4", "--seed", "3"]
    for name, metric in (
        ("loss", jh.AnswerLoss.of(pairs.clean, pairs.answers)),
        ("kl", jh.Divergence.of(model, pairs.clean)),
    ):
        found = swept(capsys, tmp_path, *argv, "--metric", name)
        wanted = jh.ablate_heads(model, pairs.clean, metric)
        np.testing.assert_allclose(found.values, wanted.values, atol=1e-5)
    assert found.info["template"] == "then" and found.info["task"] == "ioi"


def test_examples_that_do_not_fit_are_told(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sweep", str(tiny), "--task", "ioi", "--count", "4", "--what", "patch"]
    out = done(capsys, *argv, "--over", "layer", "position", "--site", "resid_pre")
    # The three templates are of three lengths.
    assert "2 of 4 examples fit" in out and "all prompts of one length too" in out


# Circuits.


def test_circuit_is_saved_with_its_curve(
    tiny: Path, own: Path, pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pairs, metric = pair
    files = [tmp_path / "a.json", tmp_path / "a.html"]
    argv = ["circuit", str(tiny), "--prompts", str(own), "--edges", "40", "--curve", "20", "80",
            "--draws", "2", "--rows", "2", "--json", str(files[0])]  # fmt: skip
    out = done(capsys, *argv, "--report", str(files[1]))
    found, saved = Circuit.load(files[0]), json.loads(files[0].read_text())
    assert 0 < len(found) <= 40 and len(found) == len(found.connected())
    exact = found.faithfulness(model, pairs.clean, pairs.corrupted, metric)
    assert saved["settings"]["faithfulness"] == pytest.approx(exact, abs=1e-4)
    assert f"faithfulness {saved['settings']['faithfulness']:.4f}" in out
    curve = saved["curve"]
    assert curve["edges"] == [20, 40, 80]
    assert curve["circuits"] == ["found", "random 0", "random 1"]
    assert curve["faithfulness"][0][1] == pytest.approx(exact, abs=1e-4)
    assert curve["remaining"][1] == len(found)
    page = files[1].read_text()
    assert page.count("<svg") == 3
    assert all(heading in page for heading in ("Faithfulness", "Nodes", "Prompts"))


def test_shared_keys_are_drawn_to_each_head_that_reads_them() -> None:
    graph = Graph(2, 4, 2)
    edges = {
        ("embed", "a0.2.q"): 1.0, ("embed", "a1.0.k"): -2.0, ("a0.2", "a1.0.v"): 0.5,
        ("embed", "m0"): 0.1, ("m0", "a1.1.q"): 0.3, ("a1.0", "logits"): 1.0,
        ("a1.1", "logits"): 1.0,
    }  # fmt: skip
    nodes, drawn = drawn_edges(Circuit(graph, edges))
    assert [name for name, _, _ in nodes] == ["embed", "0.2", "m0", "1.0", "1.1", "logits"]
    assert {(a, b) for a, b, _ in drawn} == {
        ("embed", "0.2.q"), ("embed", "1.0.k"), ("embed", "1.1.k"), ("0.2", "1.0.v"),
        ("0.2", "1.1.v"), ("embed", "m0"), ("m0", "1.1.q"), ("1.0", "logits"), ("1.1", "logits"),
    }  # fmt: skip


@pytest.mark.slow
def test_acdc_prunes(
    tiny: Path, own: Path, pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxheads.circuits import acdc, edge_attribution

    model, pairs, metric = pair
    path = tmp_path / "a.json"
    argv = ["circuit", str(tiny), "--prompts", str(own), "--edges", "40", "--curve", "40",
            "--draws", "1", "--method", "acdc", "--tau", "1e-4"]  # fmt: skip
    out = done(capsys, *argv, "--json", str(path), "--report", str(tmp_path / "a.html"))
    ends = (model, pairs.clean, pairs.corrupted)
    best = Circuit.of_scores(model, edge_attribution(*ends, metric, steps=5)).keep(40).connected()
    wanted = acdc(*ends, 1e-4, metric=metric, start=best)
    found = Circuit.load(path)
    assert found.edges == wanted.edges and len(found) < len(best)
    saved = json.loads(path.read_text())["settings"]
    exact = wanted.faithfulness(*ends, metric)
    assert saved["faithfulness"] == pytest.approx(exact, abs=1e-5)
    assert "before pruning" in out
    assert "lower it, or raise --edges" in told(capsys, *argv[:-1], "1e6")


@pytest.mark.slow
def test_smollm2_needs_its_name_movers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["smollm2-135m-instruct", "--task", "ioi", "--option", "template=went", "--count", "2"]
    found = swept(capsys, tmp_path, *argv)
    assert found.top(1, "lowest")[0][0] == (23, 3)
    path = tmp_path / "circuit.json"
    small = ["--method", "eap", "--edges", "100", "--curve", "100", "--draws", "5"]
    done(capsys, "circuit", *argv, *small, "--json", str(path))
    assert ("a23.3", "logits") in Circuit.load(path).edges
    curve = json.loads(path.read_text())["curve"]["faithfulness"]
    assert curve[0][0] > 0.05 + max(abs(row[0]) for row in curve[1:])
