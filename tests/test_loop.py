"""The loop: order and lateness of metrics, resuming, interruptions, evaluations, bad steps."""

import itertools
import os
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxheads.train.checkpoint import Checkpoints
from jaxheads.train.loop import INTERRUPTED, NO_IMPROVEMENT, Loop, NotFinite, run
from jaxheads.train.step import make_step, start
from jaxheads.train.stopping import Stopping
from jaxheads.train.workdir import read_metrics
from jaxheads.train.writers import open_writers

BATCH = 4
TARGET = np.array([1, -1, 0.5], np.float32)
OPTIMIZER = optax.adam(0.1)


def toy_loss(weights, frozen, batch, key):
    noise = 0.01 * jax.random.normal(key, weights.shape)
    error = batch["x"] @ (weights + noise) - frozen["scale"] * batch["y"]
    return jnp.mean(error**2), {"largest": jnp.abs(error).max()}


STEP = make_step(toy_loss, OPTIMIZER)


def batch_at(position, spoiled=()):
    """A batch that depends on the number of its first example only."""
    x = np.random.default_rng(position).normal(size=(BATCH, 3)).astype(np.float32)
    y = x @ TARGET
    if position // BATCH in spoiled:
        y = y * np.nan
    return {"x": x, "y": y}


def feed(position, spoiled=()):
    for start_of in itertools.count(position, BATCH):
        yield jax.device_put(batch_at(start_of, spoiled))


class Toy:
    """A run in a folder (or in none), remembering what it was told."""

    def __init__(self, folder=None, *, writers=(), **settings):
        self.folder, self.writers = folder, writers
        self.settings = Loop(**{"checkpoint_every": 3} | settings)
        self.reports = []

    def run(self, steps=9, **options):
        options = {
            "step": STEP,
            "frozen": jax.device_put({"scale": np.float32(2)}),
            "batches": feed,
            "on_step": self.reports.append,
        } | options
        state = start(jnp.zeros(3), OPTIMIZER)
        common = {
            "stage": "toy", "steps": steps, "batch_size": BATCH, "settings": self.settings,
            "config": {"name": "toy"},
        }  # fmt: skip
        if self.folder is None:
            return run(state, **options, **common)
        self.folder.mkdir(exist_ok=True)
        with (
            self.open() as checkpoints,
            open_writers(self.folder, self.writers) as writers,
        ):
            return run(state, **options, **common, checkpoints=checkpoints, writers=writers)

    def open(self):
        every = self.settings.checkpoint_every
        return Checkpoints(self.folder / "checkpoints", every=every, keep=self.settings.keep)

    def logged(self):
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def told(self):
        return [report.step for report in self.reports]


class StopAfter:
    """Says stop after a step, as `Signals` does once a signal has come."""

    def __init__(self, step):
        self.step = step

    def should_stop(self, step):
        return step >= self.step


# --- metrics, one step late -----------------------------------------------------------------


def test_every_step_is_told_in_order_while_the_next_one_runs():
    events = []

    def counting(state, frozen, batch):
        events.append("dispatch")
        return STEP(state, frozen, batch)

    toy = Toy()
    losses = []

    def on_step(report):
        events.append(report.step)
        losses.append(report.metrics["loss"])

    toy.run(30, step=counting, on_step=on_step)
    assert [event for event in events if event != "dispatch"] == list(range(1, 31))
    # Two steps are under way when the first is told, and so on to the last.
    assert events[:5] == ["dispatch", "dispatch", 1, "dispatch", 2]
    assert losses[-1] < 0.5 * losses[0]


def test_metrics_are_read_every_so_many_steps_and_before_each_checkpoint(tmp_path):
    toy = Toy(tmp_path / "run", checkpoint_every=7, log_every=5)
    toy.run(17)
    assert toy.told == [5, 7, 10, 14, 15, 17]
    assert toy.reports[0].metrics.keys() == {"loss", "gradient_norm", "largest"}


def test_a_batch_that_is_not_on_the_device_is_refused():
    def on_the_host(position):
        while True:
            yield batch_at(position)

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        Toy().run(batches=on_the_host)
    assert Toy(guard_transfers=False).run(2, batches=on_the_host).stopped is None


