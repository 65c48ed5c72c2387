"""Transformer Engine debug logs: the statistics file of nvidia-dlfw-inspect.

A line is time, level, `<layer>_<tensor>_<stat>`, `iteration=000012` and `value=0.1234`, the value
with four decimals. What that leaves too few digits of to take a logarithm is left out and counted.
Which statistic goes where in a record is `foreshock.monitor.te_records`, as in a live run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from foreshock.api.cli.importers.points import (
    Imported,
    ImportedRun,
    ImportProblem,
    Moment,
    Point,
    Report,
    assemble,
    clock,
)
from foreshock.api.cli.importers.values import as_number
from foreshock.monitor.record import Event, StepRecord
from foreshock.monitor.te_records import TE_ROLES, TEStatistic, parse_te_name, te_record

__all__ = ["LINE", "read_te_debug"]

LINE: Final = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - \w+ - (?P<name>\S.*?)\s+"
    r"iteration=(?P<step>\d+)\s+value=(?P<value>[-+]?(?:nan|inf|[\d.]+(?:e[-+]?\d+)?))\s*$",
    re.IGNORECASE,
)
_RANK: Final = re.compile(r"_globalrank-(\d+)\.log$")
# With four decimals the rounding is up to 10 % of a value here and above ...
_AMAX_DIGITS: Final = 0.0005
# ... and up to 1 % here: headroom is asked for in fractions of a bit.
_SCALE_DIGITS: Final = 0.005
_EXTREMES: Final = ("min", "max", "cur_amax")


def read_te_debug(files: Sequence[Path]) -> Imported:
    """Read the statistics files of the ranks of one job.

    Transformer Engine reduces over its group before it logs, so ranks of a group repeat each other;
    where they do not, the largest amax, the extreme scales and the mean of the rest are taken.

    Raises:
        ImportProblem: No line of statistics.
    """
    report = Report("te-debug")
    per_rank = {_rank(f): assemble(_points(f, report), report) for f in sorted(files, key=_rank)}
    stages = max(len(found) for found in per_rank.values())
    attempts = []
    for index in range(stages):
        ranks = [found[index] for found in per_rank.values() if index < len(found)]
        steps = sorted({step for rank in ranks for step in rank})
        attempts.append(tuple(_record(s, [r[s] for r in ranks if s in r], report) for s in steps))
    if not attempts:
        raise ImportProblem(f"{files[0]} holds no line of Transformer Engine statistics")
    report.notes.append("times are read as UTC")
    report.notes.append(
        "formats are those of HYBRID: e4m3, and e5m2 for gradients; the log does not say"
    )
    return Imported((ImportedRun(None, tuple(attempts)),), report)


def _rank(path: Path) -> tuple[int, str]:
    found = _RANK.search(path.name)
    return (int(found[1]) if found else 0, str(path))


def _points(path: Path, report: Report) -> Iterator[Point]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            found = LINE.match(line)
            if found is None:
                report.skipped["lines that are no statistics"] += bool(line.strip())
                continue
            value = as_number(found["value"])
            if value is None:
                report.skipped["lines whose value is no number"] += 1
                continue
            yield Point(found["name"].strip(), int(found["step"]), value, _time(found["time"]))


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(f"{text}000+0000", "%Y-%m-%d %H:%M:%S,%f%z")
    except ValueError:
        return None


def _record(step: int, ranks: Sequence[Moment], report: Report) -> StepRecord:
    found: dict[str, list[float]] = {}
    for moment in ranks:
        for name, value in moment.values.items():
            found.setdefault(name, []).append(value)
    parsed = {name: parse_te_name(name) for name in found}
    merged = {name: _merged(parsed[name], values) for name, values in found.items()}
    kept = {n: v for n, v in merged.items() if _printed_well(parsed[n], v, report)}
    values = _without_stray_ranges(kept, report).items()
    record = te_record(values, step=step, time=clock(step, ranks[0].time))
    events = _nonfinite_events((parsed[name], value) for name, value in merged.items())
    return StepRecord(step, record.time, record.scalars, record.tensors, tuple(events))


def _merged(name: TEStatistic, values: Sequence[float]) -> float:
    if any(math.isnan(value) for value in values):
        return math.nan
    if name.statistic in ("cur_amax", "max", "scale_inv_max", "dynamic_range"):
        return max(values)
    if name.statistic in ("min", "scale_inv_min"):
        return min(values)
    return sum(values) / len(values)


def _printed_well(name: TEStatistic, value: float, report: Report) -> bool:
    """Whether four decimals left enough of a value whose logarithm will be taken."""
    least = -math.inf
    if name.statistic == "cur_amax":
        least = _AMAX_DIGITS
    elif name.statistic.startswith("scale_inv_"):
        least = _SCALE_DIGITS
    if value < least:
        report.skipped[f"{name.statistic} below {least:g}: the log has too few digits of it"] += 1
        return False
    return True


def _without_stray_ranges(kept: Mapping[str, float], report: Report) -> dict[str, float]:
    """A range is kept as the smallest value, which takes an amax."""
    left = {}
    for name, value in kept.items():
        amax = name.removesuffix("dynamic_range") + "cur_amax"
        if name.endswith("_dynamic_range") and not math.isfinite(kept.get(amax, math.nan)):
            report.skipped["dynamic_range without a finite amax"] += 1
        else:
            left[name] = value
    return left


def _nonfinite_events(values: Iterable[tuple[TEStatistic, float]]) -> Iterator[Event]:
    seen = set()
    for name, value in values:
        role = TE_ROLES.get(name.tensor)
        if name.statistic in _EXTREMES and not math.isfinite(value) and role:
            if (name.layer, role) not in seen:
                yield Event("nonfinite", layer=name.layer, role=role)
            seen.add((name.layer, role))
