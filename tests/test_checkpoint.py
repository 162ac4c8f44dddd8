"""Checkpoints: what comes back, which are kept, what is refused, and torn ones."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from saved_states import MANY, restored, saved, state, steps_in

import jaxheads as jh
from jaxheads.train.checkpoint import Checkpoints, Keep
from jaxheads.train.partial import restore_part
from jaxheads.train.step import start


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
