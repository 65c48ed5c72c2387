"""Values reach a database as bound parameters only; what stands in a text is our own words.

A text of SQL put together from parts is listed here with the parts it may hold, so that a new one
is looked at; and names that try to break out are stored and read back as the names they are.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

import foreshock.api.store
from foreshock.api.wire import JSON
from foreshock.monitor.record import StepRecord, records_to_json
from tests.api.service import Service, batch_path, make_record, new_launch, post_run

ROOT = Path(foreshock.api.store.__file__).parent
WORDS = re.compile(
    r"\b(SELECT|INSERT|REPLACE INTO|UPDATE|DELETE|FROM|WHERE|ALTER|CREATE|DROP|PRAGMA|VALUES|SET"
    r"|GROUP BY|ORDER BY|LIMIT|SETTINGS|PARTITION|ATTACH|IN|AND|CASE|WHEN)\b"
)

# By module: each part is a constant, a text of constants, a name checked against the schema or the
# vocabulary, or a list of placeholders; none is, or holds, a value from a request.
PARTS: dict[str, set[str]] = {
    "collect/depot.py": {"columns", "gone", "marks", "old", "where"},
    "database.py": {"pragma"},
    "store_engine.py": {"DATABASE"},
    "store_clickhouse.py": {
        "CHUNK_STEPS",
        "columns",
        "doubtful",
        "held",
        "key",
        "names",
        "table",
        "view_sql(view, 'events')",
        "view_sql(view, 'risk')",
        "view_sql(view, 'scalars')",
        "view_sql(view, 'steps')",
        "view_sql(view, 'tensor_stats')",
        "what",
        "which",
    },
    "store_query.py": {
        "_ODD",
        "_STEPS",
        "_checked(key.statistic)",
        "_checked(statistic)",
        "inner",
        "key",
        "only",
        "rows",
        "table",
        "where",
        "view_sql(view, 'events')",
        "which",
        "worst",
    },
    "store_schema.py": {
        "_engine(table, options)",
        "_joined(_in_process(table))",
        "_order(table)",
        "_table_settings(table, options)",
        "added",
        "body",
        "name",
        "options.cluster",
        "options.held_in(table)",
        "place",
        "span",
        "table",
    },
    "store_sqlite.py": {
        "'DISTINCT ' if exact else ''",
        "pragma",
        "rows",
        "table",
        "what",
    },
    "store_sqlite_query.py": {
        "newest_sql(view, 'events', columns)",
        "', '.join(columns)",
        "NAN",
        "_FINITE",
        "_ODD",
        "_STEPS",
        "_checked(key.statistic)",
        "_checked(statistic)",
        "_picked(view)",
        "finite",
        "inner",
        "key",
        "names",
        "one",
        "only",
        "rank",
        "rows",
        "table",
        "ver",
        "which",
        "worst",
    },
    "store_sqlite_schema.py": {"', '.join(columns)", "', '.join(key)", "name", "table"},
    "store_query_rolled.py": {
        "BLOCK_STEPS",
        "CHUNK_STEPS",
        "OF_FORMAT",
        "OF_FORMAT_WORST",
        "SINCE if aged else ''",
        "_BUCKET",
        "_ODD",
        "_ROLLED",
        "_TENSORS_TO_ROLL",
        "_TO_ROLL",
        "_only(view)",
        "key",
        "names",
        "which",
        "worst",
    },
    "store_sqlite_rolled.py": {
        "BLOCK_STEPS",
        "NAN",
        "OF_FORMAT",
        "OF_FORMAT_WORST",
        "_BUCKET",
        "_ODD",
        "_ROLLED",
        "_TO_ROLL",
        "_only(view)",
        "key",
        "names",
        "which",
        "worst",
    },
    "store_sqlite_writing.py": {
        "', '.join(names)",
        "marks",
        "table",
        "which",
    },
}
MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def literal(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    return ""


def parts(tree: ast.Module) -> Iterator[str]:
    """What is put between the words of every SQL text of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and WORDS.search(literal(node)):
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    yield ast.unparse(part.value)
        # The other ways to put a text together are not used for SQL at all.
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            whole = literal(node.left)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            whole = literal(node.func.value) if node.func.attr == "format" else ""
        else:
            continue
        if WORDS.search(whole):
            yield ast.unparse(node)


@pytest.mark.parametrize("module", MODULES)
def test_sql_holds_only_parts_that_were_looked_at(module: str) -> None:
    assert set(parts(tree_of(module))) == PARTS.get(module, set())


@pytest.mark.parametrize("module", MODULES)
def test_a_text_given_to_sqlalchemy_is_a_constant(module: str) -> None:
    for node in ast.walk(tree_of(module)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "text" and ast.unparse(node.func.value) == "sa":
            assert isinstance(node.args[0], ast.Constant), ast.unparse(node)
        if node.func.attr == "exec_driver_sql":
            constants = [n for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
            assert constants, ast.unparse(node)


def test_the_check_sees_what_it_is_for() -> None:
    bad = 'f"SELECT 1 FROM t WHERE a = {value}"; "DELETE FROM t WHERE a = %s" % v'
    assert set(parts(ast.parse(bad))) == {"value", "'DELETE FROM t WHERE a = %s' % v"}
    assert set(parts(ast.parse('"DROP TABLE {}".format(t)'))) == {"'DROP TABLE {}'.format(t)"}


HOSTILE = (
    "'; DROP TABLE steps; --",
    "\\'; DROP TABLE steps; --",
    '" OR 1=1 --',
    "{run:String}",
    ":run",
    "%(run)s",
    "` UNION ALL SELECT 1 /*",
    "a\\",
    "é\u2028\t",
)


@pytest.fixture(params=["chdb", "sqlite"])
def client(
    request: pytest.FixtureRequest, tmp_path: Path, served: Service
) -> Iterator[httpx.Client]:
    if request.param == "chdb":
        with served.client() as made:
            yield made
        return
    service = Service(tmp_path, "--store", f"sqlite://{tmp_path}/facts.sqlite")
    service.start()
    with service.client() as made:
        yield made
    assert service.stop() == 0, service.log


def test_names_that_try_to_break_out_are_only_names(client: httpx.Client) -> None:
    launch = new_launch()
    run = post_run(client, "hostile", launch, layers=list(HOSTILE))["run_id"]
    record = make_record(0, tensors=False)
    scalars = {"loss": 1.0} | {name: float(n) for n, name in enumerate(HOSTILE)}
    body = records_to_json([StepRecord(step=0, time=record.time, scalars=scalars)])
    answer = client.put(batch_path(run, launch, 0), content=body, headers={"Content-Type": JSON})
    assert answer.status_code == 201, answer.text
    for number, name in enumerate(HOSTILE):
        series = client.get(f"/api/v1/runs/{run}/series", params={"name": name}).json()
        assert series["mean"] == [float(number)], name
        query = {"layer": name, "statistic": "kurtosis", "role": "input"}
        nothing = client.get(f"/api/v1/runs/{run}/series", params=query)
        assert (nothing.status_code, nothing.json()["step"]) == (200, []), name
        for key in ("role", "statistic", "format"):
            wrong = client.get(f"/api/v1/runs/{run}/series", params=query | {key: name})
            assert wrong.status_code == 422, (key, name)
        absent = client.get(f"/api/v1/runs/{quote(name, safe='')}/risk")
        assert absent.status_code in (404, 422), name
        assert client.get("/api/v1/runs", params={"project": name}).status_code in (200, 422)
    assert client.get(f"/api/v1/runs/{run}/series", params={"name": "loss"}).json()["mean"] == [1.0]
