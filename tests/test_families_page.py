"""docs/families.md is what its script writes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jaxheads.convert.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "scripts" / "make_families_page.py"
    spec = importlib.util.spec_from_file_location("make_families_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_the_page_is_not_stale(script: ModuleType) -> None:
    stored = script.PAGE.read_text(encoding="utf-8")
    assert stored == script.page(), "run python scripts/make_families_page.py"


def test_it_is_the_code_that_the_page_follows(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = script.page()
    assert all(f"\n| {name} | " in page for name in FAMILIES)
    assert "no case" not in page
    rest = {name: family for name, family in FAMILIES.items() if name != "opt"}
    monkeypatch.setattr(script, "FAMILIES", rest)
    assert "| opt |" in page and "| opt |" not in script.page()
