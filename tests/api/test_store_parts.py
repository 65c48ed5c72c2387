"""What an INSERT leaves on the disk: one file, synced before anybody is told."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from foreshock.api.store import Limits
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_engine import Engine, open_chdb
from foreshock.api.store_schema import FACT_TABLES
from foreshock.monitor.record import table_to_records
from tests.api.service import LAYERS, fact_rows, make_records


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    opened = open_chdb(tmp_path / "store", Limits())
    yield opened
    opened.close()


def files_of_newest_parts(engine: Engine) -> dict[str, list[str]]:
    """Per table of facts: the files of the part that the newest INSERT made."""
    sql = (
        "SELECT table, argMax(path, max_block_number) AS path FROM system.parts"
        " WHERE database = 'foreshock' AND level = 0 GROUP BY table"
    )
    parts = engine.read(sql, {}).to_pylist()
    found = {part["table"]: sorted(p.name for p in Path(part["path"]).iterdir()) for part in parts}
    return {table: files for table, files in found.items() if table in FACT_TABLES}


def count(engine: Engine, event: str) -> int:
    sql = "SELECT sum(value) AS n FROM system.events WHERE event = {event:String}"
    return int(engine.read(sql, {"event": event})["n"][0].as_py())


def test_an_insert_is_one_synced_file_per_table(engine: Engine) -> None:
    store = ClickHouseStore(engine, lambda _: LAYERS)
    run = uuid.uuid4().hex
    store.append([fact_rows(run, 1, 1, make_records(0, 10))])
    before = count(engine, "FileSync"), count(engine, "DirectorySync")
    store.append([fact_rows(run, 1, 2 + i, make_records(10 + i, 1)) for i in range(20)])
    files = files_of_newest_parts(engine)
    assert files == {table: ["data.packed"] for table in ("steps", "scalars", "tensor_stats")}
    # Whatever the batches, and the folders that name them too: power may fail at once.
    assert count(engine, "FileSync") - before[0] == len(files)
    assert count(engine, "DirectorySync") - before[1] >= len(files)


def test_a_store_of_an_older_build_writes_so_too(engine: Engine) -> None:
    store = ClickHouseStore(engine, lambda _: LAYERS)
    run = uuid.uuid4().hex
    names = ("min_level_for_full_part_storage", "min_level_for_wide_part")
    for table in FACT_TABLES:
        engine.writer().command(f"ALTER TABLE {table} RESET SETTING {', '.join(names)}")
    store.append([fact_rows(run, 1, 1, make_records(0, 10))])
    assert "data.packed" not in files_of_newest_parts(engine)["tensor_stats"]

    again = ClickHouseStore(engine, lambda _: LAYERS)
    again.append([fact_rows(run, 1, 2, make_records(10, 10))])
    assert files_of_newest_parts(engine)["tensor_stats"] == ["data.packed"]
    # Both kinds are read side by side, merged, and removed from.
    for table in FACT_TABLES:
        engine.writer().command(f"OPTIMIZE TABLE {table} FINAL")
    again.append([fact_rows(run, 1, 3, make_records(20, 10))])
    assert again.discard_after(2) > 0
    found = table_to_records(again.record_window(run, 1, 0, 100))
    assert [record.step for record in found] == list(range(20))
    assert all(len(record.tensors) == 6 for record in found)
