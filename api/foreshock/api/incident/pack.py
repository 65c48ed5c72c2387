"""Puts page, records and facts into one archive, on disk, whatever its size."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, Any, Final

from foreshock.api.incident.facts import Incident, WindowData
from foreshock.api.incident.page import RECORDS_NAME, render
from foreshock.api.incident.window import WindowReader
from foreshock.api.store import Store, View
from foreshock.api.tabular import write_parquet
from foreshock.monitor.record import SCHEMA, encode_number

__all__ = ["archive_name", "pack"]

_PIECE: Final = 256 * 1024


def archive_name(incident: Incident) -> str:
    """A file name that is safe anywhere."""
    run = re.sub(r"[^A-Za-z0-9._-]", "_", incident.run.name)
    return f"{run}-step-{incident.step}.zip"


def pack(incident: Incident, store: Store) -> Iterator[bytes]:
    """The archive: incident.html, records.parquet, incident.json.

    Args:
        incident: What was gathered.
        store: Has the records.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115 closed by `_pieces`, once it is sent
    try:
        window = _fill(file, incident, store)
        del window
    except BaseException:
        file.close()
        raise
    return _pieces(file)


def _fill(file: IO[bytes], incident: Incident, store: Store) -> WindowData:
    view = View(incident.run.run_id, incident.attempt, incident.first_step, incident.last_step)
    reader = WindowReader(incident.first_step, incident.last_step, incident.run.layers)
    with zipfile.ZipFile(file, "w") as archive:
        # Parquet is compressed already.
        with archive.open(RECORDS_NAME, "w", force_zip64=True) as target:
            for piece in write_parquet(SCHEMA, reader.through(store.record_chunks(view))):
                target.write(piece)
        window = reader.result()
        page, facts = render(incident, window), _facts(incident, window)
        archive.writestr("incident.html", page, zipfile.ZIP_DEFLATED)
        archive.writestr("incident.json", facts, zipfile.ZIP_DEFLATED)
    return window


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while piece := file.read(_PIECE):
            yield piece


def _facts(incident: Incident, window: WindowData) -> str:
    """The page's words as JSON, for scripts."""
    run = incident.run
    body = {
        "run_id": run.run_id,
        "project": run.project,
        "run": run.name,
        "attempt": incident.attempt,
        "step": incident.step,
        "first_step": window.first,
        "last_step": window.last,
        "records": window.records,
        "steps_per_bucket": window.width,
        "trouble_since": incident.trouble_since,
        "checkpoint": None if incident.checkpoint is None else asdict(incident.checkpoint),
        "alerts": [asdict(alert) for alert in incident.alerts],
        "causes": [asdict(cause) for cause in incident.causes],
        "config": dict(run.config),
        "versions": dict(incident.versions),
        "made_at": incident.made_at,
    }
    return json.dumps(_plain(body), indent=1, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return encode_number(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