def test_batches_that_end_too_early_are_named():
    def short(position):
        yield from itertools.islice(feed(position), 2)

    with pytest.raises(ValueError, match="the batches of 'toy' end after step 2 of 9"):
        Toy().run(batches=short)


# --- resuming -------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_bit_for_bit_and_logs_every_step_once(tmp_path):
    whole, parts = Toy(tmp_path / "whole"), Toy(tmp_path / "parts")
    expected = whole.run()
    stopped = parts.run(signals=StopAfter(4))
    assert stopped.stopped == INTERRUPTED and int(stopped.state.step) == 4
    began = []
    again = parts.run(batches=lambda position: began.append(position) or feed(position))
    assert began == [4 * BATCH] and again.stopped is None
    chex.assert_trees_all_equal(again.state, expected.state)
    assert parts.told == list(range(1, 10))
    numbers = [(row["step"], row["loss"]) for row in parts.logged()]
    assert numbers == [(row["step"], row["loss"]) for row in whole.logged()]


class Killed(Exception):
    pass


def test_steps_logged_after_the_last_checkpoint_are_logged_anew(tmp_path):
    toy = Toy(tmp_path / "run")

    def dies(position):
        yield from itertools.islice(feed(position), 5)
        raise Killed

    with pytest.raises(Killed):
        toy.run(batches=dies)
    assert [row["step"] for row in toy.logged()] == [1, 2, 3, 4]
    toy.run()
    assert toy.told == [1, 2, 3, 4, *range(4, 10)]
    assert [row["step"] for row in toy.logged()] == list(range(1, 10))


def test_a_finished_run_takes_no_step(tmp_path):
    Toy(tmp_path / "run").run(4)
    again = Toy(tmp_path / "run")
    outcome = again.run(4, step=lambda *_: pytest.fail("a step was taken"))
    assert int(outcome.state.step) == 4 and not again.reports


def test_what_is_odd_about_a_checkpoint_is_told(tmp_path):
    toy = Toy(tmp_path / "run", keep_newest=3)
    toy.run()
    for item in (tmp_path / "run" / "checkpoints" / "9" / "state").rglob("*"):
        if item.is_file():
            item.write_bytes(b"")
    notes = []
    assert int(toy.run(on_note=notes.append).state.step) == 9
    assert "checkpoint 9 is torn" in notes[0] and toy.told[-3:] == [7, 8, 9]


# --- signals --------------------------------------------------------------------------------

INTERRUPTIBLE = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_loop
from jaxheads.train.signals import Signals
def on_step(report):
    print(report.step, flush=True)
    time.sleep({pause} if report.step >= 3 else 0)
toy = test_loop.Toy(Path({folder!r}), checkpoint_every=1000)
with Signals() as signals:
    outcome = toy.run({steps}, on_step=on_step, signals=signals)
