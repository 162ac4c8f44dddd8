"""What ends a run, and what keeps a second one out of its folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxheads.train import workdir
from jaxheads.train.signals import Signals
from jaxheads.train.workdir import MetricsLog, check_claim, claim, hold, read_metrics, run_path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag_and_the_old_handlers_come_back(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert not signals.should_stop(1) and signals.reason == ""
        signal.raise_signal(number)
        assert signals.stop and signals.should_stop(2)
        assert signals.reason == number.name
        signal.raise_signal(signal.SIGTERM)  # again: no matter
        assert signals.should_stop(3) and signals.reason == number.name
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_ends_the_run_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.stop
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second interrupt was taken for the first")
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_no_handler_is_installed():
    found = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with Signals() as signals:
            found.append((signal.getsignal(signal.SIGINT) == before, signals.should_stop(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, False)]


def one_of_two(address: str, number: str) -> None:
    """Steps that every process takes together, until all are told to stop."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    from jax.experimental import multihost_utils

    steps = 0
    with Signals() as signals:
        for stage in range(60):  # noqa: B007
            for step in range(1, 11):  # shorter than the wait for the notice
                multihost_utils.sync_global_devices("a step")
                steps += 1
                if steps == 1:
                    print("running", flush=True)
                time.sleep(0.02)
                if signals.should_stop(step):
                    break
            if signals.should_stop(step):
                break
    print(json.dumps([stage, step, signals.stop, signals.reason]))
    jax.distributed.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_stop_after_the_same_step(number):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [run("one_of_two", address, str(i)) for i in range(2)]
    for process in processes:
        while line_of(process) != "running":  # gloo has lines of its own
            assert process.poll() is None, process.communicate()[1]
    processes[1].send_signal(number)
    facts = []
    for process in processes:
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        facts.append(json.loads(out.splitlines()[-1]))
    assert facts[0] == facts[1]
    stage, step, stop, reason = facts[0]
    assert 0 < stage < 59 and stop
    assert reason == f"a process was told to stop; all stop after step {step}"


# The folder of a run.


def keep(folder: str) -> None:
    with hold(folder):
        print("held", flush=True)
        sys.stdin.readline()


def test_a_second_run_is_told_who_has_the_folder_until_the_first_is_dead(tmp_path):
    first = run("keep", str(tmp_path))
    assert line_of(first) == "held"
    message = rf"in use by another run \(process {first.pid} on {socket.gethostname()}\)"
    for _ in range(2):
        with pytest.raises(ValueError, match=message), hold(tmp_path):
            pytest.fail("two runs have the folder")
    first.kill()
    first.communicate()
    with hold(tmp_path):
        assert (
            tmp_path / "lock"
        ).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), hold(str(tmp_path)):
            pytest.fail("two runs have the folder")
    with hold(tmp_path):
        pass


def test_a_folder_that_is_held_is_still_claimed_and_checked(tmp_path):
    config = {"steps": 3, "optimizer": {"name": "adam"}}
    folder = tmp_path / "run"
    check_claim(folder, config)
    assert not folder.exists()
    with hold(folder):
        claim(folder, config)
    claim(folder, config)
    with pytest.raises(ValueError, match=r"optimizer\.name is 'adam' there and 'sgd' here"):
        claim(folder, {"steps": 3, "optimizer": {"name": "sgd"}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        check_claim(tmp_path / "other", config)


def test_addresses_keep_their_slashes_and_are_not_locked(monkeypatch):
    assert str(run_path("gs://bucket/run")) == "gs://bucket/run"
    assert run_path("here") == Path.cwd() / "here"
    with pytest.raises(ValueError, match=r"'gs:/bucket/run' has lost a slash"):
        run_path(Path("gs://bucket/run"))
    monkeypatch.setattr(workdir, "_lock", lambda file: pytest.fail("locked"))
    with hold("gs://bucket/run"):
        pass


def test_a_line_that_a_kill_cut_short_is_not_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2):
        log.append("a", step, {"loss": 0.5})
    with path.open("a") as file:
        file.write('{"stage": "a", "st')
    log = MetricsLog(path)
    log.append("a", 3, {"loss": 0.25})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_rewind_that_fails_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for stage, step in [("a", 1), ("a", 2), ("b", 5)]:
        log.append(stage, step, {"loss": 0.5})
    before = log.path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.rewind("a", 1)
    assert log.path.read_bytes() == before
    monkeypatch.undo()
    log.rewind("a", 1)
    assert [(row["stage"], row["step"]) for row in read_metrics(log.path)] == [("a", 1), ("b", 5)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
