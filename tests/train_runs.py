"""Small runs of `jaxheads train`, in this process or in others, for the tests of the command."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxheads as jh
from jaxheads.cli.app import main
from jaxheads.methods.from_scratch import learn_tokenizer
from jaxheads.model.parameters import flatten
from jaxheads.train.writers import METRICS

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),  # as in conftest.py
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
COMMAND = [sys.executable, "-m", "jaxheads.cli", "train"]
SECONDS = 240
"""After which a process of a test is given up; the machine may be busy."""
WORDS = ("the", "cat", "dog", "ran", "sat", "on", "mat", "hat", "big", "red", "under", "over")

SCRATCH = """
[data]
source = "text:{text}"
options = {{ unit = "block", held_out = 0.2 }}
length = 16
[method]
name = "from_scratch"
vocabulary = 272
[method.shape]
n_layers = 2
n_heads = 2
d_model = 16
d_mlp = 32
context_length = 32
[method.fit]
steps = 6
batch_size = 4
optimizer = {{ learning_rate = 1e-2 }}
[loop]
checkpoint_every = 2
"""
"""A language model from scratch; its parameters are what is trained."""

LORA = """
model = "{model}"
[data]
source = "jsonl:{examples}"
options = {{ held_out = 0.25 }}
[method]
name = "lora"
rank = 2
[method.fit]
steps = 6
batch_size = 4
optimizer = {{ learning_rate = 1e-2 }}
[loop]
checkpoint_every = 2
"""
"""LoRA on a small random model that was saved; edits are what is trained."""


class Inputs:
    """The files that the configs speak of, and the configs, in one folder."""

    def __init__(self, folder: Path) -> None:
        rng = random.Random(0)
        self.folder = folder
        self.text = folder / "text.txt"
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(10, 40))) + "." for _ in range(80)]
        self.text.write_text("\n\n".join(texts))
        self.examples = folder / "examples.jsonl"
        lines = [{"prompt": " ".join(rng.choices(WORDS, k=4)), "answer": " cat"} for _ in range(60)]
        self.examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.model = folder / "model"
        self._texts = texts

    def save_model(self, **fields: int) -> Path:
        """The random model of `LORA`."""
        tokenizer = learn_tokenizer(self._texts, 272)
        shape: dict[str, Any] = {
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 8,
            "d_model": 16,
        }
        shape |= {"d_mlp": 512, "context_length": 32} | fields
        config = jh.ModelConfig(**shape, vocab_size=tokenizer.vocab_size)
        jh.save(jh.Transformer.random(config, jax.random.key(0)), tokenizer, self.model)
        return self.model

    def config(self, form: str = SCRATCH, *changes: tuple[str, str], more: str = "") -> Path:
        """A config in which some text is replaced, and more is added at the end."""
        places = {"text": self.text, "examples": self.examples, "model": self.model}
        text = form.format(**places)
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = self.folder / f"config{len(list(self.folder.glob('config*.toml')))}.toml"
        path.write_text(text + more)
        return path


def command(*argv: object, config: Path, workdir: Path) -> list[str]:
    return [*COMMAND, "--config", str(config), "--workdir", str(workdir), *map(str, argv)]


def start(
    *argv: object,
    config: Path,
    workdir: Path,
    devices: int = 1,
    folder: Path | None = None,
) -> subprocess.Popen[str]:
    """The command in a process of its own: on how many fake devices, and in which folder."""
    return _process(command(*argv, config=config, workdir=workdir), devices, folder)


def several(
    *argvs: tuple[object, ...], config: Path, workdir: Path, devices: int
) -> list[tuple[int, str, str]]:
    """The command with one list of arguments after the other, in one other process.

    Returns:
      The exit code, what was printed, and errors, of each.
    """
    told = [[*map(str, argv)] for argv in argvs]
    argv = [sys.executable, __file__, str(config), str(workdir), json.dumps(told)]
    code, out, errors = end(_process(argv, devices))
    assert code == 0, errors
    return [tuple(one) for one in json.loads(out)]


def _process(argv: list[str], devices: int, folder: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, what was printed, and errors."""
    try:
        out, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        raise AssertionError(f"still running after {SECONDS} s\n{out}\n{errors}") from None
    return process.returncode, out, errors


def start_two(
    *argv: object, folders: Sequence[Path | None] = (None, None), **where: Any
) -> list[subprocess.Popen[str]]:
    """Two processes over gloo, in these folders."""
    address = f"localhost:{free_port()}"
    return [
        start(*argv, "--distributed", f"{address},2,{n}", folder=folder, **where)
        for n, folder in enumerate(folders)
    ]


def train(*argv: object, processes: int = 1, **where: Any) -> str:
    """A run that must end well; what it, or its first process, printed."""
    started = [start(*argv, **where)] if processes == 1 else start_two(*argv, **where)
    ended = [end(process) for process in started]
    assert [code for code, _, _ in ended] == [0] * processes, ended
    return ended[0][1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> bool:
    """Waits for a condition; False if the process ends first."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        if process is not None and process.poll() is not None:
            return condition()
        time.sleep(0.002)
    return True


def here(*argv: object, config: Path, workdir: Path) -> int:
    """The exit code of the command in this process."""
    return main(command(*argv, config=config, workdir=workdir)[3:])


# What a run leaves.


def losses(workdir: Path) -> dict[int, float]:
    """The loss of every step; each is there once, in order."""
    rows = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1)), steps
    return {row["step"]: row["loss"] for row in rows}


def close(found: Mapping[int, float], expected: Mapping[int, float]) -> None:
    """Equal to 1e-5."""
    assert list(found) == list(expected)
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=0, atol=1e-5)


def results(workdir: Path) -> dict[str, Any]:
    """results.json without what differs between equal runs: seconds and devices."""
    found: dict[str, Any] = json.loads((workdir / "results.json").read_text())
    del found["seconds"], found["environment"]
    return found


def parameters(workdir: Path) -> dict[str, bytes]:
    """The parameters of the model that a run wrote."""
    model, _ = jh.load(workdir / "model")
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(model.params)}


def steps_saved(workdir: Path, stage: str = "from-scratch") -> list[int]:
    """Steps of the complete checkpoints."""
    folder = workdir / "checkpoints" / stage
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def logged(workdir: Path) -> int:
    """Steps in the log."""
    path = workdir / METRICS
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def mid_save(workdir: Path) -> bool:
    """Whether a checkpoint is being written, after one that is complete."""
    folder = workdir / "checkpoints" / "from-scratch"
    return bool(steps_saved(workdir)) and any(folder.glob("*.orbax-checkpoint-tmp*/state*"))


if __name__ == "__main__":
    found = []
    for argv in json.loads(sys.argv[3]):
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = here(*argv, config=Path(sys.argv[1]), workdir=Path(sys.argv[2]))
        found.append((code, out.getvalue(), errors.getvalue()))
    print(json.dumps(found))