print(outcome.stopped, int(outcome.state.step), flush=True)
"""


def interrupted(folder, tests, *, steps=10_000, pause=0.05, times=1):
    code = INTERRUPTIBLE.format(tests=str(tests), folder=str(folder), steps=steps, pause=pause)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.strip() == "3":
            break
    for _ in range(times):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_control_c_saves_and_the_run_goes_on_bit_for_bit(tmp_path, request):
    code, out, err = interrupted(tmp_path / "run", request.path.parent)
    assert code == 0, err
    word, at = out.split()[-2:]
    assert word == INTERRUPTED and 3 <= int(at) < 100
    toy = Toy(tmp_path / "run", checkpoint_every=1000)
    again = toy.run(int(at) + 5)
    assert toy.told == list(range(int(at) + 1, int(at) + 6))
    chex.assert_trees_all_equal(again.state, Toy().run(int(at) + 5).state)
    assert [row["step"] for row in toy.logged()] == list(range(1, int(at) + 6))


@pytest.mark.slow
def test_a_second_control_c_quits_at_once(tmp_path, request):
    # It sleeps after step 3: only the second signal can end it.
    code, _, err = interrupted(tmp_path / "run", request.path.parent, pause=20, times=2)
    assert code != 0 and "KeyboardInterrupt" in err
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


# --- evaluations ----------------------------------------------------------------------------


def measure(state):
    return {"distance": float(jnp.abs(state.trainable - 2 * TARGET).max())}


def test_evaluations_are_logged_beside_their_step_and_the_best_is_kept(tmp_path):
    values = iter([5.0, 1.0, 3.0, 2.0])
    toy = Toy(tmp_path / "run", checkpoint_every=100, keep_newest=1, evaluate_every=2, best="value")
    outcome = toy.run(7, evaluate=lambda state: {"value": next(values)})
    assert (outcome.best, outcome.best_step) == (1.0, 4)
    rows = {row["step"]: row for row in toy.logged()}
    found = {
        step: row["evaluation/value"] for step, row in rows.items() if "evaluation/value" in row
    }
    assert found == {2: 5.0, 4: 1.0, 6: 3.0, 7: 2.0} and len(rows) == 7
    assert "loss" in rows[4]
    with toy.open() as checkpoints:
        assert checkpoints.best() == 4 and checkpoints.latest == 7


@pytest.mark.parametrize("interruption", [None, 2, 4, 5])
def test_training_stops_when_nothing_improves_also_across_an_interruption(tmp_path, interruption):
    found = {2: 1.0, 4: 3.0, 6: 2.0, 8: 0.0}

    def evaluate(state):
        return {"accuracy": found[int(state.step)]}

    toy = Toy(tmp_path / "run", evaluate_every=2, best="-accuracy", patience=2)
    if interruption is not None:
        toy.run(20, evaluate=evaluate, signals=StopAfter(interruption))
    outcome = toy.run(20, evaluate=evaluate)
    assert outcome.stopped == NO_IMPROVEMENT and int(outcome.state.step) == 8
    assert (outcome.best, outcome.best_step) == (3.0, 4)
    again = toy.run(20, step=lambda *_: pytest.fail("a step was taken"), evaluate=evaluate)
    assert again.stopped == NO_IMPROVEMENT and again.best_step == 4
    assert [row["step"] for row in toy.logged()] == list(range(1, 9))


def test_an_evaluation_without_the_metric_says_what_it_has():
    with pytest.raises(ValueError, match=r"unknown metric of the evaluation 'los'.*distance"):
        Toy(best="los").run(evaluate=measure)
    with pytest.raises(ValueError, match="best = 'los' needs an evaluation, and 'toy' has none"):
        Toy(best="los").run()


def test_nan_is_never_an_improvement():
    stopping = Stopping("loss", patience=2).after(1, {"loss": float("nan")})
    assert stopping.best is None and stopping.waited == 1 and not stopping.done
    assert stopping.after(2, {"loss": 1.0}) == Stopping("loss", 2, 1.0, 2, 0)


# --- bad steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_saved(tmp_path, log_every):
    toy = Toy(tmp_path / "run", checkpoint_every=100, log_every=log_every)
    spoiled = lambda position: feed(position, spoiled={5})  # noqa: E731
    with pytest.raises(NotFinite, match=r"in step 6.*last good state: checkpoint 5") as error:
        toy.run(20, batches=spoiled)
    assert (error.value.step, error.value.checkpoint) == (6, 5)
    # One step late, or at the next step whose metrics are read.
    assert toy.told == ([1, 2, 3, 4, 5] if log_every == 1 else [4])
    # From there on with other data the run is what it would have been.
    again = toy.run(9)
    chex.assert_trees_all_equal(again.state, Toy().run(9).state)


def test_without_checkpoints_a_bad_step_says_that_nothing_was_kept():
    with pytest.raises(NotFinite, match=r"the loss is nan in step 1; .*: no checkpoint was kept"):
        Toy().run(batches=lambda position: feed(position, spoiled={0}))


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_every": 0}, "log_every must be positive, got 0"),
        ({"patience": 3}, "patience needs best and evaluate_every"),
        ({"profile": (4, 4)}, r"profile must be \[first, stop\] .* got \[4, 4\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Loop(**settings)


def test_a_profile_needs_a_folder():
    with pytest.raises(ValueError, match=r"profile = \[1, 2\] needs a folder"):
        Toy(profile=(1, 2)).run()
