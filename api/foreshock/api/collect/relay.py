"""A relay: takes batches and reports, brings them together, passes them on.

Batches are on disk before they are acknowledged. In front of a service a batch waits until the
ranks have reported its steps, or for so many seconds; then it is made anew, once, with what they
said. In front of another relay batches pass as they are and reports are joined.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from foreshock.api.collect.depot import Batch, BatchName, Depot, Made, Taken
from foreshock.api.collect.forwarding import Forwarder
from foreshock.api.collect.gathering import Gathering
from foreshock.api.collect.merging import merged
from foreshock.api.collect.settings import CollectSettings
from foreshock.api.collect.upstream import Answer, Outcome, Upstream
from foreshock.api.wire import ARROW, JSON
from foreshock.monitor.record import StepReport, json_to_table, read_stream, write_stream

__all__ = ["Counts", "Relay"]

_log = logging.getLogger(__name__)
_LOOK_SECONDS: Final = 0.1
_MOST_IN_BUNDLE: Final = 256


@dataclass(slots=True)
class Counts:
    """What came in, as counters. Rank-steps: one rank at one step."""

    batches: int = 0
    batches_again: int = 0
    batch_bytes: int = 0
    bundles: int = 0
    bundle_bytes: int = 0
    rank_steps: int = 0
    late: int = 0
    dropped: int = 0
    events_lost: int = 0
    records_merged: int = 0


@dataclass(slots=True)
class _Held:
    """A batch that waits for reports: its steps, until when, and what it was made into."""

    steps: tuple[int, ...]
    due: float
    made: Made | None = None


class Relay:
    """The parts of one running relay; any thread.

    Args:
        settings: What it is told.

    Attributes:
        settings, depot, forwarder, counts: As named.
    """

    def __init__(self, settings: CollectSettings) -> None:
        self.settings = settings
        self.depot = Depot(settings.folder / "relay.sqlite", max_bytes=settings.max_bytes)
        self.counts = Counts()
        self._gatherings: OrderedDict[tuple[str, str], Gathering] = OrderedDict()
        self._waiting: dict[int, _Held] = {}
        self._lock = threading.Lock()
        joins = settings.upstream_is_relay
        self.forwarder = Forwarder(
            self.depot,
            Upstream(
                settings.upstream,
                token=settings.upstream_token,
                authorities=settings.authorities,
            ),
            send_reports=self._send_reports if joins else None,
            interval=settings.interval_seconds,
        )
        self._stopping = threading.Event()
        self._sealer = threading.Thread(target=self._run, name="foreshock-seal", daemon=True)
        for kept in self.depot.kept():
            self._gathering(kept.run, kept.launch_id).add(kept.report)

    @property
    def alive(self) -> bool:
        """Whether its threads do their work."""
        sealing = self.settings.upstream_is_relay or self._sealer.is_alive()
        return self.forwarder.alive and sealing

    @property
    def pending_steps(self) -> int:
        """Steps for which reports wait."""
        with self._lock:
            return sum(map(len, self._gatherings.values()))

    def start(self) -> None:
        """Start the threads."""
        self.forwarder.start()
        if not self.settings.upstream_is_relay:
            self._sealer.start()

    def stop(self) -> None:
        """Pass on what can be passed on at once, and end; the rest stays on disk."""
        self._stopping.set()
        if self._sealer.is_alive():
            self._sealer.join()
        self.forwarder.stop()
        self.depot.close()

    def take_batch(self, name: BatchName, *, digest: str, media_type: str, body: bytes) -> Taken:
        """Take a batch; on disk when this returns.

        Raises:
            DepotFull: It was not taken.
        """
        as_it_is = self.settings.upstream_is_relay
        taken = self.depot.put(
            name, digest=digest, media_type=media_type, body=body, ready=as_it_is
        )
        self.counts.batch_bytes += len(body)
        if taken is Taken.NEW:
            self.counts.batches += 1
        else:
            self.counts.batches_again += 1
        if as_it_is:
            self.forwarder.notify()
        return taken

    def take_reports(self, run: str, launch_id: str, reports: Sequence[StepReport]) -> None:
        """Take reports; those with events are on disk when this returns."""
        with self._lock:
            telling = [report for report in reports if report.events]
            if telling:
                self.depot.keep(run, launch_id, telling)
            gathering = self._gathering(run, launch_id)
            for report in reports:
                gathering.add(report)
                self.counts.rank_steps += report.ranks.bit_count()
            self._tally(gathering)
            self.counts.bundles += 1

    def seal_due(self) -> int:
        """Bring held batches and reports together where that is due; how many."""
        sealed = 0
        stuck: set[str] = set()
        for batch in self.depot.held():
            launch_id = batch.name.launch_id
            if launch_id in stuck:
                continue
            held = self._held(batch)
            if self._is_due(batch, held):
                # Kept, so that a disk that fails meanwhile does not have it made twice.
                held.made = held.made or self._make(batch)
                self.depot.seal(batch, held.made)
                del self._waiting[batch.id]
                sealed += 1
            else:
                # Batches of a launch go on in their order.
                stuck.add(launch_id)
        if sealed:
            self.forwarder.notify()
        return sealed

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                self.seal_due()
            except Exception as error:  # noqa: BLE001 - a full or failing disk may recover
                _log.warning(
                    "foreshock collect: no batch could be made: %s: %s", type(error).__name__, error
                )
                self._stopping.wait(1.0)

    def _held(self, batch: Batch) -> _Held:
        held = self._waiting.get(batch.id)
        if held is None:
            table = _read(self.depot.body(batch), batch.media_type)
            due = time.monotonic() + self.settings.wait_seconds
            held = self._waiting[batch.id] = _Held(tuple(table["step"].to_pylist()), due)
        return held

    def _is_due(self, batch: Batch, held: _Held) -> bool:
        if held.made is not None or time.monotonic() >= held.due:
            return True
        launch = self.depot.launch(batch.name.launch_id)
        if launch is None or launch.world_size is None:
            return False
        with self._lock:
            gathering = self._gatherings.get((launch.run, batch.name.launch_id))
            return gathering is not None and all(
                gathering.ranks_at(step) >= launch.world_size for step in held.steps
            )

    def _make(self, batch: Batch) -> Made:
        """A batch with what was reported; what comes later finds its steps closed."""
        launch = self.depot.launch(batch.name.launch_id)
        body, media_type = self.depot.body(batch), batch.media_type
        table = _read(body, media_type)
        steps = table["step"].to_pylist()
        additions = []
        with self._lock:
            newest = self.depot.newest_report()
            gathering = None
            if launch is not None:
                gathering = self._gatherings.get((launch.run, batch.name.launch_id))
            if gathering is not None:
                additions = [gathering.close(step) for step in steps]
                self._tally(gathering)
        # A job that reports nothing has its batches passed on as they are.
        if additions and launch is not None:
            body = write_stream(merged(table, additions, launch.world_size))
            media_type = ARROW
            self.counts.records_merged += len(steps)
        return Made(media_type, body, max(steps), newest)

    def _send_reports(self, upstream: Upstream) -> Outcome:
        """Pass joined reports on, launch by launch, until one is not taken."""
        with self._lock:
            launches = list(self._gatherings)
        for run, launch_id in launches:
            with self._lock:
                gathering = self._gatherings.get((run, launch_id))
                reports = [] if gathering is None else gathering.take(_MOST_IN_BUNDLE)
                newest = self.depot.newest_report() if reports else 0
            if not reports:
                continue
            outcome = upstream.put_reports(run, launch_id, reports)
            refused = outcome.answer is Answer.REFUSED
            with self._lock:
                if outcome.answer is not Answer.TAKEN and not refused:
                    gathering = self._gathering(run, launch_id)
                    gathering.put_back(reports)
                    self._tally(gathering)
                    return outcome
                if refused:
                    self.counts.dropped += sum(report.ranks.bit_count() for report in reports)
            telling = [report.step for report in reports if report.events]
            if telling:
                self.depot.reports_sent(launch_id, telling, newest)
            if refused:
                return outcome
        return Outcome(Answer.TAKEN)

    def _gathering(self, run: str, launch_id: str) -> Gathering:
        key = (run, launch_id)
        gathering = self._gatherings.get(key)
        if gathering is None:
            gathering = self._gatherings[key] = Gathering(self.settings.most_steps)
            if len(self._gatherings) > self.settings.most_launches:
                _, oldest = self._gatherings.popitem(last=False)
                self.counts.dropped += sum(r.ranks.bit_count() for r in oldest.take(len(oldest)))
        self._gatherings.move_to_end(key)
        return gathering

    def _tally(self, gathering: Gathering) -> None:
        """Move a gathering's counts to those of the relay."""
        self.counts.late += gathering.late
        self.counts.dropped += gathering.dropped
        self.counts.events_lost += gathering.events_lost
        gathering.late = gathering.dropped = gathering.events_lost = 0


def _read(body: bytes, media_type: str) -> pa.Table:
    """A body that was validated when it came."""
    return json_to_table(body) if media_type == JSON else read_stream(body)
