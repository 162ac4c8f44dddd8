"""Checkpoints: kept, torn, of another model, on a full disk, killed, and of two processes.

Some of it needs processes of its own, which run this file as a script.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxheads as jh
from jaxheads.train.checkpoint import Checkpoints, Keep
from jaxheads.train.partial import restore_part
from jaxheads.train.step import TrainState, make_step, start

ROOT = Path(__file__).resolve().parent.parent
CACHED = {  # as in conftest.py
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "OPENBLAS_NUM_THREADS": "1",
}


MANY = Keep(newest=9)


def state(step: int, value: float = 1.0) -> TrainState:
    """Every kind of leaf: nested, in a tuple, of five dtypes, of no element, absent."""
    key = jax.random.fold_in(jax.random.key(0), step)
    trainable = {
        "z": {"offset": value * jax.random.normal(key, (40, 20)), "none": jnp.zeros((0, 3))},
        "kernel": jnp.full((3, 4), value, jnp.bfloat16),
    }
    optimizer = (jnp.full(3, step, jnp.uint8), [jnp.ones(2) * step], optax.EmptyState())
    return TrainState(jnp.int32(step), trainable, optimizer, None, jnp.array(step != 2))


def saved(folder: Path, *steps: int, keep: Keep = MANY, **metrics: list[float]) -> Path:
    """A folder with checkpoints of these steps, each metric given step by step."""
    with Checkpoints(folder, every=1, keep=keep) as checkpoints:
        for n, step in enumerate(steps):
            found = {name: values[n] for name, values in metrics.items()}
            checkpoints.save(
                state(step), position=8 * step, config={"at": step}, metrics=found or None
            )
    return folder


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def restored(folder: Path, target: TrainState | None = None) -> Any:
    with Checkpoints(folder, every=1, keep=MANY) as checkpoints:
        return checkpoints.restore(state(0) if target is None else target)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Steps 1, 2 and 3; not to be changed."""
    return saved(tmp_path_factory.mktemp("three") / "checkpoints", 1, 2, 3)


# What comes back.


@pytest.mark.parametrize("abstract", [False, True])
def test_everything_comes_back_as_it_was(tmp_path, abstract):
    folder = saved(tmp_path, 1, 2)
    target = state(0)
    if abstract:
        device = SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), target
        )
    found = restored(folder, target)
    assert (found.step, found.position, found.config) == (2, 16, {"at": 2})
    assert (found.version, found.skipped, found.notes) == (jh.__version__, (), [])
    assert found.state.average is None and not found.state.finite
    chex.assert_trees_all_equal(found.state, state(2))
    chex.assert_trees_all_equal_dtypes(found.state, state(2))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.state))


def test_edits_come_back_alone_onto_their_own_structure(tmp_path):
    config = jh.ModelConfig(
        n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_model=32, d_mlp=64, vocab_size=20,
        context_length=64,
    )  # fmt: skip
    edits = jh.mask_heads(config, [(0, 1)], how="zero")
    whole = start({"edits": edits, "bias": jnp.ones(3)}, optax.adam(0.1), average=True)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(whole, position=0, config={}, force=True)
    blank = jax.tree.map(jnp.zeros_like, edits)
    part = restore_part(tmp_path, blank, ("trainable", "edits"))
    assert type(part) is type(edits)
    chex.assert_trees_all_equal(part, edits)
    chex.assert_trees_all_equal(
        restored(tmp_path, jax.tree.map(jnp.zeros_like, whole)).state, whole
    )


def test_a_part_of_a_chosen_step(three):
    offset = jnp.zeros((40, 20))
    for step in (None, 1):
        part = restore_part(three, {"offset": offset, "none": jnp.zeros((0, 3))},
                            ("trainable", "z"), step=step)  # fmt: skip
        chex.assert_trees_all_equal(part, state(step or 3).trainable["z"])
    leaf = restore_part(str(three), offset, ("trainable", "z", "offset"))
    chex.assert_trees_all_equal(leaf, state(3).trainable["z"]["offset"])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*There are: 1, 2, 3"):
        restore_part(three, offset, step=7)
    with pytest.raises(ValueError, match=r"z/offset is float32\[40, 20\] there and absent"):
        restore_part(three, {"other": offset}, ("trainable", "z"))
    assert steps_in(three) == [1, 2, 3]


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


# What is kept, and when.


def test_which_checkpoints_stay(tmp_path):
    loss = [5.0, 1.0, 3.0, float("nan"), 2.0, 6.0]
    cases = {
        Keep(): [5, 6],
        Keep(newest=1, every=4, best="loss"): [2, 4, 6],
        Keep(newest=1, best="-loss"): [6],
        Keep(newest=1, best="accuracy"): [6],
    }
    for number, (keep, expected) in enumerate(cases.items()):
        folder = saved(tmp_path / str(number), *range(1, 7), keep=keep, loss=loss)
        assert steps_in(folder) == expected, keep
        with Checkpoints(folder, every=1, keep=keep) as checkpoints:
            best = {"loss": 2, "-loss": 6}.get(keep.best or "")
            assert (checkpoints.best(), checkpoints.latest) == (best, 6), keep


