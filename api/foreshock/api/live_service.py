"""The live half of the service, put together from the settings: analysis, alerts, events, metrics.

What the application starts, stops and asks; computes nothing itself.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from importlib.metadata import version

import pyarrow as pa

from foreshock.api.alert_log import Alert, AlertLog
from foreshock.api.alert_mutes import Mute
from foreshock.api.alert_text import summary_row
from foreshock.api.channel_apprise import AppriseChannel
from foreshock.api.channels import AlertmanagerChannel, Channel
from foreshock.api.deletions import Deletions
from foreshock.api.delivery import Delivery
from foreshock.api.diagnosis import Cause
from foreshock.api.diagnosis_process import DiagnosisProcess
from foreshock.api.exposition import ServiceTally, metrics_registry
from foreshock.api.leases import HOUSEKEEPING, RunLeases, SoleReplica
from foreshock.api.live import LiveAnalysis, LiveParts
from foreshock.api.live_run import Latest
from foreshock.api.registry import Registry
from foreshock.api.replica_feed import ReplicaFeed, publish_alerts, publish_stored
from foreshock.api.risk_notes import NotedRecords
from foreshock.api.rolling import Roller
from foreshock.api.scoring import Scorer, ShippedScorers
from foreshock.api.scoring_workers import InlineScoring, Scoring, ScoringWorkers
from foreshock.api.settings import Settings
from foreshock.api.silence import RunState, SilenceSettings, SilenceWatch
from foreshock.api.store import Store
from foreshock.api.store_url import ServersPlace
from foreshock.api.stream import EventStream
from foreshock.api.windows import DIAGNOSIS_RECORDS

__all__ = ["LiveService", "alert_channels"]


def alert_channels(settings: Settings) -> tuple[Channel, ...]:
    """Where the settings say that alerts go.

    Raises:
        ValueError: apprise does not know one of the addresses.
    """
    page = settings.public_url or None
    through_apprise = (AppriseChannel(url, page=page) for url in settings.alert_urls)
    labels = settings.alert_labels
    alertmanagers = (
        AlertmanagerChannel(url, page=page, labels=labels) for url in settings.alertmanager_urls
    )
    return (*through_apprise, *alertmanagers)


class LiveService:
    """Everything that happens to a run once its records are durable.

    Args:
        settings: What the service is told.
        registry: Names of runs.
        store: Records and risks.
        new_scorer: Makes a fresh scorer; must be importable from another process. None takes the
            shipped model.

    Attributes:
        log: The alerts.
        stream: The events.
        metrics: What `/metrics` shows.
        tally: The service's counters.
        new_scorer: As given.
        page: Address of the page as people reach it; None when it was not told.

    Raises:
        ValueError: An alert address is wrong.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        store: Store,
        new_scorer: Callable[[], Scorer] | None = None,
    ) -> None:
        channels = alert_channels(settings)
        self.page = settings.public_url or None
        self._records = NotedRecords(registry, store)
        self.new_scorer = new_scorer or ShippedScorers(settings.threshold_factor)
        self._diagnosis = DiagnosisProcess()
        self._watch = SilenceWatch(
            SilenceSettings(factor=settings.stale_intervals, minimum=settings.stale_seconds)
        )
        names = [channel.name for channel in channels]
        self.log = AlertLog(registry, names)
        self.stream = EventStream()
        self.tally = ServiceTally(names)
        leases = self._shared_leases(settings, registry)
        minutes = settings.remind_minutes
        self._delivery = Delivery(
            registry,
            self.log,
            channels,
            count=self.tally.delivery,
            remind_after=timedelta(minutes=minutes) if minutes else None,
            leads=None if leases is None else partial(_leads, leases),
        )
        held = leases or SoleReplica()
        self._roller = Roller(registry, store, held)
        parts = LiveParts(
            registry=registry,
            store=self._records,
            log=self.log,
            stream=self.stream,
            tally=self.tally,
            scoring=_scoring(settings, self.new_scorer),
            watch=self._watch,
            diagnose=self.diagnose,
            alerted=self._delivery.wake,
            leases=held,
        )
        self._analysis = LiveAnalysis(parts, queue_batches=settings.live_queue_batches)
        self._deletions = Deletions(registry, store, held, self._analysis.delete)
        self._shared = registry.database.shared
        self._feed: ReplicaFeed | None = None
        if leases is not None:
            show = partial(publish_stored, store, self.stream)
            tell = partial(publish_alerts, self.stream)
            self._feed = ReplicaFeed(registry, store, leases, self.log, self._analysis, show, tell)
        self.metrics = metrics_registry(
            tally=self.tally,
            runs=self._analysis.readings,
            firing=self.log.firing,
            muted=self.log.mutes.firing,
            gauges=self._gauges,
            info={"version": version("foreshock"), "url": settings.page_url},
        )

    def _shared_leases(self, settings: Settings, registry: Registry) -> RunLeases | None:
        """Leases, where other replicas may have the same database and store."""
        shared = registry.database.shared and isinstance(settings.store_place, ServersPlace)
        return RunLeases(registry, uuid.uuid4().hex, self._refresh) if shared else None

    def _refresh(self) -> None:
        publish_alerts(self.stream, self.log.refresh())

    def start(self) -> None:
        """Start the threads."""
        self._diagnosis.start()
        self._delivery.start()
        self._analysis.start()
        self._roller.start()
        if self._shared:
            self._deletions.start()
        if self._feed is not None:
            self._feed.start()

    def stop(self) -> None:
        """End the event readers, then the threads; what is not done is done after a restart."""
        self.stream.close()
        self._analysis.stop()
        self._roller.stop()
        self._deletions.stop()
        self._delivery.stop()
        if self._feed is not None:
            self._feed.stop()
        self._diagnosis.stop()

    def committed(self, run_id: str, attempt: int, table: pa.Table) -> None:
        """A batch is durable; returns at once (see `LiveAnalysis.committed`)."""
        self._analysis.committed(run_id, attempt, table)

    def latest(self, run_id: str) -> Latest | None:
        """The newest answer for a run, None when it is not live."""
        return self._analysis.latest(run_id)

    def state(self, run_id: str) -> RunState | None:
        """What a run is doing; None if it was not heard of for hours."""
        return self._watch.state(run_id, time.time())

    def states(self) -> Mapping[str, RunState]:
        """What the runs that are watched are doing."""
        return self._watch.states(time.time())

    def ended(self, run_id: str) -> None:
        """Somebody says that a run is over."""
        self._watch.ended(run_id)

    def delete(self, run_id: str) -> None:
        """Forget a run that the registry does not know any more, its alerts too."""
        self._analysis.delete(run_id)

    def muted(self, alert: Alert) -> None:
        """Somebody decided about an alert's pages: follow it, and tell who watches."""
        mute = self.log.mutes.of([alert.id]).get(alert.id)
        subject, row = alert.subject, {**summary_row(alert), "mute": _mute_row(mute)}
        self.stream.publish("alert", subject.run_id, row, project=subject.project)
        self._delivery.wake()

    def clock_skew(self, run_id: str) -> float | None:
        """Seconds that a run's clock seems to be behind the service's; negative: ahead."""
        return self._watch.skew(run_id)

    @property
    def idle(self) -> bool:
        """Whether everything committed so far is scored and saved."""
        return self._analysis.idle

    def diagnose(self, run_id: str, attempt: int, step: int) -> tuple[Cause, ...]:
        """Likely causes as of a step, from the records before it.

        Args:
            run_id: The run.
            attempt: Its attempt.
            step: Nothing after it is looked at.
        """
        table = self._records.newest_records(run_id, attempt, step, DIAGNOSIS_RECORDS)
        return self._diagnosis.diagnose(table) if table.num_rows else ()

    def _gauges(self) -> Mapping[str, float]:
        return {
            "foreshock_live_runs": len(self._analysis.readings()),
            "foreshock_event_readers": self.stream.readers,
            "foreshock_scoring_queue_length": self._analysis.queue_length,
        }


def _mute_row(mute: Mute | None) -> Mapping[str, object] | None:
    if mute is None:
        return None
    until = None if mute.until is None else mute.until.isoformat()
    return {"decision": mute.decision, "by": mute.by, "until": until}


def _leads(leases: RunLeases) -> bool:
    return HOUSEKEEPING in leases.mine({HOUSEKEEPING})


def _scoring(settings: Settings, new_scorer: Callable[[], Scorer]) -> Scoring:
    count = settings.analysis_workers
    if count < 0:
        count = max(1, (os.cpu_count() or 1) // 2)
    return ScoringWorkers(count, new_scorer) if count else InlineScoring(new_scorer)
