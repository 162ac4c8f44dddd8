"""Who a process is, and two real processes that meet over gloo.

The processes run this file as a script.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxheads.train.distributed import Distributed, connect, disconnect, is_main

ROOT = Path(__file__).resolve().parent.parent


def parse(text: str, **environment: str) -> Distributed:
    return Distributed.parse(text, environment)


# What launchers say.


def test_forms():
    assert parse("none") == Distributed("none")
    assert parse("auto").kind == "auto"
    assert parse("10.0.0.1:8476,4,3") == Distributed("address", "10.0.0.1:8476", 4, 3)
    assert parse("[::1]:80,2,0").coordinator == "[::1]:80"
    connect(parse("none"))  # a single process meets nobody
    disconnect()
    assert is_main()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slrum", r"unknown form of --distributed 'slrum'\. Did you mean 'slurm'"),
        ("", "unknown form of --distributed"),
        ("host,2,0", "'host,2,0' is not HOST:PORT,N,ID"),
        ("host:80,2", "is not HOST:PORT,N,ID"),
        ("host:80,2,-1", "is not HOST:PORT,N,ID"),
        ("host:80,two,0", "is not HOST:PORT,N,ID"),
        ("ho st:80,2,0", "is not HOST:PORT,N,ID"),
        ("host:80,2,2", "process 2 is not one of 2, numbered from 0"),
        ("host:99999,2,0", "port 99999 is not in 1..65535"),
    ],
)
def test_malformed(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu[003-005,9],login1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip


def slurm(**changes: str) -> Distributed:
    return Distributed.parse("slurm", SLURM | changes)


def test_slurm_with_one_process_per_node_has_all_of_its_gpus():
    found = slurm(SLURM_GPUS_ON_NODE="8", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert found == Distributed("address", "gpu003:61441", 4, 2, tuple(range(8)))
    assert slurm(SLURM_GPUS_ON_NODE="8").local_devices == tuple(range(8))
    assert slurm().local_devices is None  # no GPUs


def test_slurm_with_one_process_per_gpu():
    tasks = {"SLURM_STEP_TASKS_PER_NODE": "4,2(x2)", "SLURM_NTASKS": "8", "SLURM_PROCID": "3",
             "SLURM_NODEID": "0", "SLURM_LOCALID": "3"}  # fmt: skip
    shared = slurm(**tasks, SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert shared.local_devices == (3,)
    # Each task was shown its own alone, which is then its number 0.
    bound = slurm(**tasks, SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="3")
    assert bound.local_devices == (0,)
    several = slurm(**tasks, SLURM_GPUS_ON_NODE="8", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert several.local_devices == (6, 7)
    last = slurm(**tasks | {"SLURM_NODEID": "2", "SLURM_LOCALID": "1"}, SLURM_GPUS_ON_NODE="2")
    assert last.local_devices == (1,)
    with pytest.raises(ValueError, match="3 GPUs of a node cannot be divided among its 4 tasks"):
        slurm(**tasks, SLURM_GPUS_ON_NODE="3")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[01-03]", "n01"), ("n[7,9]", "n7"), ("n[5]", "n5"),
     ("a[1-2]-ib,b", "a1-ib"), ("gpu-a-12,gpu-b[1-2]", "gpu-a-12")],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes, first):
    assert slurm(SLURM_STEP_NODELIST=nodes).coordinator == f"{first}:61441"


def test_slurm_variables_that_do_not_fit():
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS or SLURM_NTASKS is not set"):
        parse("slurm")
    with pytest.raises(ValueError, match="SLURM_PROCID is 4, but there are 4 tasks"):
        slurm(SLURM_PROCID="4")
    with pytest.raises(ValueError, match="SLURM_LOCALID is 'x', expected a number"):
        slurm(SLURM_LOCALID="x")
    with pytest.raises(ValueError, match="cannot read the tasks per node '1x4'"):
        slurm(SLURM_STEP_TASKS_PER_NODE="1x4")
    with pytest.raises(ValueError, match="node 7 is not in the tasks per node"):
        slurm(SLURM_NODEID="7")


# Processes.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def launch(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip().splitlines()[-1] if out.strip() else "", err


def main(form: str, timeout: str) -> None:
    """Meets the others and sums over the devices of all."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxheads.train.mesh import Mesh, make_mesh

    jax.config.update("jax_num_cpu_devices", 2)
    if form.startswith("late "):
        jax.devices()
        form = form.removeprefix("late ")
    try:
        connect(Distributed.parse(form, {}), timeout=int(timeout))
    except (ValueError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    mesh = make_mesh(Mesh(fsdp=2))
    assert mesh is not None
    where = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    mine = np.arange(2.0) + 10 * jax.process_index()
    total = jnp.sum(jax.make_array_from_process_local_data(where, mine))
    found = {"main": is_main(), "devices": jax.device_count(), "sum": float(total)}
    disconnect()
    print(json.dumps(found))


def test_two_processes_meet_over_gloo():
    port = free_port()
    started = [launch(f"localhost:{port},2,{process}", "60") for process in (0, 1)]
    found = [finish(process) for process in started]
    assert [code for code, _, _ in found] == [0, 0], found
    # gloo may say that it is connected, in lines before.
    assert [json.loads(out.splitlines()[-1]) for _, out, _ in found] == [
        {"main": first, "devices": 4, "sum": 0 + 1 + 10 + 11} for first in (True, False)
    ]


@pytest.mark.slow
def test_failures_to_meet_are_told():
    port = free_port()
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        begin = time.monotonic()
        started = {
            f"process 1 of 2 cannot reach process 0 at localhost:{port} within 1 s": launch(
                f"localhost:{port},2,1", "1"
            ),
            f"process 0 cannot listen at localhost:{busy}": launch(f"localhost:{busy},2,0", "1"),
            "devices were touched before the processes met": launch(
                f"late localhost:{port},1,0", "1"
            ),
        }
        for message, process in started.items():
            code, out, err = finish(process)
            assert code == 0, err
            assert message in json.loads(out)["error"]
        assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_a_process_that_never_comes():
    """JAX ends the process that waits; before that, a line says for whom."""
    code, _, err = finish(launch(f"localhost:{free_port()},2,0", "2"))
    assert code != 0
    assert "process 0 of 2: not all processes have come to localhost" in err


if __name__ == "__main__":
    main(*sys.argv[1:])