def test_the_best_of_an_earlier_run_stays(tmp_path):
    keep = Keep(newest=1, best="-accuracy")
    saved(tmp_path, 1, 2, 3, keep=keep, accuracy=[0.2, 0.9, 0.5])
    saved(tmp_path, 4, 5, keep=keep, accuracy=[0.7, 0.1])
    assert steps_in(tmp_path) == [2, 5]
    saved(tmp_path, 6, keep=keep)  # without a measurement
    assert steps_in(tmp_path) == [2, 6]


def test_saved_when_due_or_forced_and_never_twice(tmp_path):
    with Checkpoints(tmp_path, every=3, keep=MANY) as checkpoints:
        assert [step for step in range(1, 8) if checkpoints.due(step)] == [3, 6]
        for step in (1, 3, 4):
            checkpoints.save(state(step), position=0, config={}, force=step == 4)
        checkpoints.save(state(4), position=99, config={}, force=True)
        assert not checkpoints.due(3) and checkpoints.due(6)
    assert steps_in(tmp_path) == [3, 4]
    assert restored(tmp_path).position == 0


# Bad input.


def test_settings_out_of_range_are_refused(tmp_path):
    for bad, message in [
        ({"newest": 0}, "newest must be at least 1 checkpoint, got 0"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"best": "-"}, "best must be the name of a metric, got '-'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Keep(**bad)
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match=r"'gs:/bucket/run' has lost a slash"):
        Checkpoints(Path("gs://bucket/run"), every=1)


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no intact checkpoint in"):
        restored(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="no intact checkpoint in"):
        restore_part(tmp_path / "absent", jnp.zeros(3))
    assert not (tmp_path / "absent").exists()


def test_the_checkpoint_of_another_model_is_named_not_passed_over(three):
    other = state(0).replace(average=jnp.zeros(2))
    other.trainable["z"]["offset"] = jnp.zeros((40, 30))
    other.trainable["kernel"] = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"3 is of another model, method or optimizer") as error:
        restored(three, other)
    for part in (
        "3 arrays differ",
        "trainable/z/offset is float32[40, 20] there and float32[40, 30] here",
        "trainable/kernel is bfloat16[3, 4] there and float32[3, 4] here",
        "average is absent there and float32[2] here",
    ):
        assert part in str(error.value)
    assert steps_in(three) == [1, 2, 3]


def test_another_version_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(jh, "__version__", "0.0.1")
    saved(tmp_path, 1)
    monkeypatch.undo()
    found = restored(tmp_path)
    assert found.notes == [f"checkpoint 1 was written by jaxheads 0.0.1, this is {jh.__version__}"]


# Torn checkpoints.


# Tensorstore's other reads fail after the first has been told, each with a warning.
NOISY = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def torn_copies(folder: Path, into: Path) -> Any:
    """Copies of a folder whose step 3 lacks one file, or half of it, or all its bytes.

    Each has a path of its own: tensorstore remembers what it has read by path.
    """
    files = sorted(path for path in (folder / "3").rglob("*") if path.is_file())
    for number, file in enumerate(files):
        for share in (None, 0.5, 0.0):
            copy = copytree(folder, into / f"{number}-{share}")
            target = copy / file.relative_to(folder)
            if share is None:
                target.unlink()
            else:
                target.write_bytes(target.read_bytes()[: int(share * target.stat().st_size)])
            yield copy, file.relative_to(folder / "3").as_posix()


@NOISY
def test_whichever_file_is_torn_no_wrong_number_comes_back(three, tmp_path):
    told = set()
    for copy, file in torn_copies(three, tmp_path):
        found = restored(copy)
        assert found.step in (2, 3), file
        chex.assert_trees_all_equal(found.state, state(found.step))
        assert found.position == 8 * found.step and found.config == {"at": found.step}
        if found.step == 2:
            told.add(file)
            assert [step for step, _ in found.skipped] == [3]
            assert "checkpoint 3 is torn (" in found.notes[0]
            assert found.notes[0].endswith("; going on from 2, which is intact")
            assert "\n" not in found.notes[0] and "tensorstore_spec" not in found.notes[0]
            assert steps_in(copy) == [1, 2] and (copy / "3.torn").is_dir()
        else:
            assert found.notes == []
    assert {"run/metadata", "state/_METADATA", "state/manifest.ocdbt"} <= told
    # The values themselves: one large file of data, and the table that points into it.
    assert any(file.startswith("state/ocdbt.process_0/d/") for file in told)


def tear(folder: Path, step: int) -> None:
    files = [path for path in (folder / str(step)).rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])


