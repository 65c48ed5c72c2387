"""What the live analysis works with. Does nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from foreshock.api.alert_log import AlertLog
from foreshock.api.diagnosis import Cause
from foreshock.api.exposition import ServiceTally
from foreshock.api.leases import Leases, SoleReplica
from foreshock.api.registry import Registry
from foreshock.api.scoring_workers import Scoring
from foreshock.api.silence import SilenceWatch
from foreshock.api.stream import EventStream

__all__ = ["LiveParts", "RecordStore", "UnknownRun"]


class RecordStore(Protocol):
    """What the live analysis needs of the store."""

    def step_before(self, run_id: str, attempt: int, up_to: int, count: int) -> int:
        """The step that exactly the last `count` records with step <= up_to come after, or -1."""
        ...

    def next_records(self, run_id: str, attempt: int, after: int, count: int) -> pa.Table:
        """The first `count` records with step > after, sorted by step."""
        ...

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        """Keep risk rows of several (run_id, attempt), all or none."""
        ...

    def last_risk_step(self, run_id: str, attempt: int) -> int | None:
        """Newest step with a risk row."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveParts:
    """What the analysis works with.

    Attributes:
        registry: Names of runs.
        store: Records and risk rows.
        log: Alerts.
        stream: Readers of events.
        tally: The service's counters.
        scoring: Where records are scored.
        watch: Which runs are silent.
        leases: Which runs are this replica's to analyse.
        diagnose: Causes as of (run_id, attempt, step).
        alerted: Called after the alert log changed; must return at once.
    """

    registry: Registry
    store: RecordStore
    log: AlertLog
    stream: EventStream
    tally: ServiceTally
    scoring: Scoring
    watch: SilenceWatch
    diagnose: Callable[[str, int, int], tuple[Cause, ...]]
    alerted: Callable[[], None]
    leases: Leases = field(default_factory=SoleReplica)


class UnknownRun(LookupError):
    """The registry does not know this run (any more)."""
