"""Checkpoints while they are written: by a run that is killed, to a full disk, by two processes."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import free_address, launch, result
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved_states import MANY, restored, steps_in

from jaxheads.train.checkpoint import Checkpoints
from jaxheads.train.step import TrainState, make_step, start

EVERY = 2
LARGE = 2_000_000  # 16 MB with momentum: saving takes long


def toy_loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
    noise = jax.random.normal(key, (3,))
    error = batch["x"] @ (trainable["w"] + 0.1 * noise) - batch["y"]
    ballast = jnp.mean((trainable["ballast"] - batch["y"].mean()) ** 2)
    return jnp.mean(error**2) + ballast, {}


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def toy_state(size: int) -> TrainState:
    ballast = np.random.default_rng(0).standard_normal(size, np.float32)
    return start({"w": jnp.zeros(3), "ballast": jnp.asarray(ballast)}, OPTIMIZER)


def toy_batch(number: int) -> Any:
    rng = np.random.default_rng(number)
    return {"x": rng.normal(size=(4, 3)).astype("f"), "y": rng.normal(size=4).astype("f")}


def test_a_state_may_be_given_up_at_once_while_it_is_still_being_written(tmp_path):
    step = make_step(toy_loss, optax.sgd(0.1))
    now, batch = toy_state(200_000), toy_batch(0)
    with Checkpoints(tmp_path, every=1, keep=MANY) as checkpoints:
        for n in range(1, 4):
            now, _ = step(now, None, batch)
            copy = jax.tree.map(np.array, now)
            checkpoints.save(now, position=n, config={})
            now, _ = step(now, None, batch)  # donates what was saved
            now = now.replace(step=now.step - 1)
            checkpoints.wait()
            found = checkpoints.restore(toy_state(200_000)).state
            chex.assert_trees_all_equal(jax.tree.map(np.asarray, found), copy)


# A training run that is killed.


def train(folder: str, size: int, steps: int, seconds: float = 0) -> dict[int, str]:
    """A toy run that goes on from its newest checkpoint; prints and returns its losses.

    Without a folder it saves nothing.
    """
    now, step = toy_state(size), make_step(toy_loss, OPTIMIZER)
    losses = {}
    with Checkpoints(folder, every=EVERY) if folder else contextlib.nullcontext() as checkpoints:
        if checkpoints is not None and checkpoints.latest is not None:
            now = checkpoints.restore(now).state
        for index in range(int(now.step), steps):
            now, metrics = step(now, None, toy_batch(index))
            losses[index + 1] = float(metrics["loss"]).hex()
            print(json.dumps([index + 1, losses[index + 1]]), flush=True)
            if checkpoints is not None:
                checkpoints.save(now, position=4 * (index + 1), config={})
            time.sleep(seconds)
    return losses


def told(process: subprocess.Popen[str]) -> dict[int, str]:
    """The losses of a run that was killed."""
    out, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    lines = out.splitlines(keepends=True)
    return dict(json.loads(line) for line in lines if line.endswith("\n"))


def goes_on_equally(folder: Path, killed: dict[int, str], whole: dict[int, str], size: int) -> None:
    complete = max(steps_in(folder), default=0)
    again = train(str(folder), size, len(whole))
    assert min(again, default=len(whole) + 1) == complete + 1
    # The one being written when it was killed, and the steps since the one before it.
    assert max(killed, default=0) - complete <= 2 * EVERY
    assert killed | again == whole
    assert all(whole[step] == loss for step, loss in killed.items())


def test_killed_while_saving_it_goes_on_from_the_checkpoint_before(tmp_path, capsys):
    folder, steps = tmp_path / "killed", 8
    process = launch(train, str(folder), LARGE, steps)
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        begun = list(folder.glob("*.orbax-checkpoint-tmp/state*"))
        if begun and steps_in(folder):
            process.send_signal(signal.SIGSTOP)  # is it still there when nothing moves?
            if begun[0].exists():
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.002)
    process.kill()
    killed = told(process)
    assert begun[0].exists() and 0 < max(killed) <= steps
    goes_on_equally(folder, killed, train("", LARGE, steps), LARGE)
    assert not list(folder.glob("*tmp*"))  # what the killed run left is gone


@pytest.mark.slow
def test_killed_at_random_moments_the_losses_are_those_of_one_run(tmp_path, capsys):
    size, steps, seconds = 500_000, 24, 0.05
    whole = train("", size, steps)
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / str(number)
        process = launch(train, str(folder), size, steps, seconds)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(rng.uniform(0, seconds * steps))
        process.kill()
        killed = dict([json.loads(first)]) | told(process)
        goes_on_equally(folder, killed, whole, size)


# A full disk.


def fill(folder: str) -> None:
    """Saves a step, then may write no file above 64 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = toy_state(200_000)
    checkpoints = Checkpoints(folder, every=1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoints)
        checkpoints.save(before.replace(step=jnp.int32(1)), position=1, config={})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        checkpoints.save(before.replace(step=jnp.int32(2)), position=2, config={})
        deadline = time.monotonic() + 30
        try:
            while time.monotonic() < deadline:
                checkpoints.due(3)  # as a loop asks after each step
                time.sleep(0.01)
        except OSError as error:
            print(json.dumps([error.errno, str(error)]))
            raise