@NOISY
def test_a_step_that_was_torn_is_saved_again(tmp_path):
    tear(saved(tmp_path, 1, 2, 3), 3)
    with Checkpoints(tmp_path, every=1, keep=MANY) as checkpoints:
        assert checkpoints.restore(state(0)).step == 2
        assert checkpoints.latest == 2 and checkpoints.due(3)
        checkpoints.save(state(3, value=7.0), position=0, config={})
    chex.assert_trees_all_equal(restored(tmp_path).state, state(3, value=7.0))


@NOISY
def test_where_all_are_torn_nothing_is_restored_or_moved(tmp_path):
    folder = saved(tmp_path, 1, 2)
    for step in (1, 2):
        tear(folder, step)
    with pytest.raises(FileNotFoundError, match=r"checkpoint 2 is torn .*; checkpoint 1 is torn"):
        restored(folder)
    assert steps_in(folder) == [1, 2]


@NOISY
def test_a_part_comes_from_the_newest_intact_checkpoint(tmp_path):
    tear(saved(tmp_path, 1, 2), 2)
    kernel = restore_part(tmp_path, jnp.zeros((40, 20)), ("trainable", "z", "offset"))
    chex.assert_trees_all_equal(kernel, state(1).trainable["z"]["offset"])
    assert steps_in(tmp_path) == [1, 2]


# A training run that is killed.

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


def train(folder: str, size: str, steps: str, seconds: str = "0") -> dict[int, str]:
    """A toy run that goes on from its newest checkpoint; prints and returns its losses.

    Without a folder it saves nothing.
    """
    now, step = toy_state(int(size)), make_step(toy_loss, OPTIMIZER)
    losses = {}
    with Checkpoints(folder, every=EVERY) if folder else contextlib.nullcontext() as checkpoints:
        if checkpoints is not None and checkpoints.latest is not None:
            now = checkpoints.restore(now).state
        for index in range(int(now.step), int(steps)):
            now, metrics = step(now, None, toy_batch(index))
            losses[index + 1] = float(metrics["loss"]).hex()
            print(json.dumps([index + 1, losses[index + 1]]), flush=True)
            if checkpoints is not None:
                checkpoints.save(now, position=4 * (index + 1), config={})
            time.sleep(float(seconds))
    return losses


def run(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | CACHED)


def told(process: subprocess.Popen[str]) -> dict[int, str]:
    """The losses of a run that was killed."""
    out, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    lines = out.splitlines(keepends=True)
    return dict(json.loads(line) for line in lines if line.endswith("\n"))


def goes_on_equally(folder: Path, killed: dict[int, str], whole: dict[int, str], size: int) -> None:
    complete = max(steps_in(folder), default=0)
    again = train(str(folder), str(size), str(len(whole)))
    assert min(again, default=len(whole) + 1) == complete + 1
    # The one being written when it was killed, and the steps since the one before it.
    assert max(killed, default=0) - complete <= 2 * EVERY
    assert killed | again == whole
    assert all(whole[step] == loss for step, loss in killed.items())


def test_killed_while_saving_it_goes_on_from_the_checkpoint_before(tmp_path, capsys):
    folder, steps = tmp_path / "killed", 8
    process = run("train", str(folder), str(LARGE), str(steps))
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
    goes_on_equally(folder, killed, train("", str(LARGE), str(steps)), LARGE)
    assert not list(folder.glob("*tmp*"))  # what the killed run left is gone


@pytest.mark.slow
def test_killed_at_random_moments_the_losses_are_those_of_one_run(tmp_path, capsys):
    size, steps, seconds = 500_000, 24, 0.05
    whole = train("", str(size), str(steps))
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / str(number)
        process = run("train", str(folder), str(size), str(steps), str(seconds))
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
    out, errors = run("fill", str(folder)).communicate(timeout=60)
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


def one_of_two(folder: str, address: str, number: str) -> None:
    """Writes on a mesh of 2 x 2, and reads back onto it, onto 4, and past a torn one."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
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
        if number == "0":
            for path in Path(folder).glob("3/state/ocdbt.process_1/d/*"):
                path.write_bytes(b"")  # only process 1 will find that out
        jax.experimental.multihost_utils.sync_global_devices("torn")
        found = checkpoints.restore(sharded(line, P("fsdp"), 0))
        facts["torn"] = [found.step, equal(found.state, found.step), [s for s, _ in found.skipped]]
    jax.distributed.shutdown()
    print(json.dumps(facts))


@pytest.mark.slow
def test_two_processes_write_what_one_process_and_other_meshes_read(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [run("one_of_two", str(tmp_path / "ck"), address, str(i)) for i in range(2)]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        facts = json.loads(out.splitlines()[-1])
        assert facts["square"] == facts["line"] == [True, True]
        assert facts["torn"] == [2, True, [3]]
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    found = restored(tmp_path / "ck", sharded(mesh, P("fsdp"), 0))
    assert found.step == 2 and equal(found.state, 2)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
