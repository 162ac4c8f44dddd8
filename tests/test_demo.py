"""The demonstration: what it refuses, and (slow) that its numbers are as good as they should be."""

import json

import pytest
from rich.console import Console

from jaxheads.demo.run import run_demo

QUIET = Console(quiet=True)


def test_a_folder_of_something_else_is_refused_before_any_work(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no earlier demonstration"):
        run_demo(tmp_path, console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(ValueError, match="holds no earlier demonstration"):
        run_demo(tmp_path / "demo", console=QUIET)


@pytest.mark.slow
def test_the_demonstration(tmp_path):
    results = run_demo(tmp_path, console=QUIET)
    masking = {row["name"]: row["answer_loss"] for row in results["retrieval"]["masking"]}
    clean = masking.pop("clean")
    chosen = masking.pop("chosen") - clean
    assert len(masking) == 5 and all(chosen >= 5 * (loss - clean) for loss in masking.values())

    tuned = {name: row["held_out"]["loss"] for name, row in results["lofit"]["variants"].items()}
    frozen, trained = tuned.pop("frozen"), tuned.pop("lofit")
    assert len(tuned) == 5 and trained < min(tuned.values()) < frozen

    for gap in results["agreement"].values():
        assert gap < 1e-4 * results["logit_scale"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 5 and "default-src 'none'" in page and "<script" not in page
