"""The report: one self-contained page, how it is written, and how a browser shows it."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from figure_values import HOSTILE, effects, pattern
from test_circuit_drawing import big_circuit

from jaxheads.report import (
    Report,
    attention_pattern,
    bars,
    circuit_drawing,
    curves,
    head_heatmap,
    render,
    token_strip,
    write,
)


@functools.cache
def full_report() -> Report:
    tokens = [f" word{i}" for i in range(60 - len(HOSTILE))] + HOSTILE
    steps = np.arange(0, 1000, 10)
    loss = {f"learning rate {r}": (steps, 3 * np.exp(-steps / 300 / r) + 0.1) for r in (1, 2, 3)}
    groups = {"top 14": [4.45], "14 random heads": [0.38, 0.45, 0.4]}
    marked = head_heatmap(effects(), title="Effects", label="effect (nats)", mark=[(23, 3)])
    return (
        Report("Heads & <tails>", "30 layers, 9 heads")
        .facts({"model": "smollm2-135m-instruct", "layers": 30, "perplexity": 19.3})
        .section("Ablation", "First <b>paragraph</b>.\n\nSecond.")
        .figure(marked, "All 270 heads.")
        .figure(bars(groups, title="Loss", ylabel="loss (nats)", baseline=0.31), "Controls.")
        .figure(circuit_drawing(*big_circuit(), title="A circuit"), "Eighty edges.")
        .section("Attention")
        .figure(attention_pattern(pattern(60), tokens, title="Head 18.6"), "Sixty tokens.")
        .html(token_strip(tokens, pattern(60)[-1], title="Last token"))
        .section("Training")
        .figure(curves(loss, title="Loss", xlabel="step", ylabel="nats", log_y=True), "Loss.")
        .table(["task"] + [f"metric {i}" for i in range(14)], [["ioi", *range(14)]], "Wide.")
    )


def test_page_escapes_text_and_shows_everything() -> None:
    page = render(full_report())
    assert "<h1>Heads &amp; &lt;tails&gt;</h1>" in page
    assert "<p>First &lt;b&gt;paragraph&lt;/b&gt;.</p>" in page and "<p>Second.</p>" in page
    assert page.count("<svg ") == 5 and "<script" not in page
    anchors = re.findall(r'<h2 id="([^"]+)"', page)
    assert anchors == ["ablation", "attention", "training"]
    assert re.findall(r'<a href="#([^"]+)"', page) == anchors


def test_page_loads_nothing_from_outside() -> None:
    page = render(full_report())
    for address in re.findall(r"""[^\s"'<>(]*https?://[^\s"'<>)]*""", page):
        before = page[: page.index(address)]
        assert re.search(r"""xmlns(:\w+)?="$""", before), address
    links = re.findall(r'\b(?:src|href)\s*=\s*"([^"]*)"', page)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in page.replace("url(#", "")
    assert "default-src 'none'" in page


def test_no_identifier_occurs_with_two_meanings() -> None:
    page = render(full_report())
    elements: dict[str, set[str]] = {}
    for match in re.finditer(r'<[^<>]*\sid="([^"]+)"[^<>]*>', page):
        elements.setdefault(match[1], set()).add(match[0])
    assert elements and all(len(meanings) == 1 for meanings in elements.values())


def test_repeated_headings_get_links_of_their_own() -> None:
    report = Report("t").section("A b").section("A b").section("東京")
    assert re.findall(r'<h2 id="([^"]+)"', render(report)) == ["a-b", "a-b-2", "section"]


def test_a_report_is_not_changed_by_adding_to_it() -> None:
    first = Report("t").section("one")
    second = first.section("two")
    assert len(first.blocks) == 1 and len(second.blocks) == 2


def test_table_aligns_columns_of_numbers_and_formats_them() -> None:
    rows = [["1.2", 2.41234, 49152, True, None], ["x", np.float32(-0.5), np.int64(7), False, 1e-9]]
    page = render(Report("t").table(["name", "effect", "n", "kept", "p"], rows, "caption"))
    numeric = re.findall(r'<th scope="col" class="number">(\w+)</th>', page)
    assert numeric == ["effect", "n", "p"]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert cells[:5] == ["1.2", "2.412", "49,152", "yes", "–"]
    assert cells[5:] == ["x", "−0.500", "7", "no", "1e−09"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.table(["a", "b"], [[1, 2], [1]], "C"), "'C'.*2 cells in row 1, got 1"),
        (lambda r: r.table(["a"], [[float("nan")]], "C"), "'C', column 'a', row 0.*nan"),
        (lambda r: r.table([], [], "C"), "'C'.*at least one column"),
        (lambda r: r.facts({"loss": np.float32("inf")}), "'loss'.*inf"),
        (lambda r: r.figure("<p>", "C"), "'C'.*<svg>"),
        (lambda r: r.html('<img src="https://a.example/x.png">'), "https://a.example/x.png"),
        (lambda r: r.html("<link rel=stylesheet href=//a.example/x.css>"), "//a.example"),
        (lambda r: r.html("<style>@import 'x.css'</style>"), "@import"),
        (
            lambda r: r.figure('<svg><image xlink:href="http://a.example/x"/></svg>', "C"),
            "'C'.*http://a.example/x",
        ),
    ],
)
def test_bad_blocks_are_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Report("t"))


