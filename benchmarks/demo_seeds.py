"""The demonstration on fresh seeds: leads, false alarms, and how long each takes.

    python -m benchmarks.demo_seeds [--seeds 101 102 ...]

Prints one line per seed as `foreshock demo` ends it, then how many gave lead > 0 without a false
alarm. It judges nothing itself.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time

COMMAND = "from foreshock.api.cli.main import run; run()"


def run_one(seed: int) -> tuple[str, float]:
    """The last line of one demonstration and its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "demo", "--seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else f"nothing, exit code {done.returncode}", time.monotonic() - began


def good(line: str) -> bool:
    """Whether the alarm came before the rise, arrived, and nothing fired on healthy steps."""
    match = re.search(r"lead=(-?\d+)", line)
    quiet = "delivered=yes healthy_alarms=0" in line
    return match is not None and int(match[1]) > 0 and quiet


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1001, 1011)))
    seeds = parser.parse_args().seeds
    wins = 0
    for seed in seeds:
        line, seconds = run_one(seed)
        wins += good(line)
        print(f"{line} seconds={seconds:.0f}", flush=True)
    print(f"{wins} of {len(seeds)} seeds: lead > 0, delivered, no alarm on healthy steps")


if __name__ == "__main__":
    main()
