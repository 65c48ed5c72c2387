"""Parts that the tests of the live half share: records, a scripted scorer, a receiver process."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from foreshock.api.alert_log import AlertContent, AlertSubject
from foreshock.api.cli.receiver import received
from foreshock.api.scoring_records import ScoringRecord
from foreshock.monitor.record import (
    HORIZONS,
    Event,
    Risk,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    records_to_table,
)

START = datetime(2026, 11, 1, tzinfo=UTC)
SUBJECT = AlertSubject("a" * 32, "default", "llama", 1)


def record(
    step: int, loss: float = 2.0, *, events: Sequence[Event] = (), kurtosis: float | None = None
) -> StepRecord:
    tensors: tuple[TensorStatistics, ...] = ()
    if kurtosis is not None:
        tensors = tuple(
            TensorStatistics(
                identity=TensorIdentity(f"blocks.{block}.mlp.down", "input", "e4m3"),
                numel=64,
                amax=1.0 + block,
                kurtosis=kurtosis + block,
                underflow_ratio=0.01 * block,
                headroom_log2=3.0 - block,
            )
            for block in range(8)
        )
    return StepRecord(
        step=step,
        time=START + timedelta(seconds=step),
        scalars={"loss": loss, "grad_norm": 1.0, "step_seconds": 1.0},
        tensors=tensors,
        events=tuple(events),
    )


def table_of(steps: Sequence[int], **losses: float) -> pa.Table:
    """Records of these steps; `at_<step>=loss` sets one loss."""
    return records_to_table(record(step, losses.get(f"at_{step}", 2.0)) for step in steps)


def risk(step: int, state: str = "ok", kind: str | None = None, high: float = 0.02) -> Risk:
    probability: dict[int, float | None] = {10: high / 4, 100: high, 1000: None}
    return Risk(
        step=step,
        probability=probability,
        reasons={1000: "no run is that long"},
        band={100: (high / 2, min(1.0, high * 2))},
        expected_lead=40.0 if kind == "forecast" else None,
        kind=kind,  # type: ignore[arg-type]
        state=state,  # type: ignore[arg-type]
        model_version="test-1",
    )


def content(step: int) -> AlertContent:
    return AlertContent(
        step=step,
        probability=dict.fromkeys(HORIZONS, 0.5),
        expected_lead=40.0,
        causes=(
            {
                "name": "learning_rate",
                "probability": 0.8,
                "layers": ["blocks.3.mlp.down"],
                "role": "weight",
                "statistic": "update_ratio",
                "since_step": 240,
                "evidence": "updates grew tenfold",
                "remedy": "lower the learning rate",
                "source": "",
            },
        ),
        model_version="test-1",
    )


@dataclass
class ScriptedScorer:
    """Fires on a loss above 5 (detection), warns above 4 (forecast), and remembers what it saw.

    The forecast is the mean loss so far, so that a record missed or out of order shows.
    """

    seen: list[int] = field(default_factory=list)
    total: float = 0.0
    calm: int = 0
    state_name: str = "ok"
    fail_at: int | None = None

    def score_record(self, record: ScoringRecord) -> Risk:
        return self.score(step=record.step, scalars=record.scalars)

    @property
    def state(self) -> Any:
        return self.seen, self.total, self.calm, self.state_name

    @state.setter
    def state(self, state: Any) -> None:
        self.seen, self.total, self.calm, self.state_name = state

    def score(self, *, step: int, scalars: Mapping[str, float]) -> Risk:
        if step == self.fail_at:
            raise RuntimeError("the scorer cannot take this record")
        loss = scalars.get("loss", 0.0)
        self.seen.append(step)
        self.total += loss if math.isfinite(loss) else 0.0
        kind = None
        if not loss <= 5:
            self.state_name, kind, self.calm = "firing", "detection", 0
        elif loss > 4:
            self.state_name, kind, self.calm = "firing", "forecast", 0
        elif self.state_name == "firing":
            self.calm += 1
            self.state_name = "resolved" if self.calm >= 3 else "firing"
            kind = "forecast" if self.state_name == "firing" else None
        else:
            self.state_name = "ok"
        return risk(step, self.state_name, kind, min(1.0, self.total / (1e3 * len(self.seen))))


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll; fails the test when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@dataclass(frozen=True)
class Receiver:
    """The webhook receiver process."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}/hook"

    def bodies(self) -> list[dict[str, object]]:
        return received(self.log)


@contextmanager
def receiver_process(folder: Path) -> Iterator[Receiver]:
    """A webhook receiver in a process of its own."""
    port_file, log = folder / "port", folder / "received.jsonl"
    command = [sys.executable, "-m", "foreshock.api.cli.receiver"]
    process = subprocess.Popen([*command, "--log", str(log), "--port-file", str(port_file)])
    try:
        wait_until(port_file.exists)
        yield Receiver(int(port_file.read_text()), log)
    finally:
        process.terminate()
        process.wait(10)
