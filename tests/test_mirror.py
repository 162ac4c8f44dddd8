"""The files of a run whose folder is an address; epath's local paths stand for buckets."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from jaxheads.train.mirror import EVERY, Sender, fetch, mirrored, send
from jaxheads.train.writers import JsonLines


def test_a_local_folder_is_used_as_it_is(tmp_path):
    with mirrored(tmp_path / "run") as folder:
        assert folder == tmp_path / "run"


def test_files_come_and_go_and_folders_only_go(tmp_path):
    there, here, again = epath.Path(tmp_path / "there"), tmp_path / "here", tmp_path / "again"
    for folder in (here, again):
        folder.mkdir()
    (here / "model").mkdir()
    (here / "metrics.jsonl").write_text("{}\n")
    (here / "model" / "weights").write_bytes(b"\x00\xff")
    send(here, there)
    assert (there / "model" / "weights").read_bytes() == b"\x00\xff"
    fetch(there, again)
    assert [path.name for path in again.iterdir()] == ["metrics.jsonl"]
    fetch(epath.Path(tmp_path / "absent"), again)  # a new run has nothing to fetch


def test_the_log_is_sent_now_and_then_and_at_the_end(tmp_path):
    there, seconds = epath.Path(tmp_path / "there"), [0.0]
    here = tmp_path / "here"
    here.mkdir()
    log, sender = JsonLines(here / "metrics.jsonl"), Sender(here, there, lambda: seconds[0])

    def step(number: int, at: float) -> int:
        seconds[0] = at
        for writer in (log, sender):
            writer.append("stage", number, {"loss": 1.0})
        sent = Path(there / "metrics.jsonl")
        return len(sent.read_text().splitlines()) if sent.is_file() else 0

    assert [step(1, 1.0), step(2, EVERY), step(3, EVERY + 1)] == [0, 2, 2]
    sender.close()
    assert len(Path(there / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_address_that_lost_a_slash_is_refused():
    with pytest.raises(ValueError, match="has lost a slash"), mirrored("gs:/bucket/run"):
        pass
