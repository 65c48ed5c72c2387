"""Where the CPU of an acknowledged row goes: decoding step by step, INSERTs, merges.

In one process, without HTTP; threads of the engine are told apart by their names. CPU time holds
on a busy machine better than wall time does, and still grows with it.

    python -m benchmarks.ingest_cost [--group 8] [--groups 50]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.ingest import LAYERS, ROWS, STEPS, make_table
from foreshock.api.arrowguard import read_guarded
from foreshock.api.store_open import open_store
from foreshock.api.store_rows import BatchFacts, Placed, place, split
from foreshock.api.store_url import ChdbPlace
from foreshock.api.wire import digest
from foreshock.monitor.record import conform, validate, write_stream

CLOCK = os.sysconf("SC_CLK_TCK")
IDS = {name: index for index, name in enumerate(LAYERS)}
RUNS = 16
LIMIT = 2**28


def placed(number: int) -> Placed:
    """Where batch `number`, from 0, belongs."""
    attempts = np.ones(STEPS, np.int64)
    return Placed(run_id=f"r{number % RUNS}", attempts=attempts, commit=number + 1, layer_ids=IDS)


def milliseconds(action: Callable[[], object], times: int = 40) -> float:
    """CPU of one call, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(times):
            action()
        best = min(best, (time.process_time() - start) / times)
    return 1000 * best


def decoding() -> dict[str, float]:
    """Milliseconds of CPU per batch and step of decoding."""
    body = write_stream(make_table(0, np.random.default_rng(0)))
    read = read_guarded(body, LIMIT)
    table = validate(conform(read))
    facts = split(table)
    return {
        "read the Arrow stream": milliseconds(lambda: read_guarded(body, LIMIT)),
        "conform": milliseconds(lambda: conform(read)),
        "validate": milliseconds(lambda: validate(table)),
        "digest": milliseconds(lambda: digest(body)),
        "split": milliseconds(lambda: split(table)),
        "place": milliseconds(lambda: place(facts, placed(0))),
    }


def by_thread() -> dict[str, float]:
    """CPU seconds of this process per name of a thread."""
    found: dict[str, float] = defaultdict(float)
    for task in Path("/proc/self/task").iterdir():
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        fields = rest.split()
        found[name] += (int(fields[11]) + int(fields[12])) / CLOCK
    return found


def storing(group: int, groups: int) -> tuple[float, dict[str, float]]:
    """Milliseconds per group, and CPU seconds per million rows and name of a thread."""
    rng = np.random.default_rng(0)
    facts: list[BatchFacts] = [split(make_table(STEPS * i, rng)) for i in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(ChdbPlace(Path(folder) / "store"), lambda _: LAYERS)
        store.append([place(facts[0], placed(0))])
        made = [place(facts[n % len(facts)], placed(n)) for n in range(1, group * groups + 1)]
        before, start = by_thread(), time.perf_counter()
        for first in range(0, len(made), group):
            store.append(made[first : first + group])
        seconds = time.perf_counter() - start
        # What the last INSERTs leave to merge is theirs too.
        time.sleep(5)
        after = by_thread()
        store.close()
    millions = group * groups * ROWS / 1e6
    spent = {name: (cpu - before.get(name, 0.0)) / millions for name, cpu in after.items()}
    return 1000 * seconds / groups, spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--group", type=int, default=8, help="batches per INSERT")
    parser.add_argument("--groups", type=int, default=50)
    given = parser.parse_args()
    print(f"CPU ms per batch of {ROWS} rows:")
    for name, cost in decoding().items():
        print(f"  {name:24} {cost:.2f}")
    wall, spent = storing(given.group, given.groups)
    print(f"{wall:.1f} ms per group of {given.group}; CPU s per million rows, by thread:")
    for name, cost in sorted(spent.items(), key=lambda item: -item[1]):
        if cost >= 0.01:
            print(f"  {name:24} {cost:.2f}")


if __name__ == "__main__":
    main()
