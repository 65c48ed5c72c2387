"""The newest risk of each run, beside the run: so that lists can be filtered and ordered by it.

The history is in the store, drivers and all in the memory of the replica that analyses the run;
this is what any replica can say of any run at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from foreshock.api.registry import Registry
from foreshock.api.registry_tables import run_risks, runs
from foreshock.api.store import Store
from foreshock.api.windows import RunRecords
from foreshock.monitor.record import AlertState, RiskKind, decode_number, encode_number

__all__ = ["UNKNOWN", "NotedRecords", "RiskNote", "notes_of"]

_log = logging.getLogger(__name__)

UNKNOWN: Final = -1.0
"""`worst` where no horizon has a probability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskNote:
    """The newest risk of a run.

    Attributes:
        attempt: Of this attempt.
        step: At this step.
        state: State of its alert.
        kind: forecast, detection or None.
        probability: By horizon; None where the model cannot say.
    """

    attempt: int
    step: int
    state: AlertState
    kind: RiskKind | None
    probability: Mapping[str, float | None]


class NotedRecords(RunRecords):
    """`RunRecords` that notes the newest of the risks that it keeps.

    Args:
        registry: Where notes are.
        store: Where risks are.
    """

    def __init__(self, registry: Registry, store: Store) -> None:
        super().__init__(store)
        self._registry = registry

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        """Keep risk rows of several (run_id, attempt), and note each run's newest."""
        try:
            _note(self._registry, groups)
        except SQLAlchemyError as error:
            # The next risk of the run makes up for it.
            _log.warning("the newest risks were not noted: %s", type(error).__name__)
        super().append_risks(groups)


def notes_of(connection: sa.Connection, run_ids: Collection[str]) -> dict[str, RiskNote]:
    """Notes of these runs."""
    query = sa.select(run_risks).where(run_risks.c.run_id.in_(run_ids))
    return {
        row.run_id: RiskNote(
            attempt=row.attempt,
            step=row.step,
            state=row.state,
            kind=row.kind,
            probability={
                horizon: decode_number(value, "probability")
                for horizon, value in json.loads(row.probability).items()
            },
        )
        for row in connection.execute(query)
    }


def _note(registry: Registry, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
    fresh: dict[str, dict[str, Any]] = {}
    for run_id, attempt, table in sorted(groups, key=lambda group: group[1]):
        if table.num_rows:
            fresh[run_id] = _row(run_id, attempt, table)
    mine = run_risks.c.run_id.in_(fresh)
    with registry.write() as connection:
        known = set(connection.execute(sa.select(runs.c.run_id).where(runs.c.run_id.in_(fresh))))
        newer = {
            row.run_id
            for row in connection.execute(sa.select(run_risks).where(mine))
            if row.attempt > fresh[row.run_id]["attempt"]
        }
        kept = {row.run_id for row in known} - newer
        if kept:
            connection.execute(run_risks.delete().where(run_risks.c.run_id.in_(kept)))
            connection.execute(run_risks.insert(), [fresh[run_id] for run_id in sorted(kept)])


def _row(run_id: str, attempt: int, table: pa.Table) -> dict[str, Any]:
    step = pc.max(table["step"]).as_py()
    rows = table.filter(pc.equal(table["step"], step)).to_pylist()
    probability = {str(row["horizon"]): row["probability"] for row in rows}
    known = [value for value in probability.values() if value is not None]
    return {
        "run_id": run_id,
        "attempt": attempt,
        "step": step,
        "state": rows[-1]["state"],
        "kind": rows[-1]["kind"],
        "worst": max(known, default=UNKNOWN),
        "probability": json.dumps({h: encode_number(value) for h, value in probability.items()}),
    }
