"""The kernels without a device: the assertions of tests/gpu, through Triton's interpreter.

In a process of its own: whether kernels are compiled or interpreted is decided when Triton is
imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each takes a second or more; all of them are run by `make test-long`.
FEW = (
    "matrix or ragged or scalar or codes or histogram or flag or nothing_to_measure or rows_add"
    " or test_device_rows or test_fused_norms or details_every_second"
)


def run(*arguments: str) -> int:
    """How many of the kernels' tests passed; none may fail or be skipped."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", "--noconftest",
            "-m", "gpu and not cuda", "tests/gpu/test_kernels.py",
            "tests/gpu/test_device_rows.py", "tests/gpu/test_fused_norms.py",
            "tests/gpu/test_watch.py", *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout, done.stdout[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed.group(1))


@pytest.mark.long
def test_the_kernels_assertions_hold() -> None:
    assert run("-k", FEW) >= 29


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_of_the_kernels_assertions_hold() -> None:
    assert run() >= 114
