"""Which runs a list shows, in which order, and where a page of it ends. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from foreshock.api.paging import read_cursor, write_cursor
from foreshock.api.registry import Run
from foreshock.monitor.record import decode_number

__all__ = ["RunFilter", "RunOrder", "page_of"]

RunOrder = Literal["last_heard", "created", "name", "risk"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_KEYS: Final[Mapping[str, tuple[type | tuple[type, ...], ...]]] = {
    "last_heard": (int, str),
    "created": (int, str),
    "name": (str, str, str),
    "risk": ((int, float), str),
}

Row = tuple[Run, Mapping[str, Any]]
"""A run and what the list says of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs are meant; None leaves a member out of it.

    Attributes:
        status: Whether it is heard of.
        state: State of its alert.
        prefix: How its name begins.
    """

    status: str | None = None
    state: str | None = None
    prefix: str | None = None

    def takes(self, row: Row) -> bool:
        """Whether a run is among them."""
        _, shown = row
        return (
            self.status in (None, shown["status"])
            and self.state in (None, shown["state"])
            and str(shown["run"]).startswith(self.prefix or "")
        )


def page_of(
    rows: Sequence[Row], order: RunOrder, limit: int, cursor: str | None
) -> tuple[list[Row], str | None]:
    """A page of runs, and the cursor of the next one.

    Args:
        rows: The runs, in any order.
        order: last_heard and created: newest first; name: by name; risk: highest first, unknown
            last. A run that moves up in last_heard or risk while pages are read is on a page
            before; created and name keep every run in its place.
        limit: Most runs of the page.
        cursor: Of the page before; None for the first.

    Raises:
        Problem: 422, the cursor is none of this order's.
    """
    kind = f"runs-{order}"
    ordered = sorted((_key(order, row), position) for position, row in enumerate(rows))
    if cursor is not None:
        after = read_cursor(cursor, kind, *_KEYS[order])
        ordered = [item for item in ordered if item[0] > after]
    page = ordered[:limit]
    more = write_cursor(kind, *page[-1][0]) if len(ordered) > limit else None
    return [rows[position] for _, position in page], more


def _key(order: RunOrder, row: Row) -> tuple[Any, ...]:
    run, shown = row
    if order == "name":
        return run.name, run.project, run.run_id
    if order == "created":
        return -_microseconds(run.created_at), run.run_id
    if order == "risk":
        return -_risk(shown), run.run_id
    return -_microseconds(_heard(run)), run.run_id


def _heard(run: Run) -> datetime:
    return max((a.last_received for a in run.attempts if a.last_received), default=run.created_at)


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _risk(shown: Mapping[str, Any]) -> float:
    known = [decode_number(value, "risk") for value in (shown["risk"] or {}).values()]
    return max((value for value in known if value is not None), default=-1.0)
