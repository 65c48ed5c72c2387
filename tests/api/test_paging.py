"""Pages of lists: nothing twice, nothing missed, whatever comes in between."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.paging import read_cursor, write_cursor
from foreshock.api.problems import Problem
from foreshock.api.registry import Run
from foreshock.api.run_list import RunFilter, RunOrder, page_of

START = datetime(2026, 1, 1, tzinfo=UTC)
ORDERS: tuple[RunOrder, ...] = get_args(RunOrder)


def row(number: int, *, age: int = 0, risk: float | None = None) -> tuple[Run, dict[str, Any]]:
    run = Run(
        run_id=f"{number:032x}",
        project="default",
        name=f"run-{number % 7}-{number}",
        created_at=START - timedelta(seconds=age),
        layers=(),
        config={},
        tokens_per_step=None,
        world_size=None,
        attempts=(),
    )
    shown: dict[str, Any] = {"run": run.name, "status": "new", "state": None, "risk": None}
    if risk is not None:
        shown |= {"state": "ok", "risk": {"10": None, "100": risk}}
    return run, shown


def walk(
    rows: list[Any], order: RunOrder, limit: int, between: list[Any] | None = None
) -> list[str]:
    """Names of runs over all pages; `between` come in after the first page."""
    names: list[str] = []
    cursor = None
    while True:
        page, cursor = page_of(rows, order, limit, cursor)
        assert len(page) <= limit
        names += [run.run_id for run, _ in page]
        if cursor is None:
            return names
        rows = [*rows, *(between or [])]
        between = None


@pytest.mark.parametrize("order", ORDERS)
@given(
    ages=st.lists(st.integers(0, 5), max_size=30),
    risks=st.lists(st.none() | st.floats(0, 1), min_size=30, max_size=30),
    limit=st.integers(1, 9),
)
def test_pages_hold_every_run_once_and_in_order(
    order: RunOrder, ages: list[int], risks: list[float | None], limit: int
) -> None:
    rows = [row(n, age=age, risk=risks[n]) for n, age in enumerate(ages)]
    seen = walk(rows, order, limit)
    assert sorted(seen) == sorted(run.run_id for run, _ in rows)
    assert seen == walk(rows, order, 1000)


@pytest.mark.parametrize("order", ORDERS)
def test_runs_that_come_in_meanwhile_hide_and_repeat_none(order: RunOrder) -> None:
    rows = [row(n, age=n, risk=n / 20) for n in range(12)]
    young = [row(100 + n, age=-n, risk=0.99) for n in range(5)]
    seen = walk(rows, order, 5, between=young)
    old = [run.run_id for run, _ in rows]
    assert [run_id for run_id in seen if run_id in old] == walk(rows, order, 100)
    assert len(seen) == len(set(seen))


def test_orders_are_what_their_names_say() -> None:
    rows = [row(1, age=3, risk=0.2), row(2, age=1), row(3, age=2, risk=0.9)]
    numbers = {run.run_id: int(run.run_id, 16) for run, _ in rows}

    def order(name: RunOrder) -> list[int]:
        return [numbers[run_id] for run_id in walk(rows, name, 2)]

    assert order("created") == [2, 3, 1]
    assert order("risk") == [3, 1, 2]
    assert order("name") == [1, 2, 3]


def test_filters_add_up() -> None:
    rows = [row(1, risk=0.5), row(8, risk=0.5), row(2)]
    found = [
        run.run_id
        for run, shown in rows
        if RunFilter(state="ok", prefix="run-1").takes((run, shown))
    ]
    assert [int(run_id, 16) for run_id in found] == [1, 8]


@given(st.text(max_size=60))
def test_no_cursor_of_a_stranger_is_taken(text: str) -> None:
    with pytest.raises(Problem) as refused:
        read_cursor(text, "runs-name", str, str, str)
    assert refused.value.status == 422


@pytest.mark.parametrize("key", [(), (1,), ("a", "b"), (True, "a"), (1, 2), (1.5, "a"), ([1], "a")])
def test_a_cursor_of_another_list_is_not_taken(key: tuple[Any, ...]) -> None:
    with pytest.raises(Problem):
        read_cursor(write_cursor("runs-created", *key), "runs-created", int, str)
    with pytest.raises(Problem):
        read_cursor(write_cursor("alerts", 1, "a"), "runs-created", int, str)
    assert read_cursor(write_cursor("runs-created", 1, "a"), "runs-created", int, str) == (1, "a")