def test_a_full_disk_names_the_checkpoint_that_is_intact(tmp_path):
    folder = tmp_path / "checkpoints"
    out, errors = launch(fill, str(folder)).communicate(timeout=60)
    number, message = json.loads(out.splitlines()[-1])
    assert number == errno.EFBIG
    assert f"checkpoint 2 could not be written into {folder}" in message
    assert "The newest complete checkpoint is intact: it is step 1" in message
    # A library may complain after it, while the interpreter ends.
    assert "\nOSError: [Errno 27] File too large" in errors
    target = toy_state(200_000)
    found = restored(folder, jax.tree.map(jnp.zeros_like, target))
    assert (found.step, found.skipped) == (1, ())
    chex.assert_trees_all_equal(found.state.trainable, target.trainable)


# Two processes.


def rows_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((64, 60), np.float32)


def sharded(mesh: Any, spec: P, step: int) -> TrainState:
    """A state with a leaf over the mesh, one that is the same on all, and one on each alone."""
    rows = rows_of(step)
    over, same = NamedSharding(mesh, spec), NamedSharding(mesh, P())
    trainable = {
        "rows": jax.make_array_from_callback(rows.shape, over, lambda index: rows[index]),
        "same": jax.make_array_from_callback((3,), same, lambda index: rows[0, :3][index]),
    }
    return TrainState(jnp.int32(step), trainable, (), None, jnp.array(True))


def equal(found: TrainState, step: int) -> bool:
    rows = rows_of(step)
    whole = {"rows": rows, "same": rows[0, :3]}
    return int(found.step) == step and all(
        np.array_equal(shard.data, whole[name][shard.index])
        for name, leaf in found.trainable.items()
        for shard in leaf.addressable_shards
    )


def one_of_two(folder: str, address: str, number: int) -> dict[str, Any]:
    """Writes on a mesh of 2 x 2, and reads back onto it, onto 4, and past a torn one."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    auto = jax.sharding.AxisType.Auto
    square = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(auto, auto))
    line = jax.make_mesh((4,), ("fsdp",), axis_types=(auto,))
    facts: dict[str, Any] = {}
    with Checkpoints(folder, every=1, keep=MANY) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(sharded(square, P("fsdp"), step), position=step, config={})
        for name, mesh, spec in (("square", square, P("data", "fsdp")), ("line", line, P("fsdp"))):
            target = sharded(mesh, spec, 0)
            found = checkpoints.restore(target)
            rows = found.state.trainable["rows"]
            facts[name] = [
                equal(found.state, 3),
                rows.sharding == target.trainable["rows"].sharding,
            ]
        if number == 0:
            for path in Path(folder).glob("3/state/ocdbt.process_1/d/*"):
                path.write_bytes(b"")  # only process 1 will find that out
        jax.experimental.multihost_utils.sync_global_devices("torn")
        found = checkpoints.restore(sharded(line, P("fsdp"), 0))
        facts["torn"] = [found.step, equal(found.state, found.step), [s for s, _ in found.skipped]]
    jax.distributed.shutdown()
    return facts


@pytest.mark.slow
def test_two_processes_write_what_one_process_and_other_meshes_read(tmp_path):
    folder, address = tmp_path / "ck", free_address()
    processes = [launch(one_of_two, str(folder), address, i, devices=2) for i in range(2)]
    for facts in map(result, processes):
        assert facts["square"] == facts["line"] == [True, True]
        assert facts["torn"] == [2, True, [3]]
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    found = restored(folder, sharded(mesh, P("fsdp"), 0))
    assert found.step == 2 and equal(found.state, 2)
