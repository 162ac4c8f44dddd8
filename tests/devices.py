"""Functions of test files in processes of their own, with fake devices.

A process has one set of devices, so what needs several, or may be killed, needs another one. It
runs this file as a script. Arguments and results travel as JSON: tuples arrive as lists.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),  # as in conftest.py
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "OPENBLAS_NUM_THREADS": "1",
}
SECONDS = 500
"""After which a process is given up; the machine may be busy."""


def launch(
    function: Callable[..., Any], *arguments: Any, devices: int = 1
) -> subprocess.Popen[str]:
    """A process that calls a function of a test file, then prints the result as its last line.

    Args:
      function: defined at the top level of a file of this folder.
      arguments: of types that JSON has.
      devices: how many fake devices the process has.
    """
    command = [sys.executable, __file__, Path(inspect.getfile(function)).stem, function.__name__]
    return subprocess.Popen(
        [*command, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)},
    )


def result(process: subprocess.Popen[str]) -> Any:
    """What the function of `launch` returned, in a process that must end well."""
    try:
        out, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        raise AssertionError(f"still running after {SECONDS} s\n{out}\n{errors[-4000:]}") from None
    assert process.returncode == 0, errors[-4000:]
    return json.loads(out.splitlines()[-1])


def on_eight_devices(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of 8 fake devices."""
    return result(launch(function, *arguments, devices=8))


def free_address() -> str:
    """Where processes that `launch` starts can meet."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


if __name__ == "__main__":
    module, name, told = sys.argv[1:]
    found = getattr(importlib.import_module(module), name)(*json.loads(told))
    print(json.dumps(found))
