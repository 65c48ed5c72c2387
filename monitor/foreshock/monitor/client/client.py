"""One method for every operation of the service; typed answers, errors that say what to do."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import httpx
import pyarrow as pa

from foreshock.monitor.certificates import verification
from foreshock.monitor.client.answers import (
    Alert,
    Heatmap,
    Launch,
    Receipt,
    RecordedEvent,
    RiskHistory,
    RunDetail,
    RunRisk,
    RunSummary,
    ServiceEvent,
    pandas,
)
from foreshock.monitor.client.calls import operation, path_of
from foreshock.monitor.client.diagnosis import Diagnosis
from foreshock.monitor.client.errors import ClientError, ServiceFailure
from foreshock.monitor.client.events import follow
from foreshock.monitor.client.http import Body, ByteReader, Http, Retry
from foreshock.monitor.client.insight import InsightCalls
from foreshock.monitor.record import StepRecord, records_to_table, write_stream

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DEFAULT_URL", "Client"]

DEFAULT_URL: Final = "http://127.0.0.1:8420"

_ARROW: Final = "application/vnd.apache.arrow.stream"
_SUFFIXES: Final = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json"}
_PAGE: Final = 500


class Client(InsightCalls):
    """A client of one service; safe to use from several threads, closed by `close` or `with`.

    Runs are named by run_id, or by name within a project. Every call may raise `NoAnswer`, and
    `Problem` or one of its kinds with the service's own words.

    Args:
        url: Of the service; default FORESHOCK_URL, else http://127.0.0.1:8420.
        token: Default FORESHOCK_TOKEN; None where there is none.
        project: Of runs that are given by name.
        timeout: Seconds for one answer.
        retry: How often a call is asked again when the service is away or busy.
        transport: Instead of the network, for tests.

    Raises:
        ValueError: The address is not http or https, the token no text for a header, or
            `FORESHOCK_CA` no certificate.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        project: str = "default",
        timeout: float = 60.0,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        # What is read from a file of secrets often ends in a line break.
        address = (url or os.environ.get("FORESHOCK_URL") or "").strip() or DEFAULT_URL
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"url is {address!r}; allowed: http://... or https://...")
        secret = (token or os.environ.get("FORESHOCK_TOKEN") or "").strip()
        if not re.fullmatch("[!-~]*", secret):
            raise ValueError("the token (FORESHOCK_TOKEN) holds what no HTTP header can carry")
        client = httpx.Client(
            base_url=address.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            timeout=httpx.Timeout(timeout, connect=5.0),
            verify=verification(),
            transport=transport,
        )
        super().__init__(Http(client, retry or Retry()))
        self.url = address
        self.project = project

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def __repr__(self) -> str:
        """Without the token."""
        return f"Client({self.url!r}, project={self.project!r})"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Runs

    @operation("list_runs")
    def runs(
        self,
        *,
        project: str | None = None,
        status: str | None = None,
        state: str | None = None,
        name: str | None = None,
        order: str = "created",
        limit: int | None = None,
    ) -> list[RunSummary]:
        """Runs of all projects, newest first.

        Args:
            project: Only this one's.
            status: Only new, live, stale or finished ones.
            state: Only those whose alert is ok, pending, firing or resolved.
            name: Only names that begin so.
            order: created, name, last_heard or risk.
            limit: At most so many; None for all.
        """
        query = {"project": project, "status": status, "state": state, "name": name, "order": order}
        return [RunSummary.read(item) for item in self._pages("api/v1/runs", "runs", query, limit)]

    @operation("get_run")
    def run(self, run: str) -> RunDetail:
        """One run, with its layers, attempts and configuration."""
        return RunDetail.read(self._get(path_of(run)).json())

    @operation("end_run")
    def end(self, run: str) -> None:
        """Say that a run is over: its silence alarms nobody. A later record takes it back."""
        self._http.ask("POST", path_of(run, "/end"), query={"project": self.project})

    @operation("delete_run")
    def delete(self, run: str) -> None:
        """Delete a run and all that is known of it; there is no way back."""
        self._http.ask("DELETE", path_of(run), query={"project": self.project})

    @operation("make_service_backup")
    def backup(self) -> str:
        """Back up the service on its own disk; the folder there, once it is complete."""
        return str(self._http.ask("POST", "api/v1/backups", again=False).json()["folder"])

    @operation("announce_launch")
    def announce(
        self,
        run: str,
        launch_id: str,
        *,
        first_step: int = 0,
        config: Mapping[str, Any] | None = None,
        layers: Sequence[str] = (),
        **members: Any,
    ) -> Launch:
        """Start an attempt; the same launch_id gives the same answer.

        Args:
            run: Its name within the client's project.
            launch_id: A UUID, made once per start of a job.
            first_step: Where it starts.
            config: Shown to people, never analysed.
            layers: In model order.
            members: project, parent_launch, tokens_per_step, world_size.
        """
        given: dict[str, Any] = {"project": self.project, "run": run, "launch_id": launch_id}
        given |= {"first_step": first_step, "layers": list(layers), "config": config} | members
        body = {name: value for name, value in given.items() if value is not None}
        return Launch(**self._http.ask("POST", "api/v1/runs", json=body).json())

    @operation("put_batch")
    def put_batch(self, run: str, batch: str, records: pa.Table | Iterable[StepRecord]) -> Receipt:
        """Store records exactly once; returns when they are durable.

        Args:
            run: run_id, or the name.
            batch: `{launch_id}-{rank}-{sequence}`; the same id must always mean the same records.
            records: A table of `record.SCHEMA`, or records.
        """
        # Not compressed: the same records give the same bytes on every machine.
        content = write_stream(_table(records), compression=None)
        path = path_of(run, f"/batches/{batch}")
        answer = self._http.ask("PUT", path, body=Body(content, _ARROW)).json()
        return Receipt(
            duplicate=answer["duplicate"],
            attempts=tuple(answer["attempts"]),
            records=answer["records"],
        )

    # Reading

    @operation("get_run_series")
    def series_table(self, run: str, name: str | None = None, **query: Any) -> pa.Table:
        """One series as Arrow: step, min, mean, max, nonfinite; arguments as for `series`."""
        path = path_of(run, "/series")
        answer = self._get(path, **{"name": name, "as": "arrow", **query})
        with pa.ipc.open_stream(answer.content) as reader:
            return reader.read_all()

    def series(self, run: str, name: str | None = None, **query: Any) -> pd.DataFrame:
        """One series as a frame by step, with min, mean, max and nonfinite of each bucket.

        Args:
            run: run_id, or the name.
            name: A scalar, e.g. loss; or instead of it:
            query: layer, role, statistic, and call_index, expert, format where there are several;
                for both kinds first_step, last_step, attempt, points.

        Raises:
            MissingPackage: pandas is not installed.
        """
        made: pd.DataFrame = pandas().DataFrame(self.series_table(run, name, **query).to_pydict())
        return made.set_index("step")

    @operation("get_run_heatmap")
    def heatmap(self, run: str, statistic: str, role: str = "input", **query: Any) -> Heatmap:
        """The worst value of a statistic per layer and bucket of steps.

        Args:
            run: run_id, or the name.
            statistic: E.g. kurtosis.
            role: Of the tensors.
            query: format, points, first_step, last_step, attempt.
        """
        given = {"statistic": statistic, "role": role, **query}
        return Heatmap.read(self._get(path_of(run, "/heatmap"), **given).json())

    @operation("get_run_tensors")
    def tensors(self, run: str, statistic: str, role: str = "input", **query: Any) -> pd.DataFrame:
        """Tensors as they were measured last, worst first: identity, step and every statistic.

        Args:
            run: run_id, or the name.
            statistic: What they are ordered by, e.g. kurtosis.
            role: Of the tensors.
            query: format, limit, first_step, last_step, attempt.

        Raises:
            MissingPackage: pandas is not installed.
        """
        given = {"statistic": statistic, "role": role, "as": "arrow", **query}
        answer = self._get(path_of(run, "/tensors"), **given)
        with pa.ipc.open_stream(answer.content) as reader:
            made: pd.DataFrame = pandas().DataFrame(reader.read_all().to_pydict())
        return made

    @operation("get_run_records")
    def record_batches(self, run: str, **query: Any) -> Iterator[pa.RecordBatch]:
        """Records as they come, in pieces of bounded size; arguments as for `records`."""
        given = {"project": self.project, "as": "arrow", **query}
        with self._http.stream(path_of(run, "/records"), query=given) as answer:
            source = io.BufferedReader(ByteReader(answer.iter_bytes()))
            with pa.ipc.open_stream(source) as reader:
                yield from reader

    def records(self, run: str, **query: Any) -> pa.Table:
        """Records by step, as a table of `record.SCHEMA`.

        Args:
            run: run_id, or the name.
            query: first_step, last_step, attempt, limit.
        """
        from foreshock.monitor.record import SCHEMA

        return pa.Table.from_batches(list(self.record_batches(run, **query)), schema=SCHEMA)

    def save_records(self, run: str, target: Path, **query: Any) -> int:
        """Write a run's records to a file, which is there whole or not at all.

        Args:
            run: run_id, or the name.
            target: .parquet, .arrow, .csv (scalars only) or .json.
            query: As for `records`.

        Returns:
            Its size in bytes.

        Raises:
            ClientError: The suffix is unknown.
        """
        form = _SUFFIXES.get(target.suffix)
        if form is None:
            raise ClientError(f"{target} is none of: {', '.join(_SUFFIXES)}")
        return self._save(path_of(run, "/records"), target, {"as": form, **query})

    # Risk

    @operation("get_run_risk")
    def risk(self, run: str) -> RunRisk:
        """The newest risk."""
        return RunRisk.read(self._get(path_of(run, "/risk")).json())

    @operation("get_run_risk_history")
    def risk_history(self, run: str, **query: Any) -> RiskHistory:
        """Risk by step; query: first_step, last_step, attempt, points."""
        return RiskHistory.read(self._get(path_of(run, "/risk/history"), **query).json())

    @operation("get_run_diagnosis")
    def diagnosis(
        self, run: str, *, step: int | None = None, attempt: int | None = None
    ) -> Diagnosis:
        """Likely causes as of a step; default: the newest."""
        answer = self._get(path_of(run, "/diagnosis"), step=step, attempt=attempt)
        return Diagnosis.read(answer.json())

    @operation("get_run_incident")
    def save_incident(
        self, run: str, step: int, target: Path, *, attempt: int | None = None
    ) -> int:
        """Write the archive of an incident: a page that opens anywhere, and the records.

        Args:
            run: run_id, or the name.
            step: What it is about.
            target: A .zip, there whole or not at all.
            attempt: Default: the highest that holds the step.

        Returns:
            Its size in bytes.
        """
        query = {"step": step, "attempt": attempt}
        return self._save(path_of(run, "/incident"), target, query)

    @operation("post_forecast")
    def forecast(self, records: pa.Table | Iterable[StepRecord]) -> list[RunRisk]:
        """Score records of one run without keeping them: one risk per record, in order."""
        body = Body(write_stream(_table(records)), _ARROW)
        answer = self._http.ask("POST", "api/v1/forecast", body=body).json()
        return [RunRisk.read(item) for item in answer["risks"]]

    # Alerts and events

    @operation("list_alerts")
    def alerts(
        self, run: str | None = None, *, state: str | None = None, limit: int | None = None
    ) -> list[Alert]:
        """Alerts, newest first.

        Args:
            run: Only this run's.
            state: Only pending, firing or resolved ones.
            limit: At most so many; None for all.
        """
        query = {"run": run, "project": self.project, "state": state}
        found = self._pages("api/v1/alerts", "alerts", query, limit)
        return [Alert.read(item) for item in found]

    @operation("get_alert")
    def alert(self, alert_id: int) -> Alert:
        """One alert."""
        return Alert.read(self._http.ask("GET", f"api/v1/alerts/{alert_id}").json())

    @operation("acknowledge_alert")
    def acknowledge(self, alert_id: int, *, note: str | None = None) -> Alert:
        """Take a firing alert on: it pages nobody again."""
        return self._decide(alert_id, "acknowledge", {"note": note})

    @operation("snooze_alert")
    def snooze(self, alert_id: int, seconds: int, *, note: str | None = None) -> Alert:
        """Keep an alert from paging for so many seconds; if it fires then, it pages again."""
        return self._decide(alert_id, "snooze", {"seconds": seconds, "note": note})

    @operation("unmute_alert")
    def unmute(self, alert_id: int) -> Alert:
        """Take back an acknowledgement or a snooze."""
        return self._decide(alert_id, "unmute", None)

    def _decide(self, alert_id: int, what: str, body: Mapping[str, Any] | None) -> Alert:
        path = f"api/v1/alerts/{alert_id}/{what}"
        return Alert.read(self._http.ask("POST", path, json=body).json())

    @operation("post_alert_feedback")
    def feedback(self, alert_id: int, *, correct: bool, note: str | None = None) -> Alert:
        """Say whether an alert was right; a later answer replaces an earlier one."""
        body = {"correct": correct, "note": note}
        path = f"api/v1/alerts/{alert_id}/feedback"
        return Alert.read(self._http.ask("POST", path, json=body).json())

    @operation("list_recorded_events")
    def recorded_events(
        self, run: str, *, kind: str | None = None, limit: int | None = None, **query: Any
    ) -> list[RecordedEvent]:
        """Events that the records of a run tell of, oldest first; query as for `records`."""
        given = {"project": self.project, "kind": kind, **query}
        found = self._pages(path_of(run, "/events/recorded"), "events", given, limit)
        return [RecordedEvent.read(item) for item in found]

    @operation("stream_run_events")
    def run_events(
        self, run: str, *, last_event_id: str | None = None, seconds: float | None = None
    ) -> Iterator[ServiceEvent]:
        """Events of one run; as `events`."""
        path = path_of(run, "/events")
        return follow(
            self._http,
            path,
            project=self.project,
            last_event_id=last_event_id,
            seconds=seconds,
        )

    @operation("stream_events")
    def events(
        self, *, last_event_id: str | None = None, seconds: float | None = None
    ) -> Iterator[ServiceEvent]:
        """Events as they happen. After a break it goes on where it was.

        What could not be caught up with is an event `reset`, whose data says why.

        Args:
            last_event_id: Go on after this event.
            seconds: End after so long; None never.
        """
        return follow(
            self._http,
            "api/v1/events",
            project=None,
            last_event_id=last_event_id,
            seconds=seconds,
        )

    # The service

    @operation("get_health")
    def healthy(self) -> bool:
        """Whether the service does its work (not whether it is reachable)."""
        return self._good("healthz")

    @operation("get_readiness")
    def ready(self) -> bool:
        """Whether requests will be served now."""
        return self._good("readyz")

    @operation("get_metrics")
    def metrics(self) -> str:
        """Prometheus text."""
        return self._http.ask("GET", "metrics").text

    def _good(self, path: str) -> bool:
        try:
            self._http.ask("GET", path, again=False)
        except ServiceFailure:
            return False
        return True

    def _get(self, path: str, **query: Any) -> httpx.Response:
        return self._http.ask("GET", path, query={"project": self.project, **query})

    def _save(self, path: str, target: Path, query: Mapping[str, Any]) -> int:
        partial = target.with_name(target.name + ".partial")
        given = {"project": self.project, **query}
        try:
            with self._http.stream(path, query=given) as answer, partial.open("wb") as file:
                for piece in answer.iter_bytes():
                    file.write(piece)
            size = partial.stat().st_size
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return size

    def _pages(
        self, path: str, name: str, query: Mapping[str, Any], limit: int | None
    ) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        cursor = None
        while limit is None or len(found) < limit:
            size = _PAGE if limit is None else min(_PAGE, limit - len(found))
            given = {**query, "limit": size, "cursor": cursor}
            page = self._http.ask("GET", path, query=given).json()
            found += page[name]
            cursor = page["next"]
            if cursor is None:
                break
        return found


def _table(records: pa.Table | Iterable[StepRecord]) -> pa.Table:
    return records if isinstance(records, pa.Table) else records_to_table(records)
