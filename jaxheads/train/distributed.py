"""Many processes as one JAX program: who they are, meeting, and parting.

The engine is `jax.distributed`; here are only the forms in which a launcher says who a process
is. Connect before anything touches a device: importing is fine, `jax.devices()` is not.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax.experimental import multihost_utils

from jaxheads.names import unknown

FORMS = ("none", "auto", "slurm", "HOST:PORT,N,ID")
TIMEOUT = 300
"""Seconds to wait for the other processes."""

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:,\[\]]+):(?P<port>\d+)")


@dataclass(frozen=True)
class Distributed:
    """Who this process is among those of a run.

    Attributes:
      kind: "none" for a single process, "auto" where JAX finds out by itself (TPU; Slurm and
        Open MPI with one process per GPU), "address" for the fields below.
      coordinator: "host:port" of process 0.
      processes: how many there are.
      process: number of this one, from 0.
      local_devices: numbers of this process's GPUs among those it can see; None for all.
    """

    kind: str = "none"
    coordinator: str = ""
    processes: int = 1
    process: int = 0
    local_devices: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str]) -> Distributed:
        """Reads what a launcher says.

        Args:
          text: "none"; "auto"; "slurm"; or "HOST:PORT,N,ID": process ID of N, of which
            process 0 listens at HOST:PORT.
          environment: variables of the process, which "slurm" reads.

        Raises:
          ValueError: the text has none of these forms, or Slurm's variables are missing or
            contradict each other.
        """
        if text in ("none", "auto"):
            return cls(text)
        if text == "slurm":
            return _from_slurm(environment)
        if "," not in text and ":" not in text:
            raise ValueError(unknown("form of --distributed", text, FORMS))
        return _from_address(text)


def _from_address(text: str) -> Distributed:
    address, *numbers = (part.strip() for part in text.split(","))
    matched = _ADDRESS.fullmatch(address)
    if matched is None or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError(
            f"--distributed {text!r} is not HOST:PORT,N,ID, for instance 10.0.0.1:8476,4,0"
        )
    if not 0 < int(matched["port"]) < 2**16:
        raise ValueError(f"--distributed {text!r}: port {matched['port']} is not in 1..65535")
    processes, process = map(int, numbers)
    if not 0 <= process < processes:
        raise ValueError(
            f"--distributed {text!r}: process {process} is not one of {processes}, numbered from 0"
        )
    return Distributed("address", address, processes, process)


def _from_slurm(environment: Mapping[str, str]) -> Distributed:
    """One process per node, with all of the node's GPUs, or one per GPU or group of GPUs."""

    def read(*names: str) -> str:
        for name in names:
            if environment.get(name):
                return environment[name]
        raise ValueError(
            f"--distributed slurm: {' or '.join(names)} is not set. Start the processes with "
            "srun, or use HOST:PORT,N,ID"
        )

    def number(*names: str) -> int:
        text = read(*names)
        if not text.isdecimal():
            raise ValueError(f"--distributed slurm: {names[0]} is {text!r}, expected a number")
        return int(text)

    processes = number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    process, local = number("SLURM_PROCID"), number("SLURM_LOCALID")
    if not 0 <= process < processes:
        raise ValueError(
            f"--distributed slurm: SLURM_PROCID is {process}, but there are {processes} tasks"
        )
    host = _first_host(read("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    # The dynamic ports end at 65535; jobs that share a node differ in their number.
    port = 65535 - 2**12 + 1 + number("SLURM_JOB_ID") % 2**12
    tasks = _tasks_per_node(
        read("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
        int(environment.get("SLURM_NODEID") or 0),
    )
    gpus = _local_gpus(environment, tasks, local)
    return Distributed("address", f"{host}:{port}", processes, process, gpus)


def _first_host(nodes: str) -> str:
    """The first of a list such as "gpu[003-005,9],login1"."""
    matched = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if matched is None:
        raise ValueError(f"--distributed slurm: no host in the node list {nodes!r}")
    return "".join(part or "" for part in matched.groups())


def _tasks_per_node(text: str, node: int) -> int:
    """Tasks of a node from a list such as "4(x2),3": two nodes of four, one of three."""
    counts: list[int] = []
    for part in text.split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if matched is None:
            raise ValueError(f"--distributed slurm: cannot read the tasks per node {text!r}")
        counts += [int(matched[1])] * int(matched[2] or 1)
    if not 0 <= node < len(counts):
        raise ValueError(f"--distributed slurm: node {node} is not in the tasks per node {text!r}")
    return counts[node]


def _local_gpus(environment: Mapping[str, str], tasks: int, local: int) -> tuple[int, ...] | None:
    """The GPUs of one process, as numbers among those it can see; None without GPUs."""
    shown = next((environment[name] for name in _VISIBLE if environment.get(name)), "")
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    visible = len(shown.split(",")) if shown else int(on_node) if on_node.isdecimal() else 0
    if not visible:
        return None
    # Slurm may already have shown each task its own GPUs alone (--gpus-per-task).
    bound = shown and on_node.isdecimal() and visible < int(on_node)
    if tasks == 1 or bound:
        return tuple(range(visible))
    if visible % tasks:
        raise ValueError(
            f"--distributed slurm: {visible} GPUs of a node cannot be divided among its {tasks} "
            "tasks; use one task per node or one per GPU"
        )
    each = visible // tasks
    return tuple(range(local * each, (local + 1) * each))


def connect(who: Distributed, *, timeout: int = TIMEOUT) -> None:
    """Meets the other processes; to be called before anything touches a device.

    Args:
      who: this process; does nothing where it is the only one.
      timeout: seconds to wait for the others.

    Raises:
      RuntimeError: devices were touched before, or this process is connected already.
      ValueError: process 0 cannot be reached or cannot listen at the address, or nothing says
        who this process is ("auto").

    Where some process never comes, JAX ends those that wait; a line on stderr says so first.
    """
    if who.kind == "none":
        return
    if jax.distributed.is_initialized():
        raise RuntimeError("this process is already connected to others")
    if who.kind == "address":
        _check_reachable(who, timeout)
    addressed = who.kind == "address"
    # Where not all come in time, JAX ends the process with a stack trace: say why before it does.
    last_words = threading.Timer(0.9 * timeout, _missing, (who, timeout))
    last_words.daemon = True
    last_words.start()
    try:
        jax.distributed.initialize(
            who.coordinator if addressed else None,
            who.processes if addressed else None,
            who.process if addressed else None,
            local_device_ids=None if who.local_devices is None else list(who.local_devices),
            # Under Slurm, JAX's own detection would give this process a single GPU.
            cluster_detection_method="deactivate" if addressed else None,
            initialization_timeout=timeout,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed auto: JAX cannot tell who this process is ({error}); use slurm or "
            "HOST:PORT,N,ID"
        ) from error
    except RuntimeError as error:
        if "before any JAX calls" in str(error).replace("\n", " "):
            raise RuntimeError(
                "devices were touched before the processes met: call connect() first"
            ) from error
        raise ValueError(
            f"process {who.process} of {who.processes} did not meet the others at "
            f"{who.coordinator} within {timeout} s: {error}"
        ) from error
    finally:
        last_words.cancel()


def disconnect() -> None:
    """Waits for the other processes to come here too, then parts; nothing for a single one.

    Not for a process that failed: the others would wait for nothing. It just ends, and they are
    told.
    """
    if not jax.distributed.is_initialized():
        return
    multihost_utils.sync_global_devices("jaxheads: the end of the run")
    jax.distributed.shutdown()


def is_main() -> bool:
    """Whether this is process 0, the one that prints and writes logs."""
    return jax.process_index() == 0


def _check_reachable(who: Distributed, timeout: int) -> None:
    """Knocks first: JAX's client ends the whole process where nobody answers."""
    host, _, port = who.coordinator.rpartition(":")
    host = host.strip("[]")
    if who.process == 0:
        _check_free(who.coordinator, int(port))
        return
    deadline, reason = time.monotonic() + timeout, ""
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=min(timeout, 5)).close()
            return
        except OSError as error:
            reason = str(error)
        if time.monotonic() >= deadline:
            raise ValueError(
                f"process {who.process} of {who.processes} cannot reach process 0 at "
                f"{who.coordinator} within {timeout} s: {reason}. Is it running, and is the port "
                "open between the machines?"
            )
        time.sleep(0.2)


def _missing(who: Distributed, timeout: int) -> None:
    print(
        f"process {who.process} of {who.processes}: not all processes have come to "
        f"{who.coordinator or 'the coordinator'}; JAX gives up after {timeout} s",
        file=sys.stderr,
        flush=True,
    )


def _check_free(coordinator: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise ValueError(f"process 0 cannot listen at {coordinator}: {error}") from error
