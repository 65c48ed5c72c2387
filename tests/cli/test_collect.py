"""Two processes that train, a relay, a service: what each rank knows stands in one record."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.service import RelayProcess, Service
from tests.api.test_collect_relay import numbers, stored
from tests.monitor.parallel import STEPS, inputs
from tests.monitor.rank_checks import run

TOKEN = "a-token-that-is-long-enough"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    folder = tmp_path / "service"
    folder.mkdir()
    made = Service(folder)
    made.start()
    yield made
    assert made.stop() == 0, made.log


def test_a_training_of_two_processes_through_a_relay(service: Service, tmp_path: Path) -> None:
    folder = tmp_path / "relay"
    folder.mkdir()
    relay = RelayProcess(
        folder,
        *("--url", service.url, "--wait", "60"),
        environment={"FORESHOCK_TOKEN": TOKEN},
    )
    relay.start()
    seen = run("reporting", tmp_path, FORESHOCK_COLLECT=relay.url, FORESHOCK_TOKEN=TOKEN)
    assert all(each["closed"] for each in seen), "everything was acknowledged by the relay"
    assert seen[0]["launch"] == seen[1]["launch"]
    records = stored(service, "r", STEPS)
    with relay.client(TOKEN) as client:
        told = numbers(client)
        assert told["rank_steps"] == 2 * STEPS
        assert told["late_rank_steps"] == told["dropped_rank_steps"] == 0
    assert relay.stop() == 0, relay.log
    assert [record.step for record in records] == list(range(STEPS))
    for record in records:
        assert record.scalars["ranks_heard"] == 2
        assert record.scalars["ranks_silent"] == 0
        seconds = (
            record.scalars.get("ranks_step_seconds_min"),
            record.scalars.get("ranks_step_seconds_max"),
        )
        if None not in seconds:
            assert 0 < seconds[0] <= seconds[1]  # type: ignore[operator]
    rows = {(t.identity.layer, t.identity.role): t for t in records[0].tensors}
    assert rows["up", "input"].amax == pytest.approx(float(inputs(0, 1).abs().max()))
    assert rows["up", "input"].amax_rank == 1
    assert [(e.kind, e.rank, e.detail) for e in records[1].events] == [
        ("checkpoint", 1, "of rank 1")
    ], "events of other ranks reach the service"
    last = [e for e in records[-1].events if e.kind == "nonfinite" and e.rank == 1]
    assert ("up", "input", 0) in [(e.layer, e.role, e.micro_batch) for e in last]
    assert records[-1].scalars["ranks_nonfinite"] >= 1
    kinds = {e.kind for record in records for e in record.events}
    assert kinds == {"checkpoint", "nonfinite", "end"}


@pytest.mark.long
def test_a_relay_that_is_not_there_costs_the_training_nothing(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    seen = run("reporting", tmp_path, FORESHOCK_COLLECT=url)
    assert [record["step"] for record in seen[0]["records"]] == list(range(STEPS))
    assert seen[0]["losses"][0] > 0
    assert all(each["errors"] == 0 for each in seen)
    # Not sent, and kept on disk.
    assert not seen[0]["closed"]
    sealed = list((tmp_path / "spool").rglob("*.arrow"))
    assert sealed
    assert json.loads(next((tmp_path / "spool").rglob("run.json")).read_text())["world_size"] == 2
