"""From a whole corpus to the part of it that is small enough to keep in the repository.

python -m benchmarks.corpus_extract --corpus build/corpus --out OUT --megabytes 12

Writes OUT/corpus (shards, runs.jsonl: what `load_corpus` reads) and OUT/corpus_summary.json, which
counts runs and events of the whole. Runs are taken in turn from every combination of architecture,
recipe, kind and outcome, with their twins, until the size is reached. Loss stays float32 at every
step; signals become float16, those of tensors at every n-th step only.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from foreshock.api.labels import label_run
from foreshock.api.signals import SIGNALS, TENSOR_SIGNALS

LARGEST = 60_000.0
SPARE_BITS = 2
"""Of float16's ten: a thousandth of a value tells a forecast nothing, and noise does not pack."""
FIRST_SHARD = 64
MOST_SHARDS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """A line of runs.jsonl, where its rows are, and what became of it."""

    line: dict[str, Any]
    shard: Path
    diverges: bool

    @property
    def cell(self) -> tuple[str, ...]:
        """Runs of one cell say much the same."""
        line = self.line
        kind = line.get("fault_family") or line.get("hard") or line.get("kind") or "unknown"
        return (line["architecture"], line["recipe"], str(kind), str(self.diverges))


def read(corpus: Path) -> list[Run]:
    """Every run of the corpus, labelled by its loss."""
    found = []
    for shard in sorted(corpus.glob("shards/*.parquet")):
        table = pq.read_table(shard, columns=["run", "step", "raw_loss"])
        lines = json.loads((table.schema.metadata or {})[b"foreshock.runs"])
        # A shard holds its runs one after the other, all of one length.
        losses = table["raw_loss"].to_numpy().reshape(len(lines), -1).astype(np.float64)
        steps = np.arange(losses.shape[1])
        found += [
            Run(completed(line), shard, bool(label_run(steps, loss).diverges))
            for line, loss in zip(lines, losses, strict=True)
        ]
    return found


def completed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the first plan with the keys of the second that follow from it."""
    model, precision = line["config"]["model"], line["config"]["precision"]
    recipe = "bf16"
    if precision["backend"] != "bf16":
        length = precision["history"] if precision["scaling"] == "delayed" else ""
        recipe = f"fp8_{precision['scaling']}{length}"
    truth = line.get("truth")
    known = {
        "architecture": model["architecture"],
        "width": model["width"],
        "layers": model["layers"],
        "recipe": recipe,
        "kind": "unknown" if truth is None else "fault",
        "hard": None,
        "fault_family": None if truth is None else truth["kind"],
        "planned_events": [],
        "twin": None,
        "split": "fit",
    }
    return known | line


def mend(corpus: Path) -> int:
    """Write losses anew where they are not those of the signals; how many shards that were.

    The first sweep's shards from cores hold the last window's losses at every window; the signal
    `loss` beside them is right, but for infinities, which it does not tell from NaN.
    """
    mended = 0
    for shard in sorted(corpus.glob("shards/*.parquet")):
        table = pq.read_table(shard)
        raw, loss = table["raw_loss"].to_numpy(), table["loss"].to_numpy()
        finite = table["loss_nonfinite"].to_numpy() == 0
        with np.errstate(invalid="ignore"):
            same = np.abs(raw - loss) <= 1e-3 * np.abs(loss)
        if bool(same[finite].all()):
            continue
        right = pa.array(np.where(finite, loss, np.nan).astype(np.float32))
        place = table.column_names.index("raw_loss")
        unfinished = shard.with_suffix(".part")
        pq.write_table(table.set_column(place, "raw_loss", right), unfinished, compression="zstd")
        unfinished.replace(shard)
        mended += 1
    return mended


def in_turn(runs: list[Run], seed: int) -> Iterator[list[Run]]:
    """Runs cell by cell in turn, each with its twin."""
    random = np.random.default_rng(seed)
    cells: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for index in random.permutation(len(runs)).tolist():
        cells[runs[index].cell].append(runs[index])
    named = {run.line["run"]: run for run in runs}
    taken: set[str] = set()
    while cells:
        for cell in sorted(cells):
            run = cells[cell].pop()
            if not cells[cell]:
                del cells[cell]
            pair = [run]
            twin = run.line.get("twin")
            if twin in named:
                pair.append(named[twin])
            pair = [one for one in pair if one.line["run"] not in taken]
            taken.update(one.line["run"] for one in pair)
            if pair:
                yield pair


def thinned(run: Run, table: pa.Table, every: int) -> pa.Table:
    """The rows of a run, in half precision."""
    part = table.filter(pc.equal(table["run"], run.line["run"]))
    step = part["step"].to_numpy()
    columns: dict[str, Any] = {
        "run": pa.array([run.line["run"]] * len(step)).dictionary_encode(),
        "step": pa.array(step.astype(np.int32)),
        "raw_loss": pa.array(part["raw_loss"].to_numpy().astype(np.float32)),
    }
    kept = step % every == 0
    for name in SIGNALS:
        values = part[name].to_numpy().astype(np.float32)
        if name in TENSOR_SIGNALS:
            values = np.where(kept, values, np.nan)
        columns[name] = pa.array(rounded(values))
    return pa.table(columns)


def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float16 without its last bits, rounded; NaN stays NaN."""
    half = np.clip(values, -LARGEST, LARGEST).astype(np.float16)
    bits = half.view(np.uint16).astype(np.int32)
    # Numbers near the largest would become infinite; they are clipped far below it.
    up = (bits + (1 << (SPARE_BITS - 1))) & ~((1 << SPARE_BITS) - 1)
    made: np.ndarray[Any, Any] = np.where(
        np.isnan(half), half, up.astype(np.uint16).view(np.float16)
    )
    return made