def test_a_link_for_the_reader_is_allowed() -> None:
    assert "a.example" in render(Report("t").html('<a href="https://a.example/">paper</a>'))


def test_written_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    first = write(full_report(), tmp_path / "new" / "folder" / "report.html")
    code = "import sys, test_report as t; t.write(t.full_report(), sys.argv[1])"
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root / "tests")}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b.html")],
        check=True,
        cwd=root,
        env=environment,
    )
    assert first.read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_readers_matplotlib_settings_neither_matter_nor_change() -> None:
    import matplotlib

    def draw() -> str:
        return bars({"a": [1.0, 2.0]}, title="t", ylabel="y")

    expected = draw()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert draw() == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_importing_the_report_loads_neither_matplotlib_nor_jinja2() -> None:
    code = (
        "import sys, jaxheads.report\n"
        "print([m for m in ('matplotlib', 'matplotlib.pyplot', 'jinja2') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"


def test_write_replaces_a_file_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write(Report("lone \ud800 surrogate and \x00"), path) == path
    assert "lone \\ud800 surrogate and ␀" in path.read_text("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_says_where_and_why_it_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "taken.html").mkdir()
    for path in (tmp_path / "file" / "report.html", tmp_path / "taken.html"):
        with pytest.raises(OSError, match="cannot write the report into") as caught:
            write(Report("t"), path)
        assert str(path) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.html"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into any folder")
def test_write_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="cannot write the report into"):
        write(Report("t"), tmp_path / "report.html")


# In a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# The page stands in a frame of exactly the width asked for: a window may refuse to be
# as narrow as a telephone.
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inside = document.querySelector("iframe").contentWindow, page = inside.document;
  const all = selector => [...page.querySelectorAll(selector)];
  const measured = {{
    width: inside.innerWidth,
    scrolls: page.documentElement.scrollWidth,
    // What sticks out, unless it scrolls inside a box of its own.
    outside: all("main *, header *, nav *")
      .filter(e => e.getBoundingClientRect().right > inside.innerWidth + 1)
      .filter(e => !e.parentElement.closest(".drawing, .table"))
      .map(e => e.outerHTML.slice(0, 80)),
    headings: all("h2").map(e => e.textContent),
    drawings: all(".drawing svg").map(e => e.getBoundingClientRect())
      .map(box => [box.width, box.height]),
    clipped: all(".drawing svg").flatMap(svg => [...svg.querySelectorAll("text")]
      .filter(e => {{
        const text = e.getBoundingClientRect(), box = svg.getBoundingClientRect();
        return text.left < box.left - 1 || text.right > box.right + 1 ||
          text.top < box.top - 1 || text.bottom > box.bottom + 1;
      }}).map(e => e.textContent)),
    smallest: Math.min(...all("svg text").map(e => {{
      const matrix = e.getScreenCTM();
      return parseFloat(getComputedStyle(e).fontSize) * Math.hypot(matrix.a, matrix.b);
    }})),
  }};
  const result = document.createElement("pre");
  result.id = "measured";
  result.textContent = JSON.stringify(measured);
  document.body.replaceChildren(result);
}};
</script>"""


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(full_report(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")
def test_browser_has_nothing_to_complain_of(written: Path, tmp_path: Path) -> None:
    clean = browse(written, tmp_path / "one")
    assert "CONSOLE" not in clean.stderr
    assert clean.stdout.count("<svg") == 5
    # The same eyes do see an error, and the page's policy does stop a script.
    broken = tmp_path / "broken.html"
    script = "<script>document.body.id = 'reached'</script></body>"
    broken.write_text(written.read_text("utf-8").replace("</body>", script), "utf-8")
    stopped = browse(broken, tmp_path / "two")
    assert "CONSOLE" in stopped.stderr and 'id="reached"' not in stopped.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")
@pytest.mark.parametrize("width", [1200, 400])
def test_browser_lays_the_page_out_within_its_width(
    written: Path, tmp_path: Path, width: int
) -> None:
    # A frame inherits the policy of its page, so the page's own has to go.
    page = re.sub(r"<meta http-equiv[^>]*>", "", written.read_text("utf-8"))
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.format(width=width, page=html.escape(page)), "utf-8")
    done = browse(outer, tmp_path / "profile", "--window-size=1300,1000")
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    measured = json.loads(html.unescape(found[1]))
    assert measured["width"] == width
    assert measured["scrolls"] <= width and measured["outside"] == []
    assert measured["headings"] == ["Ablation", "Attention", "Training"]
    assert len(measured["drawings"]) == 5
    assert all(w > 250 and h > 150 for w, h in measured["drawings"])
    assert measured["clipped"] == []
    assert measured["smallest"] >= 7
