"""The examples run as they stand, and their records say what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock.monitor.record import StepRecord, read_stream, table_to_records

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def records_in(spool: Path) -> list[StepRecord]:
    sealed = sorted(spool.glob("*/*/*/*.arrow"))
    return [r for path in sealed for r in table_to_records(read_stream(path.read_bytes()))]


@pytest.mark.long
# torchtitan's needs a process that takes a CPU for an accelerator (test_torchtitan).
@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if "torchtitan" not in p.stem], ids=lambda p: p.stem
)
def test_example_runs_and_is_recorded(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"FORESHOCK_SPOOL": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("loss ")]
    printed = {int(step): float(loss) for _, step, loss in lines}
    assert list(printed) == list(range(24))
    records = records_in(tmp_path)
    assert {record.step: record.scalars["loss"] for record in records} == printed
    assert {t.identity.role for t in records[0].tensors} == {"input", "weight", "grad_output"}
    formats = {t.identity.format for t in records[0].tensors}
    assert formats == ({"e4m3", "e5m2"} if "float8" in path.stem else {"fp32"})


def test_docs_show_the_examples_as_they_are() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        assert f"```python\n{path.read_text()}```" in page, path.name
        assert len(path.read_text().splitlines()) <= 70
