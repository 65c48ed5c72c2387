"""foreshock import and export against a real service."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from foreshock.api.cli.main import app
from foreshock.monitor.record import (
    StepRecord,
    read_stream,
    record_batch,
    records_from_json,
    records_to_json,
    records_to_table,
    table_to_records,
    write_stream,
)
from foreshock.monitor.spool import Spool
from tests.api.service import Service, make_records, new_launch

RECORDS = [
    *make_records(0, 150),
    StepRecord(step=150, time=datetime(2026, 1, 1, tzinfo=UTC), scalars={"loss": math.nan}),
]


def foreshock(service: Service, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--url", service.url])


def write(path: Path) -> Path:
    table = records_to_table(RECORDS)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        path.write_bytes(
            records_to_json(RECORDS) if path.suffix == ".json" else write_stream(table)
        )
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "json"])
def test_a_file_goes_in_once_and_comes_out_the_same(
    served: Service, tmp_path: Path, suffix: str
) -> None:
    name = f"file-{new_launch()[:8]}"
    source = write(tmp_path / f"{name}.{suffix}")
    done = foreshock(served, "import", str(source))
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, f"151 records of run {name}")
    again = foreshock(served, "import", str(source))
    assert "3 of 3 batches were there already" in again.stdout
    target = tmp_path / f"out.{suffix}"
    assert foreshock(served, "export", name, str(target)).exit_code == 0
    if suffix == "json":
        back = records_from_json(target.read_bytes())
    elif suffix == "arrow":
        back = table_to_records(read_stream(target.read_bytes()))
    else:
        back = table_to_records(pq.read_table(target))
    assert [(r.step, r.time, repr(sorted(r.scalars.items()))) for r in back] == [
        (r.step, r.time, repr(sorted(r.scalars.items()))) for r in RECORDS
    ]
    assert [set(r.tensors) for r in back] == [set(r.tensors) for r in RECORDS]


def test_a_spool_is_sent_and_emptied(served: Service, client: httpx.Client, tmp_path: Path) -> None:
    name = f"spool-{new_launch()[:8]}"
    registration = {"project": "spooled", "run": name, "launch_id": new_launch()}
    spool = Spool(tmp_path, registration)
    for step in range(130):
        time = datetime(2026, 1, 1, tzinfo=UTC)
        spool.append(record_batch(step=step, time=time, scalars={"loss": float(step)}))
        spool.seal_if_due()
    spool.close()
    done = foreshock(served, "import", str(tmp_path))
    assert done.exit_code == 0, done.output
    query = {"project": "spooled", "name": "loss"}
    series = client.get(f"/api/v1/runs/{name}/series", params=query).json()
    assert series["step"] == list(range(130))
    assert list(tmp_path.rglob("*.arrow")) == []
    empty = foreshock(served, "import", str(tmp_path))
    assert (empty.exit_code, "holds no spool" in empty.output) == (2, True)


def test_what_does_not_work_is_one_line(served: Service, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "a.json").write_text('{"records": [{"step": -1}]}')
    for arguments in (
        ("import", str(tmp_path / "a.txt")),
        ("import", str(tmp_path / "a.parquet")),
        ("import", str(tmp_path / "a.json")),
        ("import", str(tmp_path / "absent.json")),
        ("export", "absent", str(tmp_path / "out.json")),
        ("export", "absent", str(tmp_path / "out.docx")),
    ):
        done = foreshock(served, *arguments)
        assert done.exit_code == 2, arguments
        assert len(done.output.strip().splitlines()) == 1, done.output
    assert not (tmp_path / "out.json").exists()
    dead = CliRunner().invoke(app, ["export", "a", "b.csv", "--url", "http://127.0.0.1:9"])
    assert (dead.exit_code, "does not answer" in dead.output) == (2, True)
