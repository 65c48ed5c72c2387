"""A real service for tests: its own process, an ephemeral port, a folder that outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from foreshock.api.store_rows import Placed, place, split
from foreshock.api.wire import ARROW
from foreshock.monitor.record import (
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    records_to_table,
    write_stream,
)

LAYERS = ("blocks.0.mlp.up", "blocks.10.mlp.up", "blocks.2.mlp.up")
ROLES = ("input", "weight")
# Generous, because test machines may be busy with other things.
_START_SECONDS = 180.0


class Service:
    """`foreshock serve` over a folder; may be killed and started again."""

    command = "serve"

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        before: str = "",
    ):
        """`before` is code that runs in the service's process before anything else."""
        self._folder = folder
        self._before = before
        self._arguments = arguments
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def data(self) -> Path:
        return self._folder / "data"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def start(self) -> None:
        port_file = self._folder / "port"
        port_file.unlink(missing_ok=True)
        code = f"{self._before}\nfrom foreshock.api.cli.main import run; run()"
        command = [sys.executable, "-c", code.strip()]
        command += [
            self.command,
            "--port",
            "0",
            "--data",
            str(self.data),
            "--port-file",
            str(port_file),
        ]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FORESHOCK_")}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean | self._environment,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not port_file.exists():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{int(port_file.read_text())}"

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


class RelayProcess(Service):
    """`foreshock collect`, likewise; its arguments say where to."""

    command = "collect"


def new_launch() -> str:
    return str(uuid.uuid4())


def post_run(client: httpx.Client, run: str, launch: str, **members: Any) -> dict[str, Any]:
    body = {"run": run, "launch_id": launch, **members}
    response = client.post("/api/v1/runs", json=body)
    assert response.status_code in (200, 201), response.text
    answer: dict[str, Any] = response.json()
    return answer


def batch_path(run_id: str, launch: str, sequence: int, rank: int = 0) -> str:
    return f"/api/v1/runs/{run_id}/batches/{launch}-{rank}-{sequence}"


def put_records(
    client: httpx.Client,
    run_id: str,
    launch: str,
    sequence: int,
    records: Sequence[StepRecord],
) -> httpx.Response:
    return client.put(
        batch_path(run_id, launch, sequence),
        content=write_stream(records_to_table(records)),
        headers={"Content-Type": ARROW},
    )


def make_record(step: int, *, tensors: bool = True, value: float | None = None) -> StepRecord:
    number = float(step) if value is None else value
    return StepRecord(
        step=step,
        time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=step % 10**6),
        scalars={"loss": number, "grad_norm": 1.0},
        tensors=tuple(_tensors(number)) if tensors else (),
    )


def _tensors(number: float) -> list[TensorStatistics]:
    return [
        TensorStatistics(
            identity=TensorIdentity(layer, role, "e4m3"), numel=64, amax=number, kurtosis=3.0
        )
        for layer in LAYERS
        for role in ROLES
    ]


def make_records(first: int, count: int) -> list[StepRecord]:
    return [make_record(step) for step in range(first, first + count)]


def fact_rows(
    run_id: str, attempt: int, commit: int, records: Sequence[StepRecord]
) -> Mapping[str, pa.Table]:
    return place(
        split(records_to_table(records)),
        Placed(
            run_id=run_id,
            attempts=np.full(len(records), attempt),
            commit=commit,
            layer_ids={name: index for index, name in enumerate(LAYERS)},
        ),
    )
