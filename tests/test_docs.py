"""The docs are true: their code runs, their links resolve, their tables equal the code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest

from jaxheads import SITES
from jaxheads.model import Image, ModelConfig, parameter_table
from jaxheads.sites import CROSS_SITES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOAD = 'model, tokenizer = jh.load("smollm2-135m-instruct")'
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BIASED = ModelConfig(
    n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_model=2, d_mlp=2, vocab_size=2,
    context_length=2, qkv_bias=True, o_bias=True, mlp_bias=True, tied=False,
)  # fmt: skip


VARIANTS = (
    {"norm": "layer", "norm_bias": True},
    {"qk_norm": "head", "norm_place": "sandwich", "branch_scale": True, "cross": True},
    {"n_positions": 2, "n_token_types": 1, "relative_buckets": 4, "embed_norm": True},
    {"image": Image(2, 2, 2), "context_length": 2},
    {"head": "mlm", "unembed_bias": True, "pooler": True, "projection": 2},
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    """Each block, padded with empty lines so that errors point into the page."""
    text = page.read_text()
    return [
        "\n" * text[: found.start(2)].count("\n") + found[2]
        for found in FENCE.finditer(text)
        if found[1] == "python"
    ]


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its own head."""
    _, found, after = text.partition(f"\n{heading}\n")
    assert found, f"no heading {heading!r}"
    lines = re.search(r"(^\|.*\n)+", after, re.M)
    assert lines is not None, f"no table after {heading!r}"
    rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines[0].splitlines()[2:]]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]


def run_page(page: Path, namespace: dict[str, Any]) -> None:
    """Runs the blocks in order; what they print must be what `# ->` says, where it does."""
    for block in python_blocks(page):
        code = block.replace(LOAD, "pass") if "tokenizer" in namespace else block
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        said = re.findall(r"# -> (.*)$", block, re.M)
        if said:
            told = [line.rstrip() for line in printed.getvalue().splitlines()]
            assert [line for line in told if line in said] == [line.rstrip() for line in said], told


SLOW_PAGES = (
    "attribution.md", "caches.md", "circuits.md", "edits-and-taps.md", "generation.md",
    "methods.md", "paths.md", "speculative.md", "sweeps.md", "training.md", "weights.md",
)  # fmt: skip
"""Pages whose code runs for more than a few seconds."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (page.name in SLOW_PAGES))
        for page in PAGES
        if python_blocks(page)
    ],
)
def test_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if LOAD in page.read_text():
        namespace["model"], namespace["tokenizer"] = request.getfixturevalue("smollm2")
    run_page(page, namespace)
    if "\n## Common errors\n" in page.read_text():
        check_errors(page, namespace)


def check_errors(page: Path, namespace: dict[str, Any]) -> None:
    for code, message in table_rows(page.read_text(), "## Common errors"):
        with pytest.raises(ValueError) as caught:
            eval(code.strip("`"), namespace)
        assert str(caught.value).startswith(message), code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert anchor in [slug(heading) for heading in headings], target


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_site_table_equals_the_code() -> None:
    rows = table_rows((ROOT / "docs/architecture.md").read_text(), "### Sites")
    assert rows == [[f"`{s.name}`", s.signature, s.meaning] for s in SITES.values()]


def test_cross_site_table_equals_the_code() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = table_rows(text, "### Sites of attention to an encoder")
    assert rows == [[f"`{s.name}`", s.signature, s.meaning] for s in CROSS_SITES.values()]


def test_parameter_tables_equal_the_code() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    common = axes_by_path(table_rows(text, "### The parameter tree"))
    assert common == axes_in_code(BIASED)
    variants = axes_by_path(table_rows(text, "### The parameter tree of variants"))
    norms = {path for path in variants if path.endswith("norm/bias")}
    found: dict[str, str] = {}
    for fields in VARIANTS:
        config = dataclasses.replace(BIASED, **{"tied": True, **fields})
        found |= axes_in_code(config)
    extra = {path for path in found if path.endswith("bias") and "cross/" in path}
    assert variants == {p: a for p, a in found.items() if p not in common and p not in extra}
    assert norms == {"blocks/attn_norm/bias", "blocks/mlp_norm/bias", "final_norm/bias"}


def axes_by_path(rows: list[list[str]]) -> dict[str, str]:
    return {path.strip("`"): axes for path, axes, *_ in rows}


def axes_in_code(config: ModelConfig) -> dict[str, str]:
    return {p: f"[{','.join(x.axes)}]" for p, x in parameter_table(config).items()}


def commands_in(page: Path) -> dict[str, set[str]]:
    """Commands on shell lines of fenced blocks and in code spans, with the flags they are given."""
    text = page.read_text()
    shell = [block for kind, block in FENCE.findall(text) if kind != "python"]
    lines = [line.partition("#")[0] for block in shell for line in block.splitlines()]
    lines += re.findall(r"`(jaxheads [^`]+)`", FENCE.sub("", text))
    found: dict[str, set[str]] = {}
    for line in lines:
        if command := re.match(r"\s*jaxheads ([a-z]\w*)", line):
            found.setdefault(command[1], set()).update(re.findall(r"(?<=\s)--[a-z][\w.-]*", line))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if commands_in(p)], ids=name_of)
def test_commands_and_flags_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jaxheads.cli import main

    for command, flags in commands_in(page).items():
        assert main([command, "--help"]) == 0, command
        told = capsys.readouterr().out
        assert f"jaxheads {command}" in told
        for flag in flags:
            assert re.search(rf"{re.escape(flag)}(?![\w-])", told), f"{command} {flag}"


def test_every_command_has_its_section() -> None:
    from jaxheads.cli.app import COMMANDS

    headings = re.findall(r"^## `(\w+)`", (ROOT / "docs/command-line.md").read_text(), re.M)
    assert set(headings) == set(COMMANDS)
