"""Which format a file or folder of logs is in, and its reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from foreshock.api.cli.importers.names import Names, parse_map
from foreshock.api.cli.importers.points import Imported, ImportProblem
from foreshock.api.cli.importers.separated import encoding_of, separator_of
from foreshock.api.cli.importers.tables import read_csv, read_json_lines, read_parquet
from foreshock.api.cli.importers.te_debug import LINE, read_te_debug
from foreshock.api.cli.importers.tensorboard import read_events
from foreshock.api.cli.importers.text import read_lines, read_trainer_states

__all__ = ["FORMATS", "read_logs"]

Reader = Callable[[Sequence[Path], Names], Imported]


def _single(reader: Callable[[Path, Names], Imported]) -> Reader:
    def read(files: Sequence[Path], names: Names) -> Imported:
        if len(files) > 1:
            raise ImportProblem(f"{len(files)} files; this format takes one at a time")
        return reader(files[0], names)

    return read


def _te_debug(files: Sequence[Path], names: Names) -> Imported:
    names.check(())  # layers and statistics keep the names they have
    return read_te_debug(files)


FORMATS: Final[Mapping[str, Reader]] = {
    "te-debug": _te_debug,
    "hf": read_trainer_states,
    "tensorboard": read_events,
    "wandb": _single(read_csv),
    "csv": _single(read_csv),
    "jsonl": _single(read_json_lines),
    "parquet": _single(read_parquet),
}
"""Name of a format to its reader."""

_HEAD: Final = 1 << 16
_PATTERNS: Final = ("trainer_state.json", "*tfevents*", "*_globalrank-*.log")


def read_logs(
    source: Path, *, format: str | None = None, chosen: Sequence[str] = (), regex: str | None = None
) -> Imported:
    """Read a file, or the files of a folder that belong together.

    Args:
        source: A file or folder.
        format: A name in `FORMATS`; None looks at the contents.
        chosen: `loss=Train/Loss` items.
        regex: Read lines by this expression instead.

    Raises:
        ImportProblem: Not readable; one line for a person.
    """
    names = Names(parse_map(chosen))
    if format is not None and format not in FORMATS:
        raise ImportProblem(f"--format {format}; known: {', '.join(FORMATS)}")
    if regex is not None and format is not None:
        raise ImportProblem("give --format or --regex, not both")
    try:
        if regex is not None:
            return _whole(source, read_lines(source, regex, names))
        files = _files(source)
        return _whole(source, FORMATS[format or _detect(files[0])](files, names))
    except OSError as error:
        raise ImportProblem(f"cannot read {source}: {error.strerror or error}") from None


def _whole(source: Path, imported: Imported) -> Imported:
    if not any(attempt for run in imported.runs for attempt in run.attempts):
        raise ImportProblem(f"{source} holds no value")
    return imported


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    for pattern in _PATTERNS:
        found = sorted(source.rglob(pattern))
        if pattern.startswith("*_global"):
            # The library's own log of messages lies beside the statistics.
            found = [path for path in found if path.stat().st_size and _detected(path)]
        if pattern != "*tfevents*":
            _check_one_training(source, found)
        if found:
            return found
    raise ImportProblem(
        f"{source} holds no spool (<project>/<run>/<launch>-<rank>/run.json) and no"
        " trainer_state.json, event file or Transformer Engine log; give one file"
    )


def _check_one_training(source: Path, files: Sequence[Path]) -> None:
    """Checkpoints of one training lie side by side; anything else is several of them."""
    folders = {
        f.parent.parent if f.parent.name.startswith("checkpoint-") else f.parent for f in files
    }
    if len(folders) > 1:
        shown = ", ".join(str(folder) for folder in sorted(folders)[:4])
        raise ImportProblem(f"{source} holds logs of several folders ({shown}); give one")


def _detect(path: Path) -> str:
    if path.stat().st_size == 0:
        raise ImportProblem(f"{path} is empty")
    found = _detected(path)
    if found is None:
        raise ImportProblem(
            f"{path} is none of: {', '.join(FORMATS)}, a spool folder, records as"
            " .parquet .arrow .json; read its lines with --regex"
        )
    return found


def _detected(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    if "tfevents" in path.name or b"brain.Event:" in head[:64]:
        return "tensorboard"
    try:
        text = head.decode(encoding_of(head), errors="strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    return _detected_text(path, text)


def _detected_text(path: Path, text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    if any(LINE.match(line) for line in lines):
        return "te-debug"
    if '"log_history"' in text or path.name == "trainer_state.json":
        return "hf"
    if not lines:
        return None
    if _is_object(lines[0]) or text.lstrip().startswith("["):
        return "jsonl"
    if not lines[0].startswith("{") and _is_table(lines):
        return "wandb" if "_step" in lines[0] else "csv"
    return None


def _is_table(lines: Sequence[str]) -> bool:
    separator = separator_of(lines[0])
    if separator == ",":
        return "," in lines[0]
    # Semicolons and tabs stand in text too: there the next line need not have as many.
    return len(lines) < 2 or lines[0].count(separator) == lines[1].count(separator)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
