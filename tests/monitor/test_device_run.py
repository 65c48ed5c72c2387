"""The scripts for a device run without one: a slip of the pen must not cost the device's time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import device_run

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_dry_run_says_what_failed_and_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.device_run", "benchmarks", "--device", "cpu", "--tiny"],
        cwd=ROOT,
        env=os.environ | {"FORESHOCK_RESULTS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "== statistics_bandwidth: ok" in done.stdout, done.stdout + done.stderr
    assert "| ours, with sqnr |" in done.stdout
    assert "== te_overhead_plain: ok" in done.stdout
    assert "| ours every 10 |" in done.stdout
    assert "== throughput: ok" in done.stdout
    # The last part does not exist, which is told and counted.
    assert "== nothing: failed (2)" in done.stdout
    assert done.returncode == 1
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{part.name}.txt" for part in device_run.dry()
    }


def test_every_file_of_tests_is_run() -> None:
    named = {word for part in device_run.tests() for word in part.command if word.endswith(".py")}
    assert named == {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")}


def test_a_part_that_hangs_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hangs = device_run.Part("hangs", ("http.server", "0", "--bind", "127.0.0.1"), seconds=1)
    after = device_run.Part("after", ("benchmarks.device_run", "--help"), seconds=60)
    until = time.monotonic() + 120
    assert device_run.run([hangs, after], tmp_path, until, together=False) == 1
    printed = capsys.readouterr().out
    assert "== hangs: too long" in printed
    assert "== after: ok" in printed
