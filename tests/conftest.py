"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Two test processes on two cores: LAPACK's own threads would only wait for one another. It reads
# this when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# XLA's older way to make loops compiles in half the time. `make test-slow` takes its usual one.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Compiled programs outlive the process, so that only the first run of the suite compiles them.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `peers` where torch is not installed."""
    if importlib.util.find_spec("torch") is not None:
        return
    for item in items:
        if item.get_closest_marker("peers"):
            item.add_marker(pytest.mark.skip(reason="needs torch: run `make parity` once"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Small programs take longer to compile than to run: only tests that are `optimised` or `slow`
    are compiled as they are elsewhere. Before fixtures, so that those of a module are too, and in
    the environment, so that processes which a test starts do as it does.
    """
    quickly = not (item.get_closest_marker("optimised") or item.get_closest_marker("slow"))
    jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_file() -> Iterator[None]:
    """Forgets them after each file: each takes memory maps, of which a process may have 65,530,
    and XLA crashes where there are no more. The cache on disk stays.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """For tests that send themselves Ctrl-C, which a process started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A saved model, examples and texts for configs of `jaxheads train` (train_runs.py)."""
    from train_runs import Inputs

    inputs = Inputs(tmp_path_factory.mktemp("inputs"))
    inputs.save_model()
    return inputs


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, loaded once: `(model, tokenizer)`."""
    import jaxheads

    return jaxheads.load("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The folder of recorded reference values."""
    return ROOT / "tests" / "fixtures"
