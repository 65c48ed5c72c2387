"""The check of pinned packages: a vulnerability fails it, and silence is not called a pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


GOOD = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["2.1"]}]}
ABSENT = {"name": "c", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("packages", "code", "said", "unsaid"),
    [
        ([GOOD], 0, "1 packages looked up, 0 known", "NOT DONE"),
        ([GOOD, BAD], 1, "b 2: CVE-2026-1, fixed in 2.1", "NOT DONE"),
        ([GOOD, ABSENT], 0, "NOT DONE: the service had nothing on 1 packages (c)", "CVE"),
        ([], 0, "NOT DONE: the report names no package", "CVE"),
        ([ABSENT], 0, "0 packages looked up", "CVE"),
        ([BAD, ABSENT], 1, "NOT DONE", "no version"),
    ],
)
def test_what_a_report_means(
    audit: ModuleType, packages: list[dict[str, Any]], code: int, said: str, unsaid: str
) -> None:
    found, lines = audit.verdict({"dependencies": packages})
    text = "\n".join(lines)
    assert found == code
    assert said in text
    assert unsaid not in text


def test_a_tool_that_fails_is_told_and_not_called_a_pass(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "PINS", Path("/nowhere/constraints.txt"))
    assert audit.main() == 0
    assert "NOT DONE" in capsys.readouterr().out
