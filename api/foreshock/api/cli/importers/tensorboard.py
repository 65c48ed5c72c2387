"""TensorBoard event files, read by the tensorboard package itself (extra `import`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from foreshock.api.cli.importers.names import Names
from foreshock.api.cli.importers.points import Imported, ImportProblem, Point, Report, scalar_runs

__all__ = ["read_events"]

_FRAME: Final = 16  # bytes of length and checksums around each record


def read_events(files: Sequence[Path], names: Names) -> Imported:
    """The scalars of event files; the files of one folder are one run, as TensorBoard has it.

    Raises:
        ImportProblem: tensorboard is not installed, or the files hold no scalar.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportProblem("event files need one more package: pip install 'foreshock[import]'")
    report = Report("tensorboard")
    folders: dict[Path, list[Path]] = {}
    for file in sorted(files, key=_written):
        folders.setdefault(file.resolve().parent, []).append(file)
    read = {folder: [p for f in own for p in _points(f, report)] for folder, own in folders.items()}
    present = list(dict.fromkeys(point.series for points in read.values() for point in points))
    if not present:
        raise ImportProblem(f"{files[0]} holds no scalars")
    names.check(present)
    report.names = names.of_all(present)
    above = Path(os.path.commonpath(folders)).parent
    renamed = {
        (None if len(folders) == 1 else folder.relative_to(above).as_posix()): [
            Point(report.names[p.series], p.step, p.value, p.time) for p in points
        ]
        for folder, points in read.items()
    }
    return Imported(scalar_runs(renamed, report), report)


def _written(path: Path) -> tuple[str, str]:
    # events.out.tfevents.<seconds>.<host>...: the name begins with the time of writing.
    return path.name, str(path)


def _points(path: Path, report: Report) -> Iterator[Point]:
    from tensorboard.backend.event_processing.event_file_loader import (
        EventFileLoader,
        RawEventFileLoader,
    )
    from tensorboard.util import tensor_util

    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name != "scalars":
                report.skipped[f"{value.tag} (no scalar)"] += 1
                continue
            number = np.asarray(tensor_util.make_ndarray(value.tensor)).reshape(-1)
            time = datetime.fromtimestamp(event.wall_time, UTC)
            yield Point(value.tag, int(event.step), float(number[0]), time)
    # The loader stops at the first damaged record without a word.
    read = sum(len(record) + _FRAME for record in RawEventFileLoader(str(path)).Load())
    left = path.stat().st_size - read
    if left:
        report.skipped[f"the last {left} bytes of {path.name}, which are damaged or cut off"] += 1
