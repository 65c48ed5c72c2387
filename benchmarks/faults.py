"""Faults of the write path, counted: acknowledged, lost and doubled against the clients' own notes.

Needs root for the full and the read-only disk, and Debian's libfaketime for the clock. The 10,000
hostile bodies are `pytest -m long -s tests/api/test_hostile_bodies.py`.

    python -m benchmarks.faults [--kills 100] [--only full_disk]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.api import fault_scenarios as scenarios
from tests.api.client_log import Tally, kill_and_count


def main() -> None:
    """Run each fault in a folder of its own and print a line of the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default="", help="run one fault")
    given = parser.parse_args()
    faults: dict[str, Callable[[Path], Tally]] = {
        "nearly_full_disk": scenarios.nearly_full_disk,
        "full_disk": scenarios.full_disk,
        "read_only_disk": scenarios.read_only_disk,
        "hung_store": lambda folder: scenarios.hung_store(folder)[0],
        "clock_jumps": scenarios.clock_jumps,
        f"kill_9 x {given.kills}": lambda folder: kill_and_count(
            folder, given.kills, seed=int(time.time())
        ),
    }
    print("| fault | acknowledged | of them after a retry | lost | doubled | strange rows |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, fault in faults.items():
        if name.startswith(given.only):
            with tempfile.TemporaryDirectory() as folder:
                found = fault(Path(folder))
            print(
                f"| {name} | {found.acknowledged} | {found.again} | {found.lost}"
                f" | {found.doubled} | {found.strange} |",
                flush=True,
            )
    if "outage".startswith(given.only):
        print("\n| outage of an hour, spool | written | stored | dropped | doubled | most bytes |")
        print("|---|---|---|---|---|---|")
        for bound in (2**30, 100_000):
            with tempfile.TemporaryDirectory() as folder:
                seen = scenarios.outage(Path(folder), hours=1.0, max_bytes=bound)
            print(
                f"| {bound} bytes | {seen.written} | {seen.stored} | {seen.dropped}"
                f" | {seen.doubled} | {seen.most_bytes} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
