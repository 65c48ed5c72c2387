"""Pages of lists: nothing twice, nothing missed, whatever comes in between."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, get_args

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.api.paging import read_cursor, write_cursor
from foreshock.api.problems import Problem
from foreshock.api.registry import LaunchRequest, Registry
from foreshock.api.registry_tables import attempts, run_risks, runs
from foreshock.api.risk_notes import NotedRecords, notes_of
from foreshock.api.risks import risk_table
from foreshock.api.run_list import LIVE_FOR, ListedRun, RunFilter, RunOrder, list_page
from foreshock.api.silence import RunState
from foreshock.api.store_sqlite import STORE_FILE, SqliteStore
from tests.api.live_helpers import START as FIRST
from tests.api.live_helpers import risk
from tests.api.service import new_launch

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
ORDERS: tuple[RunOrder, ...] = get_args(RunOrder)


@dataclass
class World:
    """A registry with runs; one that was heard of has one attempt with records."""

    registry: Registry
    states: dict[str, RunState] = field(default_factory=dict)

    def add(
        self,
        name: str,
        *,
        project: str = "p",
        age: int = 0,
        heard: int | None = None,
        worst: float | None = None,
        state: str = "ok",
    ) -> str:
        """A run made `age` seconds before START and heard of `heard` seconds before."""
        launch = new_launch()
        request = LaunchRequest(project=project, run=name, launch_id=launch)
        run_id, number, _ = self.registry.launch(request)
        mine = attempts.c.run_id == run_id
        with self.registry.write() as connection:
            made = START - timedelta(seconds=age)
            connection.execute(runs.update().where(runs.c.run_id == run_id).values(created_at=made))
            if heard is not None:
                received = START - timedelta(seconds=heard)
                values: dict[str, Any] = {"last_step": 9, "last_received": received}
                connection.execute(attempts.update().where(mine).values(**values))
            if worst is not None:
                row = {"run_id": run_id, "attempt": number, "step": 9, "state": state}
                row |= {"worst": worst, "probability": json.dumps({"10": None, "100": worst})}
                connection.execute(run_risks.insert().values(**row))
        return run_id

    def page(
        self, order: RunOrder, limit: int, cursor: str | None = None, **wanted: Any
    ) -> tuple[list[ListedRun], str | None]:
        chosen = RunFilter(**wanted)
        return list_page(self.registry, chosen, order, limit, cursor, states=self.states, now=START)

    def walk(self, order: RunOrder, limit: int, between: Any = None, **wanted: Any) -> list[str]:
        """Ids of runs over all pages; `between` is called after the first."""
        found: list[str] = []
        cursor = None
        while True:
            page, cursor = self.page(order, limit, cursor, **wanted)
            assert len(page) <= limit
            found += [each.run.run_id for each in page]
            if cursor is None:
                return found
            if between is not None:
                between()
            between = None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(Registry(tmp_path / "registry.sqlite"))
    yield made
    made.registry.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paging")


@pytest.mark.parametrize("order", ORDERS)
@given(
    ages=st.lists(st.integers(0, 5), max_size=12),
    risks=st.lists(st.none() | st.floats(0, 1), min_size=12, max_size=12),
    limit=st.integers(1, 9),
)
@settings(max_examples=10)
def test_pages_hold_every_run_once_and_in_order(
    folder: Path, order: RunOrder, ages: list[int], risks: list[float | None], limit: int
) -> None:
    world = World(Registry(folder / f"{uuid.uuid4().hex}.sqlite"))
    expected = []
    for number, age in enumerate(ages):
        worst, heard = risks[number], 5 - age if number % 3 else None
        name = f"run-{number % 5}-{number}"
        run_id = world.add(name, age=age, heard=heard if worst is None else age, worst=worst)
        seen = age if worst is not None or heard is None else heard
        keys = {"created": age, "last_heard": seen, "risk": -(-1.0 if worst is None else worst)}
        expected.append(((name if order == "name" else keys[order], run_id), run_id))
    seen_ids = world.walk(order, limit)
    assert seen_ids == [run_id for _, run_id in sorted(expected, key=lambda item: item[0])]
    world.registry.close()


@pytest.mark.parametrize("order", ORDERS)
def test_runs_that_come_in_meanwhile_hide_and_repeat_none(world: World, order: RunOrder) -> None:
    old = [world.add(f"run-{n:02}", age=n, heard=n, worst=n / 20) for n in range(12)]
    whole = world.walk(order, 100)

    def more() -> None:
        for n in range(5):
            world.add(f"fresh-{n}", age=-n, heard=0, worst=0.99)

    seen = world.walk(order, 5, between=more)
    assert [run_id for run_id in seen if run_id in old] == whole
    assert len(seen) == len(set(seen))


def test_orders_are_what_their_names_say(world: World) -> None:
    one = world.add("a", age=3, heard=3, worst=0.2)
    two = world.add("b", age=1)
    three = world.add("c", age=2, heard=0, worst=0.9)
    assert world.walk("created", 2) == [two, three, one]
    assert world.walk("last_heard", 2) == [three, two, one]
    assert world.walk("risk", 2) == [three, one, two]
    assert world.walk("name", 2) == [one, two, three]


def test_filters_add_up(world: World) -> None:
    one = world.add("Run-1", heard=1, worst=0.5, state="firing")
    world.add("run-1", heard=1, worst=0.5, state="firing")
    world.add("Run-2", heard=1, worst=0.5)
    other = world.add("Run-3", project="q", heard=1, worst=0.5, state="firing")
    assert world.walk("name", 9, state="firing", prefix="Run-") == [one, other]
    kept = frozenset({"p"})
    assert world.walk("name", 9, state="firing", prefix="Run-", projects=kept) == [one]
    assert world.walk("name", 9, projects=frozenset()) == []
    assert world.walk("name", 9, prefix="R%") == []


def test_status_is_the_same_in_the_list_as_of_each_run(world: World) -> None:
    silent = int(LIVE_FOR.total_seconds()) + 60
    ids = {
        "new": world.add("new"),
        "lately": world.add("lately", heard=5),
        "long ago": world.add("long ago", heard=silent),
        "watched live": world.add("watched live", heard=silent),
        "watched stale": world.add("watched stale", heard=5),
        "over": world.add("over", heard=5),
        "said over": world.add("said over", heard=5),
        "went on": world.add("went on", heard=5),
    }
    world.states |= {ids["watched live"]: "live", ids["watched stale"]: "stale"}
    world.states[ids["said over"]] = "finished"
    world.registry.end_run(ids["over"], 1, 9)
    world.registry.end_run(ids["went on"], 1, 8)
    expected: Mapping[str, set[str]] = {
        "new": {"new"},
        "live": {"lately", "watched live", "went on"},
        "stale": {"long ago", "watched stale"},
        "finished": {"over", "said over"},
    }
    for status, names in expected.items():
        assert set(world.walk("name", 3, status=status)) == {ids[name] for name in names}, status


def test_a_page_reads_no_configuration_and_only_its_own_runs(world: World) -> None:
    for number in range(30):
        world.add(f"run-{number:02}", heard=number)
    asked: list[str] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *rest: Any) -> None:
        asked.append(f"{statement} {len(parameters)}")

    sa.event.listen(world.registry.engine, "before_cursor_execute", note)
    page, _ = world.page("last_heard", 4)
    sa.event.remove(world.registry.engine, "before_cursor_execute", note)
    assert [each.run.name for each in page] == ["run-00", "run-01", "run-02", "run-03"]
    assert not any("config" in text for text in asked)
    selects = [text for text in asked if text.startswith("SELECT")]
    assert len(selects) == 3
    assert "LIMIT" in selects[0]


def test_the_newest_risk_is_noted_for_every_replica(world: World, tmp_path: Path) -> None:
    run_id = world.add("a", heard=1)
    store = SqliteStore(tmp_path / STORE_FILE, lambda _: ())
    records = NotedRecords(world.registry, store)

    def table(step: int, state: str) -> pa.Table:
        return risk_table([(FIRST, risk(step - 1)), (FIRST, risk(step, state, "forecast", 0.5))])

    gone = "f" * 32
    records.append_risks([(run_id, 1, table(7, "firing")), (gone, 1, table(7, "firing"))])
    (listed,), _ = world.page("risk", 5, state="firing")
    assert listed.risk is not None
    assert (listed.risk.step, listed.risk.kind, listed.risk.attempt) == (7, "forecast", 1)
    assert listed.risk.probability == {"10": 0.125, "100": 0.5, "1000": None}
    # What is scored again of an older attempt does not replace it.
    records.append_risks([(run_id, 2, table(3, "ok"))])
    records.append_risks([(run_id, 1, table(9, "firing"))])
    with world.registry.engine.begin() as connection:
        assert notes_of(connection, [run_id])[run_id].attempt == 2
        assert notes_of(connection, [gone]) == {}
    # A note of another attempt than the newest with records is no answer.
    assert world.walk("risk", 5, state="firing") == []
    assert store.last_risk_step(run_id, 1) == 9
    world.registry.delete(run_id)
    with world.registry.engine.begin() as connection:
        assert notes_of(connection, [run_id]) == {}
    store.close()


@pytest.mark.parametrize("order", ORDERS)
def test_a_cursor_of_any_number_is_harmless(world: World, order: RunOrder) -> None:
    world.add("a")
    for number in (-(10**30), -1, 0, 10**30):
        parts = ("a", "p", "x") if order == "name" else (number, "x")
        world.page(order, 3, write_cursor(f"runs-{order}", *parts))


@given(st.text(max_size=60))
def test_no_cursor_of_a_stranger_is_taken(text: str) -> None:
    with pytest.raises(Problem) as refused:
        read_cursor(text, "runs-name", str, str, str)
    assert refused.value.status == 422


@pytest.mark.parametrize(
    "key",
    [(), (1,), ("a", "b"), (1, "\x00"), (1, "\ud800"), (True, "a"), (1, 2), (1.5, "a"), ([1], "a")],
)
def test_a_cursor_of_another_list_is_not_taken(key: tuple[Any, ...]) -> None:
    with pytest.raises(Problem):
        read_cursor(write_cursor("runs-created", *key), "runs-created", int, str)
    with pytest.raises(Problem):
        read_cursor(write_cursor("alerts", 1, "a"), "runs-created", int, str)
    assert read_cursor(write_cursor("runs-created", 1, "a"), "runs-created", int, str) == (1, "a")
