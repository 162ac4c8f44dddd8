"""Named arrays: choosing, sorting, and files that say the same."""

import csv
import io
import json

import numpy as np
import pytest

from jaxheads import NamedArray

VALUES = np.array([[0.5, -2.0, np.nan], [1.0, 0.25, 2.0]], np.float32)


def named(values: np.ndarray = VALUES) -> NamedArray:
    labels = ((10, 11), ("a", "b", "c"))
    return NamedArray("change (logits)", values, ("layer", "part"), labels, {"unedited": 4.5})


def test_choosing_by_label():
    array = named()
    assert float(array.sel(layer=11, part="b")) == 0.25
    row = array.sel(part="c")
    assert row.axes == ("layer",) and row.labels == ((10, 11),)
    np.testing.assert_array_equal(row.values, VALUES[:, 2])
    np.testing.assert_array_equal(np.asarray(array), VALUES)
    assert array[1, 0] == 1.0 and array.shape == (2, 3)


def test_the_mean_leaves_out_what_was_not_measured():
    array = named().mean("part")
    assert array.axes == ("layer",)
    np.testing.assert_allclose(array.values, [-0.75, 3.25 / 3])


def test_the_most_remarkable_first():
    array = named()
    assert array.top(2) == [((10, "b"), -2.0), ((11, "c"), 2.0)]
    assert array.top(1, "highest") == [((11, "c"), 2.0)]
    assert array.top(1, "lowest") == [((10, "b"), -2.0)]
    assert len(array.top(99)) == 5  # without the NaN
    lines = array.table(2).splitlines()
    assert lines[0] == "change (logits)" and lines[1].split() == ["layer", "part", "value"]
    assert lines[2].split() == ["10", "b", "-2.0000"]


def test_files_say_the_same(tmp_path):
    array = named()
    array.to_json(tmp_path / "a.json")
    again = NamedArray.from_json(tmp_path / "a.json")
    np.testing.assert_array_equal(again.values, VALUES)
    assert (again.axes, again.labels, again.info) == (array.axes, array.labels, array.info)
    assert json.loads(array.to_json())["values"][2] is None
    array.to_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert rows[1] == {"layer": "10", "part": "b", "value": "-2.0"} and len(rows) == 6
    assert not list(tmp_path.glob(".*"))


def test_a_heatmap_of_two_axes():
    svg = named().heatmap(mark=1)
    assert svg.startswith("<svg") and "change (logits)" in svg
    with pytest.raises(ValueError, match="two axes, got layer"):
        named().sel(part="a").heatmap()


def test_what_it_says_of_itself():
    assert repr(named()) == "NamedArray(change (logits); layer 2, part 3)"
    assert "0.2500" in repr(named().sel(layer=11, part="b"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: named().sel(head=1), "unknown axis 'head'"),
        (lambda: named().sel(layer=3), "axis 'layer' has no label 3: it has 10, 11"),
        (lambda: named().top(0), "count must be at least 1"),
        (lambda: named().top(1, "best"), "unknown order 'best'"),
        (lambda: named(VALUES[:1]), r"values have shape \(1, 3\), expected \(2, 3\)"),
        (lambda: NamedArray("x", VALUES, ("a",), ((1, 2), (1, 2, 3))), "do not fit labels"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_one_number_is_a_float():
    with pytest.raises(TypeError, match="has axes layer, part"):
        float(named())


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="holds no named array: axes, labels, values missing"):
        NamedArray.from_json(tmp_path / "a.json")
