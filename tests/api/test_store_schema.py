"""The tables on one engine and on a cluster: one set of columns and keys, statements that parse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock.api.store_schema import (
    FACT_TABLES,
    ROLLUP_TABLES,
    TableOptions,
    create_database,
    ddl,
)

CLUSTER = TableOptions(server=True, cluster="main", retention_days=30)

# In a process of its own: the engine takes one folder per process, and this one a configuration.
MAKE = """
import sys, chdb
path, config, *statements = sys.argv[1:]
engine = chdb.connect(f"{path}?config-file={config}")
engine.query("CREATE DATABASE facts")
engine.query("USE facts")
for statement in statements:
    engine.query(statement)
print(engine.query("SELECT name, engine FROM system.tables WHERE database = 'facts' ORDER BY name"))
"""


def columns(statement: str) -> str:
    found = re.search(r"\((run_id .*)\) ENGINE", statement)
    assert found is not None
    return found[1]


def key(statement: str) -> str:
    found = re.search(r"PARTITION BY .* ORDER BY \(.*\) SETTINGS", statement)
    assert found is not None
    return found[0]


def test_a_cluster_has_the_same_columns_and_keys() -> None:
    plain = [s for s in ddl(TableOptions()) if s.startswith("CREATE")]
    local = [s for s in ddl(CLUSTER) if "ENGINE = Replicated" in s]
    assert len(plain) == len(local) == len(FACT_TABLES) + 1 + len(ROLLUP_TABLES)
    for one, two in zip(plain, local, strict=True):
        assert columns(one) == columns(two)
        assert key(one) == key(two)


def test_a_cluster_replicates_within_shards_and_shards_by_run() -> None:
    statements = ddl(CLUSTER)
    assert all("ON CLUSTER 'main'" in statement for statement in statements)
    assert (
        "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/{database}/steps',"
        " '{replica}', ver)" in statements[0]
    )
    assert statements[1].endswith(
        "AS steps_local ENGINE = Distributed('main', currentDatabase(), steps_local,"
        " cityHash64(run_id))"
    )
    # Only where the rows are is anything dropped.
    assert all("_local ON CLUSTER" in s for s in statements if "TTL" in s)
    assert create_database("facts", "main").endswith("facts ON CLUSTER 'main'")
    assert "deduplication_window" not in "".join(ddl(TableOptions()))
    assert "non_replicated_deduplication_window" in "".join(ddl(TableOptions(server=True)))


def test_the_engine_parses_every_statement_of_a_cluster(tmp_path: Path) -> None:
    config = tmp_path / "config.xml"
    config.write_text("<clickhouse></clickhouse>")
    parsed = [f"EXPLAIN AST {statement}" for statement in ddl(CLUSTER)]
    _made(tmp_path, config, parsed)
    with pytest.raises(subprocess.CalledProcessError):
        _made(tmp_path, config, ["EXPLAIN AST CREATE TABLE t (a Int8) ENGINE = ON CLUSTER"])


def test_the_engine_makes_the_tables_of_a_cluster_as_far_as_it_can(tmp_path: Path) -> None:
    """Without Keeper: Distributed tables over a cluster, local ones not replicated."""
    config = tmp_path / "config.xml"
    config.write_text(
        "<clickhouse><remote_servers><main><shard><replica><host>localhost</host>"
        "<port>9000</port></replica></shard></main></remote_servers></clickhouse>"
    )
    statements = [
        re.sub(r"Replicated(\w+)\('[^']*', '[^']*', ver\)", r"\1(ver)", s)
        .replace(" ON CLUSTER 'main'", "")
        .replace("replicated_deduplication_window", "non_replicated_deduplication_window")
        for s in ddl(CLUSTER)
    ]
    made = _made(tmp_path, config, statements)
    for table in (*FACT_TABLES, "risk", *ROLLUP_TABLES):
        assert f'"{table}","Distributed"' in made
        assert f'"{table}_local","ReplacingMergeTree"' in made


def _made(folder: Path, config: Path, statements: list[str]) -> str:
    command = [sys.executable, "-c", MAKE, str(folder / "engine"), str(config), *statements]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout
