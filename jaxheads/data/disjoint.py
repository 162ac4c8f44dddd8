"""The hosts' proof, before the first step, that together they read each example once."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxheads.data.batches import Batches

_PROBES = 8
_SETTINGS = ("rows", "batch_size", "seed", "hosts", "checksum of the rows")


def prove_disjoint(batches: Batches, position: int, *, hosts: int | None = None) -> np.ndarray:
    """Compares what all processes are about to read.

    The processes exchange their settings and a checksum of eight rows spread over the data,
    then the numbers of their examples. Processes that stand for the same host (because a
    model's shards span them) must read the same.

    Args:
      batches: this process's batches.
      position: number of the batch's first example.
      hosts: into how many parts the batch should be divided; default the number of processes.

    Returns:
      int64 [n, B/n]: the numbers of the rows that each host reads, for the log.

    Raises:
      ValueError: on every process at once, if their settings or rows differ, if two hosts
        share an example, or if what they read is not the whole batch.
    """
    settings = [
        len(batches.rows), batches.batch_size, batches.seed, batches.hosts, _checksum(batches)
    ]  # fmt: skip
    check_settings(_gather(np.array(settings, np.int64)))
    wanted = jax.process_count() if hosts is None else hosts
    if batches.hosts != wanted:
        raise ValueError(
            f"batches are divided among {batches.hosts} hosts, but there are {wanted}: each "
            "process must pass its own host and the number of hosts"
        )
    found = _gather(np.concatenate([[batches.host], batches.examples(position)]))
    whole = np.concatenate([batches.examples(position, h) for h in range(batches.hosts)])
    return check_examples(found[:, 0], found[:, 1:], whole) % len(batches.rows)


def check_settings(settings: np.ndarray) -> None:
    """Checks that all processes have the same [processes, settings].

    Raises:
      ValueError: they differ; the message names the setting and two processes.
    """
    for name, values in zip(_SETTINGS, settings.T, strict=True):
        other = np.flatnonzero(values != values[0])
        if len(other):
            raise ValueError(
                f"processes disagree on {name} of the data: process 0 has {values[0]}, process "
                f"{other[0]} has {values[other[0]]}"
            )


def check_examples(
    hosts: Sequence[int] | np.ndarray, examples: np.ndarray, whole: np.ndarray
) -> np.ndarray:
    """Checks that the hosts' examples are disjoint and together the whole batch.

    Args:
      hosts: [processes], which host each process stands for.
      examples: int64 [processes, B/n], the numbers of the examples it is about to read.
      whole: int64 [B], the examples of the batch.

    Returns:
      int64 [n, B/n], the examples of each host in the order of hosts.

    Raises:
      ValueError: two hosts share an example, two processes of one host differ, a host is not
        there, or the union is not the whole batch.
    """
    parts: dict[int, tuple[int, np.ndarray]] = {}
    for process, (host, own) in enumerate(zip(hosts, examples, strict=True)):
        first, known = parts.setdefault(int(host), (process, own))
        if not np.array_equal(own, known):
            raise ValueError(f"processes {first} and {process} of host {host} read different rows")
    owner: dict[int, int] = {}
    for host, (_, own) in parts.items():
        for example in own.tolist():
            if owner.setdefault(example, host) != host:
                raise ValueError(
                    f"hosts {owner[example]} and {host} would both read example {example}"
                )
    left = np.setdiff1d(whole, np.fromiter(owner, np.int64, len(owner)))
    if len(left) or len(owner) != len(whole):
        raise ValueError(
            f"processes stand for hosts {sorted(parts)} and read {len(owner)} of the batch's "
            f"{len(whole)} examples; {len(left)} are read by none"
            + (f", such as example {left[0]}" if len(left) else "")
        )
    return np.stack([own for _, (_, own) in sorted(parts.items())])


def _checksum(batches: Batches) -> int:
    probes = np.unique(np.linspace(0, len(batches.rows) - 1, _PROBES).astype(np.int64))
    total = 0
    for leaf in jax.tree.leaves(batches.rows[probes]):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total


def _gather(values: np.ndarray) -> np.ndarray:
    """Each process's int64 [k], as [processes, k]."""
    if jax.process_count() == 1:
        return values[None]
    # As 32-bit halves: JAX cuts 64-bit integers where x64 is off.
    halves = np.ascontiguousarray(values, np.int64).view(np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(halves))
    return np.ascontiguousarray(gathered).view(np.int64)