def write(tables: list[pa.Table], path: Path) -> int:
    """Bytes of the shard."""
    signals = list(SIGNALS)
    pq.write_table(
        pa.concat_tables(tables, promote_options="default"),
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=["run", "step"],
        column_encoding=dict.fromkeys(["raw_loss", *signals], "BYTE_STREAM_SPLIT"),
        write_statistics=False,
    )
    return path.stat().st_size


def summary(runs: list[Run]) -> dict[str, object]:
    """Counts of the whole: runs and events by everything that evaluations leave out."""
    tables: dict[str, dict[str, list[int]]] = {}
    for key in ("architecture", "recipe", "kind", "hard", "fault_family", "split", "width"):
        total: Counter[str] = Counter(str(run.line.get(key)) for run in runs)
        events = Counter(str(run.line.get(key)) for run in runs if run.diverges)
        tables[key] = {name: [count, events[name]] for name, count in sorted(total.items())}
    return {
        "runs": len(runs),
        "events": sum(run.diverges for run in runs),
        "model_steps": sum(int(run.line["config"]["steps"]) for run in runs),
        "runs_and_events": tables,
    }


def main() -> None:
    """Write the extract."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=12.0)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{mend(options.corpus)} shards mended", flush=True)
    runs = read(options.corpus)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary(runs), indent=1)
    (options.out / "corpus_summary.json").write_text(text + "\n")
    print(text, flush=True)
    extract(runs, options.out / "corpus", options)


def extract(runs: list[Run], folder: Path, options: argparse.Namespace) -> None:
    """Write shards until the size is reached; the first tells how large a run comes out."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    budget = options.megabytes * 1e6
    written, lines = 0, list[str]()
    order = in_turn(runs, options.seed)
    for shard in range(MOST_SHARDS):
        per_run = written / len(lines) if lines else 45_000.0
        room = int((budget - written) / per_run)
        share = -(-room // (MOST_SHARDS - shard)) if lines else min(FIRST_SHARD, room)
        waiting = list[Run]()
        for pair in order:
            waiting += pair
            if len(waiting) >= share:
                break
        if not waiting or room < 1:
            break
        tables = _read_all(waiting, options.every)
        written += write(tables, folder / "shards" / f"extract-{shard}.parquet")
        for run in waiting:
            lines.append(json.dumps(run.line | {"extract_every": options.every}))
            written += len(lines[-1]) + 1
        (folder / "runs.jsonl").write_text("".join(f"{line}\n" for line in lines))
        print(f"{len(lines)} runs, {written / 1e6:.1f} MB in {shard + 1} shards", flush=True)


def _read_all(runs: list[Run], every: int) -> list[pa.Table]:
    by_shard: dict[Path, list[Run]] = defaultdict(list)
    for run in runs:
        by_shard[run.shard].append(run)
    tables = []
    for shard, some in sorted(by_shard.items()):
        table = pq.read_table(shard)
        table = table.set_column(
            table.column_names.index("run"), "run", table["run"].cast(pa.string())
        )
        tables += [thinned(run, table, every) for run in some]
    return tables


if __name__ == "__main__":
    main()
