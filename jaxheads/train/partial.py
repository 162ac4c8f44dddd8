"""The arrays of one checkpoint, by name: read whole or in part, compared before they are read.

A checkpoint holds one flat table, e.g. "trainable/z/offset": the names are the paths of the
pytree, so a part of it is the names with one beginning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from jaxheads.train.workdir import run_path

STATE = "state"
RUN = "run"

# Of the storage, not of the file: the same file may be read well a minute later.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED", "ABORTED")
_SHOWN = 5


class Torn(Exception):
    """A checkpoint that lacks files or parts of them; the message says what was found."""


def by_name(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a pytree by the names under which a checkpoint holds them.

    Raises:
      ValueError: two leaves with one name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [
        "/".join(filter(None, (prefix, jax.tree_util.keystr(path, simple=True, separator="/"))))
        for path, _ in leaves
    ]
    table = dict(zip(names, (leaf for _, leaf in leaves), strict=True))
    if len(table) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves of the pytree have the name {twice!r}")
    return table


def saveable(tree: Any) -> dict[str, Any]:
    """The leaves to write; those without any element are left out, as orbax refuses them.

    Where several processes run, what lies on one process alone is written by the first.
    """
    table = {}
    for name, leaf in by_name(tree).items():
        alone = not isinstance(leaf, jax.Array) or (
            jax.process_count() > 1 and leaf.is_fully_addressable
        )
        if np.size(leaf):
            table[name] = np.asarray(leaf, jnp.result_type(leaf)) if alone else leaf
    return table


def read(folder: epath.Path, target: Any, prefix: str = "") -> tuple[Any, dict[str, Any]]:
    """Reads arrays of one checkpoint.

    Args:
      folder: of one step.
      target: a pytree of arrays or `jax.ShapeDtypeStruct`s, whose structure, shapes, dtypes and
        shardings the result takes; a leaf without a sharding goes to the first local device.
      prefix: path of `target` within the checkpoint, e.g. "trainable"; empty: all of it.

    Returns:
      The pytree, and what was written beside it (position, config, version, metrics).

    Raises:
      Torn: files are missing or too short; on every process if on one.
      ValueError: the arrays are other ones; the message names the first of them.
    """
    wanted = {name: _abstract(leaf) for name, leaf in by_name(target, prefix).items()}
    reason, different = "", ""
    values: dict[str, Any] = {}
    run: dict[str, Any] = {}
    try:
        run = ocp.JsonCheckpointHandler().restore(folder / RUN)
        if missing := {"position", "config", "version", "metrics"} - set(run):
            raise ValueError(f"{RUN} lacks {', '.join(sorted(missing))}")
        different = _differences(_stored(folder / STATE), wanted, prefix)
        if not different:
            values = _values(folder / STATE, wanted)
    except Exception as error:
        reason = _torn(error)
        if not reason:
            raise
    if _on_any_process(bool(reason)):
        raise Torn(reason or "another process could not read its part")
    if different:
        raise ValueError(
            f"checkpoint {folder} is of another model, method or optimizer: {different}"
        )
    return jax.tree.unflatten(jax.tree.structure(target), [values[name] for name in wanted]), run


def restore_part(
    folder: str | os.PathLike[str],
    target: Any,
    path: Sequence[str] = ("trainable",),
    *,
    step: int | None = None,
) -> Any:
    """Reads a part of a run's checkpoint, e.g. its edits, onto a model from somewhere else.

    Changes nothing in the folder, so it may be used while the run goes on. Of several processes,
    all call it.

    Args:
      folder: as `Checkpoints` has it; local or an address such as gs://bucket/run.
      target: the part: a pytree of arrays or `jax.ShapeDtypeStruct`s, whose structure, shapes,
        dtypes and shardings the result takes.
      path: where the part is, e.g. ("trainable", "z").
      step: of the checkpoint; None: the newest intact one.

    Returns:
      The part.

    Raises:
      FileNotFoundError: no such checkpoint, or none that is intact; the message says which are
        torn and how.
      ValueError: the part has other arrays; the message names the first of them.
    """
    place = epath.Path(run_path(folder))
    steps = stored_steps(place)
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise FileNotFoundError(f"no checkpoint of step {step} in {place}. There are: {known}")
    chosen = steps[::-1] if step is None else [step]
    value, _, _, _ = read_newest(place, chosen, target, "/".join(path))
    return value


def read_newest(
    folder: epath.Path, steps: Sequence[int], target: Any, prefix: str = ""
) -> tuple[Any, dict[str, Any], int, list[tuple[int, str]]]:
    """`read` on the first of `steps` that is intact.

    Returns:
      The pytree, what was written beside it, the step, and (step, reason) of the torn ones
      before it.

    Raises:
      FileNotFoundError: none is intact.
      ValueError: as `read`.
    """
    torn: list[tuple[int, str]] = []
    for step in steps:
        try:
            return *read(folder / str(step), target, prefix), step, torn
        except Torn as error:
            torn.append((step, str(error)))
    told = "; ".join(f"checkpoint {step} is torn ({reason})" for step, reason in torn)
    raise FileNotFoundError(f"no intact checkpoint in {folder}" + (f": {told}" if told else ""))


def stored_steps(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, rising; of a folder that is absent, none."""
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _stored(folder: epath.Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every array, from the headers alone."""
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    return {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in by_name(tree).items()}


def _differences(
    stored: Mapping[str, tuple[tuple[int, ...], Any]],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    prefix: str,
) -> str:
    """The first few arrays that differ, in words; empty where none does."""
    there = {
        name: f"{np.dtype(dtype).name}{list(shape)}"
        for name, (shape, dtype) in stored.items()
        if not prefix or name == prefix or name.startswith(f"{prefix}/")
    }
    here = {
        name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in wanted.items() if leaf.size
    }
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if not names:
        return ""
    told = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in names[:_SHOWN]
    ]
    more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} arrays differ: {'; '.join(told)}{more}"


def _values(folder: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    filled = {name: leaf for name, leaf in wanted.items() if leaf.size}
    arguments = ocp.args.PyTreeRestore(
        item=filled,
        restore_args=ocp.checkpoint_utils.construct_restore_args(filled),
        partial_restore=True,
    )
    # The handler itself, not a checkpointer: no process waits for another that finds a torn file.
    values = ocp.PyTreeCheckpointHandler().restore(folder, args=arguments) if filled else {}
    empty = {name: leaf for name, leaf in wanted.items() if not leaf.size}
    return values | {
        name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in empty.items()
    }


def _on_any_process(fact: bool) -> bool:
    if jax.process_count() == 1:
        return fact
    return bool(np.any(multihost_utils.process_allgather(np.array(fact))))


def _torn(error: BaseException) -> str:
    """What is wrong with the files, in words; empty if the error is of another kind."""
    while error.__cause__ is not None:  # orbax hands on the error of a read as its cause
        error = error.__cause__
    if not isinstance(error, (OSError, ValueError, KeyError)):
        return ""
    if isinstance(error, PermissionError) or str(error).startswith(_PASSING):
        return ""
    # Tensorstore's messages end with pages of settings.
    text = str(error).split(" [tensorstore_spec", 1)[0].split("\n", 1)[0]
    return f"{type(error).__name__}: {text}"
