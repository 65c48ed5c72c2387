"""Logs of text: Hugging Face's trainer_state.json, and any lines by a regular expression."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from foreshock.api.cli.importers.names import Names
from foreshock.api.cli.importers.points import Imported, ImportProblem, Point, Report, scalar_runs
from foreshock.api.cli.importers.separated import encoding_of
from foreshock.api.cli.importers.values import as_number, as_step

__all__ = ["read_lines", "read_trainer_states"]

_AROUND: Final = " \t,;|()[]{}'\""


def read_trainer_states(files: Sequence[Path], names: Names) -> Imported:
    """The `log_history` of Hugging Face's Trainer.

    Args:
        files: Of one training: checkpoints repeat the history so far, so the longest is read.
        names: What the log's names mean.

    Raises:
        ImportProblem: No such history, or an entry without a step.
    """
    path, history = max(((p, _history(p)) for p in files), key=lambda found: len(found[1]))
    report = Report("hf")
    if len(files) > 1:
        report.notes.append(f"of {len(files)} histories {path} is the longest; read that one")
    present = list(dict.fromkeys(name for entry in history for name in entry))
    names.check(present)
    step = names.step(present) or "step"
    report.names = names.of_all(name for name in present if name != step)
    runs = scalar_runs({None: _entries(path, history, step, report)}, report)
    report.notes.append(
        "Trainer replaces a NaN loss by the running mean unless logging_nan_inf_filter=False"
    )
    return Imported(runs, report)


def _history(path: Path) -> list[dict[str, Any]]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return [dict(entry) for entry in state["log_history"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ImportProblem(f"{path} has no log_history of a Trainer: {error!r}"[:300]) from None


def _entries(
    path: Path, history: list[dict[str, Any]], step: str, report: Report
) -> Iterator[Point]:
    for number, entry in enumerate(history, 1):
        at = as_step(entry.get(step))
        if at is None:
            raise ImportProblem(f"{path}: entry {number} of log_history has no whole {step}")
        for name, cell in entry.items():
            value = as_number(cell)
            if name != step and value is not None:
                yield Point(report.names[name], at, value)
            elif name != step:
                report.skipped[f"{name} (no number)"] += 1


def read_lines(path: Path, pattern: str, names: Names) -> Imported:
    """Any log, by a regular expression with a group `step` and one group a scalar.

    Raises:
        ImportProblem: The expression is none, has no such groups, or matches nothing.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ImportProblem(f"--regex: {error}") from None
    groups = [name for name in expression.groupindex if name not in ("step", "run")]
    if "step" not in expression.groupindex or not groups:
        raise ImportProblem(
            "--regex needs a group (?P<step>...) and one more, such as (?P<loss>...)"
        )
    names.check(expression.groupindex)
    report = Report("regex")
    report.names = names.of_all(groups)
    per_run: dict[str | None, list[Point]] = {}
    for run, point in _matches(path, expression, report):
        per_run.setdefault(run, []).append(point)
    if not per_run:
        raise ImportProblem(f"{path}: no line matches --regex with a step and a number")
    return Imported(scalar_runs(per_run, report), report)


def _matches(
    path: Path, expression: re.Pattern[str], report: Report
) -> Iterator[tuple[str | None, Point]]:
    several = "run" in expression.groupindex
    with path.open("rb") as head:
        encoding = encoding_of(head.read(4))
    with path.open(encoding=encoding, errors="replace") as file:
        for line in file:
            found = expression.search(line)
            if found is None:
                report.skipped["lines that do not match"] += bool(line.strip())
                continue
            step = as_step((found["step"] or "").replace(",", ""))
            if step is None:
                report.skipped["lines whose step is no whole number"] += 1
                continue
            for group, ours in report.names.items():
                text = (found[group] or "").strip(_AROUND)
                value = as_number(text)
                if value is not None:
                    yield found["run"] if several else None, Point(ours, step, value)
                elif text:
                    report.skipped[f"{group} (no number)"] += 1
