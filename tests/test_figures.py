"""Figures from arrays: what is drawn, and the errors of bad data."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from figure_values import HEADS, HOSTILE, LAYERS, effects, pattern
from test_circuit_drawing import SVG, texts

from jaxheads.report import attention_pattern, bars, curves, head_heatmap, heatmap, token_strip
from jaxheads.report.page import visible


def cells(svg: str) -> list[ElementTree.Element]:
    """The drawn cells: the rectangles that have a tooltip."""
    return [e for e in ElementTree.fromstring(svg).iter(f"{SVG}rect") if len(e)]


def tips(svg: str) -> dict[str, str]:
    """The colour of each cell, by its tooltip."""
    return {str(cell[0].text): cell.get("fill", "") for cell in cells(svg)}


def test_heatmap_draws_every_head_with_its_exact_value_and_outlines_the_marked() -> None:
    values = effects().astype(np.float32)
    plain = head_heatmap(values, title="Effects", label="effect (nats)")
    marked = head_heatmap(values, title="Effects", label="effect (nats)", mark=[(23, 3), (0, 0)])
    assert len(tips(plain)) == LAYERS * HEADS
    assert f"layer 7, head 8: {values[7, 8]!s}" in tips(plain)
    assert {"Effects", "effect (nats)", "layer", "head", "29", "8"} <= set(texts(plain))
    strokes = [s.count("stroke: #000000; stroke-width: 1.8") for s in (plain, marked)]
    assert strokes[1] - strokes[0] == 2


def test_heatmap_has_layer_zero_at_the_top() -> None:
    svg = head_heatmap([[1.0], [2.0], [3.0]], title="t", label="l")
    tops = {str(e[0].text): float(e.get("y", "nan")) for e in cells(svg)}
    assert [tip[:7] for tip in sorted(tops, key=tops.__getitem__)] == [
        "layer 0",
        "layer 1",
        "layer 2",
    ]


def test_heatmap_colours_are_symmetric_about_zero_when_signs_mix() -> None:
    colours = tips(head_heatmap([[-1.0, 0.0, 4.0]], title="t", label="l"))
    red, white, blue = (int(c[1:3], 16) - int(c[5:7], 16) for c in colours.values())
    assert red > 5 > abs(white) and blue < -5
    # -1 of a scale to -4 is pale; a scale fitted to [-1, 4] would make it the darkest.
    assert int(colours["layer 0, head 0: -1.0"][5:7], 16) > 150


def test_heatmap_shows_nan_as_not_measured() -> None:
    values = effects()
    values[5, 5] = np.nan
    svg = head_heatmap(values, title="t", label="l")
    assert tips(svg)["layer 5, head 5: nan"] == "#c8c8c8"
    assert "head (grey: not measured)" in texts(svg)


@pytest.mark.parametrize("values", [np.zeros((2, 2)), -np.ones((2, 2)), [[-3.0, -1.0]], [[5.0]]])
def test_heatmap_of_one_sign_or_one_value(values) -> None:
    assert tips(head_heatmap(values, title="t", label="l"))


def test_heatmap_of_tokens_shows_them_and_tells_them_in_full() -> None:
    tokens = ["When", " Mary", "\n", " internationalisation", *(f" t{i}" for i in range(56))]
    values = np.arange(120.0).reshape(2, 60)
    options = {"title": "t", "label": "l", "axes": ("layer", "position")}
    svg = heatmap(values, **options, labels=([3, 7], tokens), mark=[(1, 0)])
    assert {"When", "·Mary", "↵", "·internationa…", "·t55", "3", "7", "position"} <= set(texts(svg))
    assert "layer 7, position ·internationalisation: 63.0" in tips(svg)
    down = heatmap(values.T, **options, labels=(tokens, ["a b", " "]))
    assert {"When", "·Mary", "·t55", "a b", "·"} <= set(texts(down))
    numbers = heatmap(np.ones((3, 2000)), **options, labels=(range(3), range(2000)))
    found = [int(t) for t in texts(numbers) if t.isdecimal() and int(t) > 2]
    assert 10 < len(found) < 60


def test_head_heatmap_is_a_heatmap_of_layers_and_heads() -> None:
    labels = (range(LAYERS), range(HEADS))
    whole = heatmap(effects(), title="t", label="l", axes=("layer", "head"), labels=labels)
    assert whole == head_heatmap(effects(), title="t", label="l")


def test_causal_pattern_leaves_the_masked_triangle_blank_and_full_ones_do_not() -> None:
    tokens = list("abcd")

    def drawn(weights: np.ndarray) -> list[float]:
        drawing = cells(attention_pattern(weights, tokens, title="t"))
        strips = [e for e in drawing if "→" not in str(e[0].text)]
        return [float(e.get("width", "nan")) for e in strips]

    causal = drawn(pattern(4))
    assert np.allclose(causal, np.array([1, 2, 3, 4]) * causal[0], rtol=0.01)
    assert len(set(drawn(np.full((4, 4), 0.25)))) == 1


def test_pattern_labels_both_axes_up_to_sixty_tokens() -> None:
    tokens = [f"t{i}" for i in range(60)]
    found = texts(attention_pattern(pattern(60), tokens, title="t"))
    assert all(found.count(token) == 2 for token in tokens)
    fewer = texts(attention_pattern(pattern(130), [f"t{i}" for i in range(130)], title="t"))
    assert fewer.count("t0") == 2 and fewer.count("t1") == 0


def test_pattern_of_the_last_queries_names_the_last_tokens() -> None:
    svg = attention_pattern(pattern(5)[-2:], list("abcde"), title="t")
    found = texts(svg)
    assert [found.count(c) for c in "abcde"] == [1, 1, 1, 2, 2]
    assert any(tip.startswith("d → a: ") for tip in tips(svg))


def test_bars_show_each_draw() -> None:
    svg = bars({"top": [2.0], "random": [0.5, 0.7, 0.9]}, title="t", ylabel="y", baseline=0.3)
    dots = re.findall(r"<use [^>]*fill: #123c63", svg)
    assert len(dots) == 3
    assert {"baseline 0.3", "2", "0.7"} <= set(texts(svg))
    assert "n = 3" in " ".join(texts(svg))


def test_bars_with_many_negative_groups() -> None:
    groups = {f"a rather long name {i}": [-1.0 - i, -2.0] for i in range(20)}
    assert "−1.5" in texts(bars(groups, title="t", ylabel="y"))


@pytest.mark.parametrize(("low", "high"), [(1e-4, 100.0), (0.2, 3.0), (2.3, 2.4)])
def test_log_axis_always_has_labels(low: float, high: float) -> None:
    y = np.geomspace(low, high, 30)
    line = {"_hidden$": (np.arange(30), y), "other": (np.arange(30), y)}
    found = texts(curves(line, title="t", xlabel="step", ylabel="loss", log_y=True))
    numbers = [float(t) for t in found if re.fullmatch(r"[0-9.e+-]+", t)]
    assert sum(low * 0.9 <= n <= high * 1.1 for n in numbers) >= 3
    assert any("_hidden$" in t for t in found)


def test_hostile_tokens_are_text_in_a_drawing() -> None:
    tokens = HOSTILE
    svg = attention_pattern(pattern(len(tokens)), tokens, title="</svg>\x07$&\"'")
    assert "<script" not in svg and "\x00" not in svg
    found = texts(svg)  # parses as XML, or this fails
    for token in ("a&b", "$x_1$", "↵", "␀", "\\u202e", "\\u200b", "·", "∅", "\\ud800"):
        assert found.count(token) == 2, token


def test_token_strip_escapes_and_tells_exact_weights() -> None:
    weights = np.linspace(0, 1, len(HOSTILE), dtype=np.float32)
    strip = token_strip(HOSTILE, weights, title="<i>", label="weight")
    assert "<script" not in strip and "<i>" not in strip
    found = re.findall(
        r'<span title="([^"]*)" style="background:(#\w+)[^"]*">([^<]*)</span>', strip
    )
    assert len(found) == len(HOSTILE)
    for place, (tip, _, shown) in enumerate(found):
        assert html.unescape(shown) == visible(HOSTILE[place])
        assert html.unescape(tip).endswith(f" {weights[place]!s}")
    brightness = [int(colour[1:3], 16) for _, colour, _ in found]
    assert brightness == sorted(brightness, reverse=True) and brightness[0] == 255


def test_token_strip_tells_signs_apart_and_takes_all_zeros() -> None:
    strip = token_strip(["a", "b"], [1.0, -1.0])
    assert "#08519c" in strip and "#a50f15" in strip
    assert token_strip(["a"], [0.0]).count("#ffffff") == 1


def grid_of(values: np.ndarray, labels: int) -> str:
    down = range(len(values))
    return heatmap(values, title="F", label="l", axes=("x", "y"), labels=(down, range(labels)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_heatmap(np.ones(30), title="F", label="l"), r"'F'.*\[L,H\].*\(30,\)"),
        (lambda: head_heatmap(np.ones((0, 9)), title="F", label="l"), r"'F'.*\(0, 9\)"),
        (lambda: head_heatmap([[np.inf, 1]], title="F", label="l"), r"'F'.*inf at \[0, 0\]"),
        (lambda: head_heatmap([[np.nan]], title="F", label="l"), "'F'.*NaN"),
        (lambda: head_heatmap([["x"]], title="F", label="l"), "'F'.*real numbers"),
        (lambda: head_heatmap([[1.0]], title="F", label="l", mark=[(0, 1)]), r"'F'.*\(0, 1\)"),
        (lambda: grid_of(np.ones((2, 2)), 3), "'F'.*2 labels of axis 'y'.*got 3"),
        (lambda: grid_of(np.ones((300, 200)), 200), "'F'.*300 x 200 cells are too many"),
        (lambda: attention_pattern(np.ones((2, 2, 2)), ["a", "b"], title="F"), r"'F'.*\[T,S\]"),
        (lambda: attention_pattern(np.ones((3, 2)), ["a", "b"], title="F"), "'F'.*at most S"),
        (lambda: attention_pattern(np.eye(3), ["a"], title="F"), "'F'.*3 tokens.*got 1"),
        (lambda: attention_pattern([[np.nan]], ["a"], title="F"), r"'F'.*nan at \[0, 0\]"),
        (lambda: bars({}, title="F", ylabel="y"), "'F'.*at least one group"),
        (lambda: bars({"g": []}, title="F", ylabel="y"), r"'F'.*'g'.*\(0,\)"),
        (lambda: bars({"g": [1, np.nan]}, title="F", ylabel="y"), r"'F'.*'g'.*nan at \[1\]"),
        (lambda: bars({"g": [1]}, title="F", ylabel="y", baseline=np.inf), "'F'.*baseline"),
        (lambda: curves({}, title="F", xlabel="x", ylabel="y"), "'F'.*at least one curve"),
        (
            lambda: curves({"c": ([1, 2], [1])}, title="F", xlabel="x", ylabel="y"),
            r"'F'.*'c'.*\(2,\) and \(1,\)",
        ),
        (
            lambda: curves({"c": ([1], [0])}, title="F", xlabel="x", ylabel="y", log_y=True),
            "'F'.*positive.*'c'",
        ),
        (lambda: token_strip(["a"], [1.0, 2.0], title="F"), "'F'.*2 tokens.*got 1"),
        (lambda: token_strip(["a"], [[1.0]], title="F"), r"'F'.*\[T\].*\(1, 1\)"),
    ],
)
def test_bad_data_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
