"""Everything that a device has to show, in one call that ends in time.

    python -m benchmarks.device_run tests|benchmarks|throughput [--minutes 9.5]
        [--device cpu --tiny]

Each part is a process of its own with its own share of the time; one that fails or hangs takes
nothing from the others. Tests run side by side, since most of their time is compilation on the
host; benchmarks run one after the other, the most wanted first. Short output goes to the screen,
all of it into the folder that FORESHOCK_RESULTS names (left out: build/device). Ends with 1 if a
part failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LINES = 45


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: Of its file of output.
        command: What follows `python -m`.
        seconds: At most.
        environment: Beside this process's own.
    """

    name: str
    command: tuple[str, ...]
    seconds: float = 300.0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Running:
    """A part that has been started."""

    part: Part
    file: Path
    process: subprocess.Popen[bytes]
    began: float

    def end(self, until: float) -> tuple[int, float]:
        """Wait for it, at most until then; its status and how long it ran. -9 for too long."""
        limit = min(until, self.began + self.part.seconds)
        try:
            status = self.process.wait(max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        return status, time.monotonic() - self.began


def pytest_part(name: str, *arguments: str) -> Part:
    """A run of some of the device's tests."""
    options = ("-q", "-rfE", "--tb=short", "-c", "tests/gpu/pytest.ini", "--noconftest")
    return Part(name, ("pytest", *options, *arguments), seconds=560)


def tests() -> list[Part]:
    """All files of tests/gpu; the longest in pieces."""
    kernels = "tests/gpu/test_kernels.py"
    return [
        pytest_part("test_graphs", "tests/gpu/test_graphs.py"),
        pytest_part("test_monitor", "tests/gpu/test_monitor.py"),
        pytest_part("test_kernels_bf16", kernels, "-k", "any_shape and bf16"),
        pytest_part("test_kernels_e5m2", kernels, "-k", "any_shape and e5m2"),
        pytest_part("test_kernels_e4m3", kernels, "-k", "any_shape and e4m3"),
        pytest_part("test_kernels_rest", kernels, "-k", "not any_shape"),
        pytest_part(
            "test_device_rows", "tests/gpu/test_device_rows.py", "tests/gpu/test_fused_norms.py"
        ),
        pytest_part("test_watch", "tests/gpu/test_watch.py"),
        pytest_part("test_blocks", "tests/gpu/test_blocks.py"),
        pytest_part("test_nccl", "tests/gpu/test_nccl.py"),
        pytest_part("test_transformer_engine", "tests/gpu/test_transformer_engine.py"),
        pytest_part("test_precision", "tests/gpu/test_precision.py"),
    ]


def benchmarks() -> list[Part]:
    """What docs/benchmarks.md reports, the most wanted first."""

    def step_times(part: str, *options: str, seconds: float = 150.0) -> Part:
        width = options[options.index("--width") + 1] if "--width" in options else "1024"
        command = ("benchmarks.te_overhead", "--part", part, *options)
        return Part(f"te_overhead_{part}_{width}", command, seconds)

    bandwidth = ("benchmarks.statistics_bandwidth", "--rounds", "6", "--tensors", "6")
    return [
        Part("statistics_bandwidth", bandwidth, 150),
        step_times("every", "--rounds", "7"),
        step_times("every", "--width", "4096", "--rounds", "3", seconds=180),
        step_times("te", "--rounds", "2", "--steps", "5", seconds=90),
        step_times("plain", "--rounds", "5", seconds=90),
        step_times("exact", "--rounds", "3", seconds=90),
        Part("te_parity", ("benchmarks.te_parity",), 90),
    ]


def throughput() -> list[Part]:
    """Whole training steps of FOG in FP8 beside Llama 3 in BF16, the most wanted first."""

    def size(width: int, vocabulary: int, seconds: int, *options: str) -> Part:
        command = ("benchmarks.throughput", "--width", str(width), "--vocabulary", str(vocabulary))
        limit = ("--seconds", str(seconds - 10))
        return Part(f"throughput_{width}_{vocabulary}", (*command, *limit, *options), seconds)

    return [
        size(4096, 256, 110),
        size(4096, 131_072, 110, "--layers", "3"),
        size(2048, 256, 90),
        size(1024, 256, 90),
        size(2048, 131_072, 90),
    ]


def dry() -> list[Part]:
    """The same scripts where there is no device: that nothing in them is misspelt."""
    interpreted = {"TRITON_INTERPRET": "1"}
    tiny = ("--device", "cpu", "--tiny", "--rounds", "1", "--tensors", "1")
    step = ("--device", "cpu", "--width", "64", "--tokens", "32", "--steps", "1", "--eager")
    small = ("--device", "cpu", "--tokens", "16", "--width", "64", "--rounds", "1", "--steps", "1")
    return [
        Part("statistics_bandwidth", ("benchmarks.statistics_bandwidth", *tiny), 250, interpreted),
        Part("te_overhead_plain", ("benchmarks.te_overhead", "--part", "plain", *small), 120),
        Part("throughput", ("benchmarks.throughput", *step, "--recipes", "llama_bf16"), 120),
        Part("nothing", ("benchmarks.te_overhead", "--part", "none"), 60),
    ]


def start(part: Part, folder: Path) -> Running:
    """Run a part, its output into a file."""
    file = folder / f"{part.name}.txt"
    paths = [str(ROOT / path) for path in ("", "monitor", "trainer", "api")]
    paths += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | part.environment
    with file.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *part.command],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    return Running(part, file, process, time.monotonic())


def summary(text: str) -> str:
    """Tables, and of failures the ends."""
    lines = [line for line in text.splitlines() if line.strip()]
    wanted = [x for x in lines if re.match(r"\||E  |FAILED|ERROR|\d+ (passed|failed)|.*Error", x)]
    return "\n".join((wanted or lines)[-_LINES:])


def run(parts: Sequence[Part], folder: Path, until: float, *, together: bool) -> int:
    """Run the parts; how many failed."""
    failed = 0
    started = [start(part, folder) for part in parts] if together else []
    for number, part in enumerate(parts):
        if not together and time.monotonic() > until - 10:
            print(f"== {part.name}: no time left")
            failed += 1
            continue
        running = started[number] if together else start(part, folder)
        status, seconds = running.end(until)
        word = "too long" if status == -9 else "ok" if status == 0 else f"failed ({status})"
        print(f"== {part.name}: {word}, {seconds:.0f} s")
        print(summary(running.file.read_text(errors="replace")), flush=True)
        failed += status != 0
    return failed


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("tests", "benchmarks", "throughput"))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="with --device cpu: a dry run")
    options = parser.parse_args()
    until = time.monotonic() + options.minutes * 60
    folder = Path(os.environ.get("FORESHOCK_RESULTS", ROOT / "build" / "device"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        parts, together = dry(), False
    elif options.what == "tests":
        parts, together = tests(), True
    else:
        parts = benchmarks() if options.what == "benchmarks" else throughput()
        together = False
    sys.exit(1 if run(parts, folder, until, together=together) else 0)


if __name__ == "__main__":
    main()
